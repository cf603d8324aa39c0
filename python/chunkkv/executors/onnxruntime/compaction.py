"""Compaction of a cache in host memory: the kept tokens of one row, copied to the first slots of another cache.

The compress graph is asked for the choice alone, although it could copy, too: only here can the memory of the full
cache be given back meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from chunkkv.executors.host_cache import HostKVCache
from chunkkv.executors.huge_pages import HUGE_PAGE_BYTES
from chunkkv.executors.mappings import is_in_memory
from chunkkv.executors.spent_memory import SpentMemory

# What new memory takes of a spent cache that is large enough waits elsewhere until this much was given back: only then
# are new pages those that the process has just returned. A virtual machine may get others far more slowly.
_FIRST_BYTES = 2 * HUGE_PAGE_BYTES
_LEAST_BYTES = 2 * _FIRST_BYTES


def compact(
    full: HostKVCache,
    kept: Mapping[int, np.ndarray],
    deciding: Sequence[int],
    out: HostKVCache,
    is_spent: bool = False,
) -> None:
    """Copy what one row keeps, bit for bit; slots of `out` behind that stay as they are.

    Parameters
    ----------
    full : HostKVCache
        One row.
    kept : mapping of int to numpy.ndarray
        Per part that chooses, the slots that stay, ascending: [N] integers for all of its heads, or [H,N].
    deciding : sequence of int
        For each part the part whose choice it takes.
    out : HostKVCache
        One row of the same layout.
    is_spent : bool, default False
        Whether nobody reads `full` again: its memory is given back, and its contents become meaningless.
    """
    spent = SpentMemory()
    late: list[tuple[np.ndarray, np.ndarray]] = []
    # Rows that follow each other in memory share huge pages: it is there as soon as the first of them was stored.
    is_large, somewhere = full.nbytes >= _LEAST_BYTES, out.keys[len(out.keys) // 2].ctypes.data
    waits = is_spent and is_large and not is_in_memory(somewhere)
    for sources, targets in ((full.keys, out.keys), (full.values, out.values)):
        for source, target, leader in zip(sources, targets, deciding, strict=True):
            chosen = np.broadcast_to(kept[leader], (source.shape[1], kept[leader].shape[-1]))
            for head, slots in enumerate(chosen):
                place = target[0, head, : len(slots)]
                # The mode spares a copy of the output, which NumPy makes where an index may turn out to be wrong.
                taken = np.take(source[0, head], slots, axis=0, out=None if waits else place, mode="clip")
                if waits:
                    late.append((place, taken))
            if is_spent:
                spent.add(source)
                if spent.given_back >= _FIRST_BYTES:
                    waits = False
                    _store(late)
    _store(late)


def _store(late: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Copy what was taken early to its places, and forget it."""
    for place, taken in late:
        place[...] = taken
    late.clear()
