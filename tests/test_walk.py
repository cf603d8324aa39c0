"""The walks of a prompt and of a build in docs/architecture.md name the files that a run enters, in that order."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
from support import engines

import chunkkv
import chunkkv_builder
from chunkkv.cli.main import main as chunkkv_command
from chunkkv_builder.build import main as chunkkv_build

PAGE = Path(__file__).resolve().parent.parent / "docs" / "architecture.md"
# Settings that check themselves when they are made, and the flags of all commands: no step of a walk.
NOT_ENTERED = {"__post_init__", "make_parser"}


def entered(folder: Path, run: Callable[[], None]) -> list[str]:
    """Return the files below `folder` whose functions are called, by first entry."""
    run()  # the first run imports all modules, which calls functions, too
    files: dict[str, None] = {}

    def note(frame: FrameType, event: str, argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and folder in path.parents and NOT_ENTERED.isdisjoint(callers(frame)):
            files.setdefault(path.relative_to(folder).as_posix())

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return list(files)


def callers(frame: FrameType | None) -> Iterator[str]:
    while frame is not None:
        yield frame.f_code.co_name
        frame = frame.f_back


def steps(heading: str) -> tuple[list[str], set[str]]:
    """Return the files of the numbered steps below `heading`, and those of the list of leaves."""
    walk = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    listed = re.findall(r"^(\d+\.|-) \**`([\w/]+\.py)`", walk, re.MULTILINE)
    return [name for mark, name in listed if mark != "-"], {name for mark, name in listed if mark == "-"}


def test_the_walk_of_a_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    engine = engines.engine_dir("llama3")
    words = ["generate", "--engine_dir", str(engine), "--max_new_tokens", "3", "--ignore_eos", "a prompt " * 12]
    files = entered(Path(chunkkv.__file__).parent, lambda: chunkkv_command(words))
    walk, leaves = steps("The walk of a prompt")
    assert [name for name in files if name not in leaves] == walk
    assert set(files) - set(walk) == leaves
    assert len(walk) <= 12, "a reader gets lost"


def test_the_walk_of_a_build(tmp_path: Path) -> None:
    flags = {"checkpoint_dir": engines.checkpoint_dir("llama3"), "output_dir": tmp_path / "engine", "chunkkv": True}
    flags |= {"max_seq_len": 256, "log_level": "error", "overwrite": True, **engines.SMALL_CHUNKKV}
    words = engines.command_line(flags)
    files = entered(Path(chunkkv_builder.__file__).parent, lambda: chunkkv_build(words))
    walk, _ = steps("The walk of a build")
    assert [name for name in files if name in walk] == walk
