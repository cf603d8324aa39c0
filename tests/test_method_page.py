"""The examples of docs/method.md give the numbers that the page shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "method.md").read_text(encoding="utf-8")


def table(heading: str) -> list[list[str]]:
    """Return the cells of the last table of a section, without its header."""
    section = PAGE.split(f"{heading}\n")[1].split("\n#")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_the_worked_example_prints_what_the_table_shows() -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    words = re.findall(r'words = "([^"]+)"', program)[0].split()
    rows = table("## Example")
    assert len(rows) == len(printed.splitlines()) == 3
    for (kind, pooling, starts, scores, kept), line in zip(rows, printed.splitlines(), strict=True):
        assert line.startswith(f"{kind.split(',')[0]} {pooling} ")
        *arrays, chosen = ([float(number) for number in part.split()] for part in re.findall(r"\[([^]]+)\]", line))
        assert [[float(number) for number in cell.split(",")] for cell in (starts, scores)] == arrays
        quoted = " ".join(re.findall(r'"([^"]+)"', kept))
        assert quoted == " ".join(words[int(token)] for token in chosen if 2 <= token < 20)
