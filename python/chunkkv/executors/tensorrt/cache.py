"""The KV cache of a TensorRT engine: contiguous rows in GPU memory."""

from __future__ import annotations

from dataclasses import dataclass

from chunkkv.cache_layout import Slots
from chunkkv.gpu.cuda_runtime import DeviceBuffer


@dataclass(frozen=True)
class DeviceKVCache:
    """Keys and values per layer on the GPU, each [B,Hkv,C,D] in the engine's type.

    Parameters
    ----------
    keys : tuple of int
        Per layer the device address of the first row's keys.
    values : tuple of int
        Per layer the device address of the first row's values.
    row_count : int
        Rows of the cache.
    capacity : tuple of int
        Slots per row: one number, because all heads hold equally many tokens.
    row_bytes : int
        Distance between two rows of a layer, in bytes.
    buffer : DeviceBuffer
        Owns the memory; every part that rows() returns keeps it alive.
    """

    keys: tuple[int, ...]
    values: tuple[int, ...]
    row_count: int
    capacity: Slots
    row_bytes: int
    buffer: DeviceBuffer

    def rows(self, first: int, count: int) -> DeviceKVCache:
        """Return `count` rows from `first` as a cache that shares this cache's memory."""
        offset = first * self.row_bytes
        keys, values = (tuple(address + offset for address in kind) for kind in (self.keys, self.values))
        return DeviceKVCache(keys, values, count, self.capacity, self.row_bytes, self.buffer)
