"""The KV cache of a TensorRT engine: contiguous rows in GPU memory."""

from __future__ import annotations

from dataclasses import dataclass

from chunkkv.cache_layout import Slots
from chunkkv.gpu.cuda_runtime import DeviceBuffer


@dataclass(frozen=True)
class DeviceKVCache:
    """Keys and values per part of the layout on the GPU, each [B,H,C,D] in the engine's type.

    Parameters
    ----------
    keys : tuple of int
        Per part the device address of the first row's keys.
    values : tuple of int
        Per part the device address of the first row's values.
    row_count : int
        Rows of the cache.
    capacity : tuple of int
        Slots per row, one number for each length class.
    row_bytes : tuple of int
        Per part the distance between two rows, in bytes.
    buffer : DeviceBuffer
        Owns the memory; every part that rows() returns keeps it alive.
    """

    keys: tuple[int, ...]
    values: tuple[int, ...]
    row_count: int
    capacity: Slots
    row_bytes: tuple[int, ...]
    buffer: DeviceBuffer

    def rows(self, first: int, count: int) -> DeviceKVCache:
        """Return `count` rows from `first` as a cache that shares this cache's memory."""
        keys, values = (
            tuple(address + first * size for address, size in zip(kind, self.row_bytes, strict=True))
            for kind in (self.keys, self.values)
        )
        return DeviceKVCache(keys, values, count, self.capacity, self.row_bytes, self.buffer)
