"""Compaction of a cache in host memory: the kept tokens of one row, copied to the first slots of another cache.

The compress graph is asked for the choice alone, although it could copy, too: only here can the memory of the full
cache be given back meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from chunkkv.executors.host_cache import HostKVCache
from chunkkv.executors.spent_memory import SpentMemory


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
    for sources, targets in ((full.keys, out.keys), (full.values, out.values)):
        for source, target, leader in zip(sources, targets, deciding, strict=True):
            chosen = np.broadcast_to(kept[leader], (source.shape[1], kept[leader].shape[-1]))
            for head, slots in enumerate(chosen):
                # The mode spares a copy of the output, which NumPy makes where an index may turn out to be wrong.
                np.take(source[0, head], slots, axis=0, out=target[0, head, : len(slots)], mode="clip")
            if is_spent:
                spent.add(source)
