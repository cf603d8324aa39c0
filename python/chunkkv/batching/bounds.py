"""How much memory the KV caches of a batcher may take."""

from __future__ import annotations

from pathlib import Path

import psutil

from chunkkv.session import ChunkKVSession

FREE_MEMORY_SHARE = 0.8  # the engine's own work buffers and everybody else get the rest
_CGROUP = Path("/sys/fs/cgroup")  # a container's own bound, which the machine's free memory does not know


def cache_bytes(session: ChunkKVSession, kv_bytes: int | None) -> int | None:
    """Return the bytes that a batcher's caches may take, at most `kv_bytes`; None is as many as needed.

    An engine with a pool prefills whole prompts into it, so room for the longest one stays out of reach of the caches,
    but never more than half of the pool. An engine on the CPU gets a share of the memory that is free now, an engine
    with memory on a device no bound.
    """
    executor = session.executor
    pool = executor.capabilities.pool_bytes
    if pool is None:
        if kv_bytes is None and executor.capabilities.elastic_rows:
            return int(free_memory() * FREE_MEMORY_SHARE)
        return kv_bytes
    longest = executor.cache_bytes(executor.capacity_for(session.limits.max_input_len))
    room = max(pool - longest, pool // 2)
    return room if kv_bytes is None else min(room, kv_bytes)


def free_memory(cgroup: Path = _CGROUP) -> int:
    """Return the bytes of memory that this process could still take: the machine's, or its container's if fewer."""
    free = psutil.virtual_memory().available
    try:
        most = int((cgroup / "memory.max").read_text(encoding="ascii"))
        used = int((cgroup / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no version 2 control group, or "max"
        return int(free)
    return max(0, min(free, most - used))
