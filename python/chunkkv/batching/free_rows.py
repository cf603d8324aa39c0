"""Which rows of a cache are free: the lowest one is given out first, so that decode steps stay small."""

from __future__ import annotations

import heapq
from collections.abc import Set


class FreeRows:
    """The rows of one cache, given to answers one by one.

    Parameters
    ----------
    count : int
        Rows of the cache.
    """

    def __init__(self, count: int) -> None:
        self._free = list(range(count))  # a heap
        self._taken: set[int] = set()

    @property
    def is_idle(self) -> bool:
        """Whether no row is taken."""
        return not self._taken

    @property
    def is_full(self) -> bool:
        """Whether every row is taken."""
        return not self._free

    @property
    def taken(self) -> int:
        """How many rows are taken."""
        return len(self._taken)

    def last_taken(self, but: Set[int] = frozenset()) -> int:
        """Return the highest row that is taken, `but` some."""
        return max(self._taken - but)

    @property
    def lowest_free(self) -> int:
        """The row that take() returns next."""
        return self._free[0]

    def take(self) -> int:
        """Return the lowest free row, now taken."""
        row = heapq.heappop(self._free)
        self._taken.add(row)
        return row

    def free(self, row: int) -> None:
        """Give a row back."""
        self._taken.remove(row)
        heapq.heappush(self._free, row)
