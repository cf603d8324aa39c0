"""A KV cache in host memory, as NumPy arrays: for engines that run on the CPU, and for looking into it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from chunkkv.cache_layout import CacheLayout, Slots
from chunkkv.cache_scales import CacheScales


@dataclass(frozen=True)
class HostKVCache:
    """Keys and values per part of the layout, each [B,H,C,D] in the engine's type; rows are independent.

    H are the KV heads of the part and C the slots of its length class. Where every layer is one part, part l is layer
    l.

    Parameters
    ----------
    keys : tuple of numpy.ndarray
        Rotated keys, one array per part.
    values : tuple of numpy.ndarray
        Values, one array per part, of the same shape as the keys.
    layout : CacheLayout
        The parts.
    scales : CacheScales or None, default None
        What keys and values of 8 bits are multiplied with; None where they are what they mean.
    """

    keys: tuple[np.ndarray, ...]
    values: tuple[np.ndarray, ...]
    layout: CacheLayout
    scales: CacheScales | None = None

    @property
    def capacity(self) -> Slots:
        """Slots per row, one number for each length class; 0 for a class without heads."""
        slots = [0] * self.layout.length_classes
        for part, array in zip(self.layout.parts, self.keys, strict=True):
            slots[part.length_class] = array.shape[2]
        return tuple(slots)

    @property
    def row_count(self) -> int:
        """Rows of the cache."""
        return self.keys[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes allocated for all parts and rows."""
        return sum(array.nbytes for array in (*self.keys, *self.values))

    def rows(self, first: int, count: int) -> HostKVCache:
        """Return `count` rows from `first` as a cache that shares this cache's memory."""
        return HostKVCache(
            tuple(array[first : first + count] for array in self.keys),
            tuple(array[first : first + count] for array in self.values),
            self.layout,
            self.scales,
        )

    def float_keys(self, part: int, first: int = 0, last: int | None = None) -> np.ndarray:
        """Return the keys [B,H,N,D] float32 of slots first … last-1 of a part; a view where the cache is float32."""
        scales = None if self.scales is None else self.scales.keys[part]
        return self._in_float32(self.keys[part][:, :, first:last], scales)

    def float_values(self, part: int, first: int = 0, last: int | None = None) -> np.ndarray:
        """Return the values of slots first … last-1 of a part as `float_keys` returns the keys."""
        scales = None if self.scales is None else self.scales.values[part]
        return self._in_float32(self.values[part][:, :, first:last], scales)

    @staticmethod
    def _in_float32(array: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
        if scales is None:
            return array.astype(np.float32, copy=False)
        product: np.ndarray = array * scales[:, None]
        return product

    def layer(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Return keys and values [B,Hkv,C,D] of all heads of a layer, whose parts must have equally many slots.

        They are copies where the layer has two parts.
        """
        numbers = self.layout.of_layer(layer)
        if len(numbers) == 1:
            return self.keys[numbers[0]], self.values[numbers[0]]
        heads = np.argsort(np.concatenate([self.layout.parts[number].kv_heads for number in numbers]))
        keys, values = (
            np.concatenate([kind[number] for number in numbers], axis=1) for kind in (self.keys, self.values)
        )
        return keys[:, heads], values[:, heads]
