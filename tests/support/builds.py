"""Runs command lines as a user does: in this process for speed, or as programs of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from chunkkv_builder import build as build_engine

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "builder" / "build_engine.py"
PREFIX = "chunkkv-build: error: "
for _name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):  # would make a pipe pass for a terminal
    os.environ.pop(_name, None)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: exit code, standard output and standard error."""

    code: int
    out: str
    err: str

    def error(self, code: int) -> str:
        """Return the message of a run that must have failed with `code` and one line on standard error."""
        assert (self.code, self.out) == (code, ""), self
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith(PREFIX), self.err
        return lines[0].removeprefix(PREFIX)


class CommandLine:
    """Calls a command line's main function, chunkkv-build's if no other is given, and captures what it prints."""

    def __init__(
        self, capsys: pytest.CaptureFixture[str], main: Callable[[Sequence[str]], None] = build_engine.main
    ) -> None:
        self._capsys, self._main = capsys, main

    def __call__(self, *arguments: object) -> Outcome:
        self._capsys.readouterr()
        code = 0
        try:
            self._main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            assert stopped.code is None or isinstance(stopped.code, int)
            code = stopped.code or 0
        out, err = self._capsys.readouterr()
        return Outcome(code, out, err)


def run_program(*command: object, cwd: Path | None = None) -> Outcome:
    """Run `command` with this interpreter's environment and without the tests' own module path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


def python(*arguments: object, cwd: Path | None = None) -> Outcome:
    """Run this interpreter with `arguments`."""
    return run_program(sys.executable, *arguments, cwd=cwd)


def on_terminal(*command: object, wait_for: str = "", then: bytes = b"") -> tuple[int, str]:
    """Run `command` on a terminal of its own and type `then` once `wait_for` shows; return exit code and screen."""
    here, there = os.openpty()
    process = subprocess.Popen(
        [str(word) for word in command],
        stdin=there,
        stdout=there,
        stderr=there,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(there)
    shown = b""
    while piece := _read(here):
        shown += piece
        if then and wait_for.encode() in shown:
            os.write(here, then)
            then = b""
    os.close(here)
    return process.wait(60), shown.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # how Linux says that the other side has closed
        return b""


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return every path below `folder` with its content, None for directories."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
