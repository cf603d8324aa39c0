"""docs/profiling.md, run line by line: on the shipped model, with a stand-in for nsys."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest
from native.build import BuildError, nvtx_recorder
from support import fake_nsys, needle_engine

from chunkkv.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "profiling.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the engine, the question and nsys that the page speaks of."""
    try:
        nvtx_recorder()
    except BuildError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("profiling")
    (folder / "engines").mkdir()
    (folder / "engines" / "llama").symlink_to(needle_engine.engine_dir("--chunkkv_keep_ratio", "0.2"))
    text = (ROOT / "examples" / "needle" / "prompts" / "short.txt").read_text(encoding="utf-8")
    (folder / "question.txt").write_text(text, encoding="utf-8")
    fake_nsys.install(folder)
    return folder


def run(command: list[str], folder: Path) -> str:
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "COLUMNS": "120"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def test_every_command_does_what_the_page_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines that begin with chunkkv run in this process, which saves it from starting once per line."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("COLUMNS", "120")

    def output_of(line: str) -> str:
        command, *arguments = shlex.split(line)
        if command != "chunkkv":
            return run([command, *arguments], folder)
        main(arguments)
        return capsys.readouterr().out

    lines = re.findall(r"^    (\S.+)$", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL), re.MULTILINE)
    outputs = {line: output_of(line) for line in lines if not line.startswith("pip ")}
    assert [line for line in lines if line not in outputs] == ["pip install '.[profile]'"]
    assert len(outputs) == 8
    for name in (
        "chunkkv-profile.json",
        "profile.svg",
        "gpu.json",
        "gpu.nsys-rep",
        "gpu.sqlite",
        "gpu.svg",
        "mine.sqlite",
    ):
        assert (folder / name).stat().st_size > 0, name
    tables = [text for line, text in outputs.items() if "report" in line and "--json" not in line]
    assert len(tables) == 3 and all("prefill" in text and "median" in text for text in tables)


def test_the_python_lines_run(folder: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    printed = run([sys.executable, "-c", program.replace('"…"', "open('question.txt').read()")], folder)
    names = [name for name, _ in groupby(line.split()[0] for line in printed.splitlines())]  # a prefill has blocks
    assert names[:4] == ["request", "prefill", "compress", "sample"] and set(names[4:]) <= {"decode", "sample"}


def test_the_stages_on_the_page_are_those_of_the_source() -> None:
    named = set(
        re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")))
    )
    sources = [*(ROOT / "python" / "chunkkv").rglob("*.py"), ROOT / "plugins" / "api.cc"]
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    assert set(re.findall(r'(?:profiling\.(?:range|range_of|span)|StageRange range)\(\s*"(\w+)"', text)) == named


def test_every_linked_file_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGE) if "://" not in link]
    assert links and [link for link in links if not (ROOT / "docs" / link).exists()] == []
