"""Weights as a quantised file stores them: blocks of 32 values that share a scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

BLOCK = 32


@dataclass(frozen=True)
class QuantizedBlocks:
    """A weight [out, in] as whole numbers of `bits` bits in blocks of 32 inputs.

    A value is (code - 2**(bits - 1)) * scale + offset.

    Parameters
    ----------
    codes : ndarray
        uint8 [out, in / 32, 32], below 2**bits.
    scales : ndarray
        float32 [out, in / 32].
    offsets : ndarray or None
        float32 [out, in / 32]; None where all are 0.
    """

    codes: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None


@dataclass(frozen=True)
class StoredBlocks:
    """A weight that a file stores as blocks of 32, before it is read.

    Parameters
    ----------
    has_offsets : bool
        Whether its blocks have offsets.
    load : callable
        Reads it; raises CheckpointError where a scale or an offset is not finite.
    """

    has_offsets: bool
    load: Callable[[], QuantizedBlocks]
