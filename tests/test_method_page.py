"""The examples of docs/method.md give the numbers that the page shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from chunkkv import ChunkKVSettings, reference

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


def test_the_gate_decides_as_the_table_shows() -> None:
    rows = table("### Entropy gate")
    scores = np.array([float(score) for row in rows for score in row[1].split()], np.float32)
    starts = np.array([0, 5, 10])
    means = reference.chunk_scores(scores, starts, 15)
    entropies = reference.chunk_entropies(scores, starts, 15)
    gated = reference.gated_tokens(scores, starts, 15).reshape(3, 5).any(axis=1)
    assert [row[2:4] for row in rows] == [[f"{mean:.2f}", f"{e:.2f}"] for mean, e in zip(means, entropies, strict=True)]
    assert [row[4].startswith("yes") for row in rows] == list(gated)


def test_the_gate_keeps_what_the_page_says() -> None:
    scores = np.array([float(s) for row in table("### Entropy gate") for s in row[1].split()] + [0.0], np.float32)
    for gate, kept in (("entropy", [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]), ("none", list(range(10)))):
        settings = ChunkKVSettings(window=1, sinks=0, chunk_size=5, min_tokens=11, gate=gate)
        assert list(reference.select_tokens(scores, 16, 11, settings)) == [*kept, 15]
