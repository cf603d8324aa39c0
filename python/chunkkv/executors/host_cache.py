"""A KV cache in host memory, as NumPy arrays: for engines that run on the CPU, and for looking into it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class HostKVCache:
    """Keys and values per layer, each [B,Hkv,C,D] float32; rows are independent requests.

    Parameters
    ----------
    keys : tuple of numpy.ndarray
        Rotated keys, one array per layer.
    values : tuple of numpy.ndarray
        Values, one array per layer, of the same shape as the keys.
    """

    keys: tuple[np.ndarray, ...]
    values: tuple[np.ndarray, ...]

    @property
    def capacity(self) -> int:
        """Slots per row."""
        return self.keys[0].shape[2]

    @property
    def row_count(self) -> int:
        """Rows of the cache."""
        return self.keys[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes allocated for all layers and rows."""
        return sum(array.nbytes for array in (*self.keys, *self.values))

    def rows(self, first: int, count: int) -> HostKVCache:
        """Return `count` rows from `first` as a cache that shares this cache's memory."""
        return HostKVCache(
            tuple(array[first : first + count] for array in self.keys),
            tuple(array[first : first + count] for array in self.values),
        )
