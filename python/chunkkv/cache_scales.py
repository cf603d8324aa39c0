"""Scales of a KV cache of 8 bits: what one step of the whole numbers means in each channel of each head."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SCALES_KEY = "chunkkv.cache_scales"  # of the metadata of a step graph
LOWEST, HIGHEST = -128, 127
_ROOM = 1.25  # other texts reach further than the one that was looked at, and what is cut off is far off
_LEAST = 1e-30  # of what a channel reaches: its scale must not be 0


@dataclass(frozen=True)
class CacheScales:
    """What keys and values of 8 bits are multiplied with.

    Parameters
    ----------
    keys, values : tuple of numpy.ndarray
        Per part of the cache [H,D] float32.
    """

    keys: tuple[np.ndarray, ...]
    values: tuple[np.ndarray, ...]

    @classmethod
    def for_largest(cls, keys: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> CacheScales:
        """Return the scales that reach a quarter beyond the given magnitudes, per part [H,D]."""
        keys, values = ([np.maximum(_ROOM * largest, _LEAST) / HIGHEST for largest in kind] for kind in (keys, values))
        return cls(*(tuple(scales.astype(np.float32) for scales in kind) for kind in (keys, values)))

    def to_text(self) -> str:
        """Return the scales as text: float32, keys before values, in base64."""
        flat = np.concatenate([scales.ravel() for scales in (*self.keys, *self.values)])
        return base64.b64encode(flat.astype("<f4").tobytes()).decode("ascii")

    @classmethod
    def from_text(cls, text: str, heads: Sequence[int], head_dim: int) -> CacheScales:
        """Read what `to_text` returned; `heads` are those of each part. Raises ValueError where numbers are missing."""
        flat = np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(np.float32)
        if len(flat) != (expected := 2 * sum(heads) * head_dim):
            raise ValueError(f"{len(flat)} scales, expected {expected}")
        halves = flat.reshape(2, -1, head_dim)
        keys, values = (np.split(half, np.cumsum(heads)[:-1]) for half in halves)
        return cls(tuple(keys), tuple(values))
