"""The processes of a server: finding those that run models, and ending a process group for good."""

from __future__ import annotations

import os
import signal
import time

import psutil

STUB_PROGRAM = "triton_python_backend_stub"  # the program that runs a python model


def is_running(pid: int) -> bool:
    """Return whether a process exists and has not ended; a zombie has."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def model_processes(shm_prefix: str) -> frozenset[int]:
    """Return the processes that run python models of one server; their command lines have its shared-memory prefix."""
    pids = set()
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or ())
        if STUB_PROGRAM in command and shm_prefix in command:
            pids.add(process.pid)
    return frozenset(pids)


def command_lines() -> list[str]:
    """Return the command line of every process that this user may see."""
    return [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]


def wait_for_group(group: int, timeout_s: float) -> None:
    """Wait until a process group has no running process any more, for at most `timeout_s` seconds."""
    until = time.monotonic() + timeout_s
    while _has_running(group) and time.monotonic() < until:
        time.sleep(0.02)


def kill_group(group: int) -> None:
    """Kill every process of a group and wait until they are gone; nothing else can end a stuck model process."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
    wait_for_group(group, timeout_s=10)


def _has_running(group: int) -> bool:
    return any(_group_of(pid) == group and is_running(pid) for pid in psutil.pids())


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except (ProcessLookupError, PermissionError):
        return None
