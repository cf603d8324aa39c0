"""Runs programs with the NVTX recorder attached, and pairs what it wrote to ranges."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from support.nsys_exports import Event

from native.build import ROOT, nvtx_recorder


def attached(out: Path) -> dict[str, str]:
    """Return the environment of a process whose NVTX calls are to be recorded in `out`."""
    return {**os.environ, "NVTX_INJECTION64_PATH": str(nvtx_recorder()), "NVTX_RECORDER_OUT": str(out)}


def capture(program: str, *arguments: str, out: Path) -> list[Event]:
    """Run Python text with tests/ on its path and return the ranges by start; fails where one was not ended."""
    environment = attached(out) | {"PYTHONPATH": os.pathsep.join((str(ROOT / "tests"), *sys.path))}
    command = [sys.executable, "-W", "error", "-c", program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return read_events(out)


def read_events(path: Path) -> list[Event]:
    """Return what the recorder wrote as ranges by start."""
    stacks: dict[int, list[dict]] = {}
    begun: dict[int, dict] = {}
    ranges = []
    for line in path.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        stack = stacks.setdefault(event["thread"], [])
        if event["event"] == "push":
            assert event["depth"] == len(stack)
            stack.append(event)
        elif event["event"] == "pop":
            ranges.append(_event(stack.pop(), event, True))
            assert event["depth"] == len(stack)
        elif event["event"] == "start":
            begun[event["id"]] = event
        else:
            assert event["event"] == "end", line
            ranges.append(_event(begun.pop(event["id"]), event, False))
    assert not begun and not any(stacks.values())
    return sorted(ranges, key=lambda entry: (entry.start, -entry.end))


def _event(first: dict, last: dict, nested: bool) -> Event:
    assert first["domain"] == last["domain"]
    registered, thread = first.get("registered", False), first["thread"]
    return Event(
        first["text"], first["t"], last["t"], thread, nested, first.get("payload"), registered, first["domain"]
    )
