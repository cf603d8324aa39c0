"""The KV cache of a TensorRT-LLM engine: rows that own blocks of the executor's pool."""

from __future__ import annotations

import weakref

import numpy as np

from chunkkv.cache_layout import Slots
from chunkkv.executors.tensorrt_llm.kv_blocks import BlockManager


class PagedKVCache:
    """Rows that own blocks of a pool; the blocks go back when the last part of the cache is gone.

    Parameters
    ----------
    manager : BlockManager
        Owns the pool.
    sequences : tuple of int
        Per row its sequence in `manager`.
    capacity : tuple of int
        Slots that are reserved for each row: one number, because all heads keep equally many tokens.
    """

    def __init__(self, manager: BlockManager, sequences: tuple[int, ...], capacity: Slots) -> None:
        self.sequences, self.capacity = sequences, capacity
        self.prompt_lengths = np.zeros(len(sequences), np.int64)  # 0: nothing was prefilled; shared by rows()
        self._whole: PagedKVCache | None = None
        weakref.finalize(self, manager.discard, sequences)

    def rows(self, first: int, count: int) -> PagedKVCache:
        """Return `count` rows from `first` as a cache that shares this cache's memory."""
        part = object.__new__(PagedKVCache)  # without __init__: only the whole cache gives its blocks back
        part.sequences, part.capacity = self.sequences[first : first + count], self.capacity
        part.prompt_lengths, part._whole = self.prompt_lengths[first : first + count], self._whole or self
        return part
