"""The machine of a measurement: what it is, and how busy it is with other work. Needs nothing but Python."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
QUIET_CORES = 0.1  # other work than this, in cores, does not move the medians by more than they scatter
SOURCES = ("python", "builder")
_PROBE_S = 2.0


def commit() -> str:
    """Return the last commit that changed the product, marked where a file of it has changes since."""
    last = _git("log", "-1", "--format=%h", "--abbrev=12", "--", *SOURCES) or "unknown"
    return last + ("-dirty" if _git("status", "--porcelain", "--", *SOURCES) else "")


def describe() -> dict[str, Any]:
    """Return processor, cores, memory and system, and whether the machine is a virtual one."""
    named = (line for line in _lines("/proc/cpuinfo") if line.startswith("model name"))
    memory = (line for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    return {
        "processor": next(named, f":{platform.processor()}").split(":", 1)[1].strip() or "unknown processor",
        "cores": os.cpu_count(),
        "memory_gb": round(int(next(memory, "MemTotal: 0 kB").split()[1]) * 1024 / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "is_virtual": any(
            line.startswith("flags") and "hypervisor" in line.split() for line in _lines("/proc/cpuinfo")
        ),
    }


def busy_s() -> float:
    """Return the seconds that all cores together have worked since the machine started; 0 where that is not told."""
    for line in _lines("/proc/stat"):
        if line.startswith("cpu "):
            user, nice, system, _idle, _waiting, *interrupts = map(int, line.split()[1:8])
            return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
    return 0.0


def memory_mb(name: str) -> float:
    """Return this process's "VmRSS" or, its peak, "VmHWM" in MB (10**6 bytes)."""
    for line in _lines("/proc/self/status"):
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError(f"/proc/self/status has no {name}: memory is measured on Linux alone")


def other_work() -> float:
    """Return how many cores other processes keep busy, watched for two seconds."""
    start, own, clock = busy_s(), time.process_time(), time.perf_counter()
    time.sleep(_PROBE_S)
    return max(0.0, (busy_s() - start) - (time.process_time() - own)) / (time.perf_counter() - clock)


def wait_until_quiet(most_s: float) -> bool:
    """Return True as soon as other work takes less than QUIET_CORES, False after `most_s` seconds."""
    end = time.monotonic() + most_s
    while other_work() > QUIET_CORES:
        if time.monotonic() > end:
            return False
        time.sleep(_PROBE_S)
    return True


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=ROOT, check=False)
    return done.stdout.strip()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
