"""Ends a build at each of its file operations in turn, as kill -9 or as Ctrl-C; run as a program of its own.

Arguments: "kill" or "interrupt", the folder to build in, then the flags of the build, whose output is FOLDER/engine.
Prints a JSON list with one entry per ended build: its exit status, the names in the folder and those that load.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from chunkkv.command_line import INTERRUPTED
from chunkkv.engine.directory import EngineFiles
from chunkkv.errors import EngineError
from chunkkv_builder import backends, dry_run, manifest
from chunkkv_builder import build as build_engine
from chunkkv_builder.backends import onnxruntime

LOADED = (backends, dry_run, manifest, onnxruntime)  # before the forks, so that each build is quick
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "os.listdir", "os.scandir", "shutil.rmtree")


def end_at(operation: int, how: str, folder: str) -> None:
    """End this process at the `operation`-th file operation inside `folder`."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in OPERATIONS and str(arguments[0]).startswith(folder):
            seen += 1
            if seen == operation:
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KeyboardInterrupt

    sys.addaudithook(hook)


def build(operation: int, how: str, folder: Path, flags: list[str]) -> int:
    """Build in a forked process that is ended at `operation`; return its exit code, -9 where it was killed."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code: int | str | None = 99
    try:
        end_at(operation, how, f"{folder}/")
        build_engine.main([*flags, "--output_dir", f"{folder}/engine", "--log_level", "error"])
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    finally:
        os._exit(code if isinstance(code, int) else 98)


def loads(path: Path) -> bool:
    """Return whether `path` is an engine that loads."""
    try:
        EngineFiles.load(path)
    except EngineError:
        return False
    return True


def main(how: str, folder: Path, flags: list[str]) -> None:
    """End builds one operation later each time, until one ends by itself: complete, or refused by an engine."""
    rounds = []
    for operation in itertools.count(1):
        code = build(operation, how, folder, flags)
        present = sorted(folder.iterdir())
        rounds.append({"code": code, "names": [p.name for p in present], "load": [p.name for p in present if loads(p)]})
        if code not in (-signal.SIGKILL, INTERRUPTED):
            break
    print(json.dumps(rounds))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
