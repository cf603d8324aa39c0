"""The inputs of a decode step that covers every row of a cache, for engines that cannot leave idle rows out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from chunkkv.errors import EngineRunError


@dataclass(frozen=True)
class StepArrays:
    """What a step graph reads of each of the B rows; the arrays stay bound to the engine, so they are only written to.

    Parameters
    ----------
    input_ids : numpy.ndarray
        Token ids [B,1] int64.
    position_ids : numpy.ndarray
        Logical positions [B,1] int64.
    cache_lengths : numpy.ndarray
        Cache slots to write [length_classes,B] int32.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    cache_lengths: np.ndarray

    def fill(
        self,
        rows: Sequence[int],
        tokens: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[int] | np.ndarray,
    ) -> None:
        """Set the inputs of `rows`; every other row gets token 0 at position 0 and writes its slot 0.

        Zeros are the one choice that is valid for every row, whatever it holds: slot 0 always exists, and attention
        then reads that slot only.
        """
        named = list(rows)
        for array, values in (
            (self.input_ids[:, 0], tokens),
            (self.position_ids[:, 0], positions),
            (self.cache_lengths, slots),
        ):
            array[...] = 0
            array[..., named] = values


def check_slots(rows: Sequence[int], slots: Sequence[int] | np.ndarray, capacity: Sequence[int]) -> None:
    """Raise EngineRunError where a row would write behind its `capacity` slots.

    Engines do not check this themselves, and would write into the next row or beyond the cache. `slots` are [rows] or
    [length_classes,rows], `capacity` has one number for each length class; a class of no slots has no heads either.
    """
    for class_slots, limit in zip(np.asarray(slots).reshape(-1, len(rows)).tolist(), capacity, strict=True):
        for row, slot in zip(rows, class_slots, strict=True):
            if slot >= limit > 0:
                raise EngineRunError(f"row {row} was to write slot {slot} of a cache with {limit} slots per row")
