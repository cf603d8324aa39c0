"""The processes of a server: finding those that run models, and ending a process group for good."""

from __future__ import annotations

import os
import signal
import time
from types import ModuleType

from chunkkv.errors import BackendUnavailableError

STUB_PROGRAM = "triton_python_backend_stub"  # the program that runs a python model


def check_psutil() -> None:
    """Raise BackendUnavailableError where psutil is missing; every other function here raises it, too."""
    _psutil()


def is_running(pid: int) -> bool:
    """Return whether a process exists and has not ended; a zombie has."""
    psutil = _psutil()
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def model_processes(shm_prefix: str) -> frozenset[int]:
    """Return the processes that run python models of one server; their command lines have its shared-memory prefix."""
    pids = set()
    for process in _psutil().process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or ())
        if STUB_PROGRAM in command and shm_prefix in command:
            pids.add(process.pid)
    return frozenset(pids)


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
    return any(_group_of(pid) == group and is_running(pid) for pid in _psutil().pids())


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except (ProcessLookupError, PermissionError):
        return None


def _psutil() -> ModuleType:
    try:
        import psutil
    except ImportError as error:
        raise BackendUnavailableError(
            f"watching a server's processes needs the package psutil ({error}): pip install 'chunkkv-trt[triton]'"
        ) from None
    return psutil
