"""The processes of a server: finding those that run models, and ending a process group for good."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

STUB = "triton_python_backend_stub"


def is_running(pid: int) -> bool:
    """Return whether a process exists and has not ended (a zombie has)."""
    return _stat(pid) not in (None, "Z", "X")


def model_processes(shm_prefix: str) -> frozenset[int]:
    """Return the processes that run python models of the server with this shared-memory prefix."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if STUB in command and shm_prefix in command:
                found.add(int(entry.name))
    return frozenset(found)


def end_group(group: int, grace_s: float) -> None:
    """Wait until a process group is empty, for at most `grace_s`."""
    until = time.monotonic() + grace_s
    while _members(group) and time.monotonic() < until:
        time.sleep(0.02)


def kill_group(group: int) -> None:
    """Kill every process of a group and wait until they are gone; nothing else can end a stuck model process."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
    end_group(group, grace_s=10)


def _members(group: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _stat(int(entry.name), group) not in (None, "Z", "X"):
            found.append(int(entry.name))
    return found


def _stat(pid: int, group: int | None = None) -> str | None:
    """Return the state letter of a process, None where it does not exist or is of another group."""
    try:
        state, _, its_group = Path(f"/proc/{pid}/stat").read_bytes().rsplit(b")", 1)[1].split()[:3]
    except (OSError, IndexError, ValueError):
        return None
    return None if group not in (None, int(its_group)) else state.decode()
