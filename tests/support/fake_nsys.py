"""A stand-in for nsys: runs the program with the NVTX recorder attached, and exports what was recorded as SQLite."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_PROGRAM = """#!{python}
import json, subprocess, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from native.nvtx_capture import attached, read_events
from support.nsys_exports import write_export
with open({log!r}, "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
mode, command = {mode!r}, sys.argv[1]
if mode == command:
    print("first line\\nno such report", file=sys.stderr)
    sys.exit(3)
if mode == "silent":
    sys.exit(0)
(output,) = (Path(flag.split("=", 1)[1]) for flag in sys.argv if flag.startswith("--output="))
if command == "profile":
    environment = attached(Path(f"{{output}}.nsys-rep"))
    program = next(at for at, word in enumerate(sys.argv) if at > 1 and not word.startswith("-"))
    sys.exit(subprocess.run(sys.argv[program:], env=environment).returncode)
write_export(output, read_events(Path(sys.argv[-1])), ())
"""


def install(folder: Path, mode: str = "works") -> Path:
    """Write an executable nsys into `folder` and return the file where it notes its arguments.

    `mode` "profile" or "export" makes that command fail, "silent" makes it write nothing.
    """
    log = folder / "arguments.jsonl"
    text = _PROGRAM.format(python=sys.executable, tests=str(ROOT / "tests"), log=str(log), mode=mode)
    (folder / "nsys").write_text(text, encoding="utf-8")
    os.chmod(folder / "nsys", 0o755)
    return log
