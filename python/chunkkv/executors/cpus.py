"""How many processors this process may use."""

from __future__ import annotations

import os


def usable_cpus() -> int:
    """Return how many CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cores() -> int:
    """Return how many cores this process may use: CPUs that share one core count once."""
    import psutil  # few generations need it

    return min(usable_cpus(), psutil.cpu_count(logical=False) or usable_cpus())
