"""Memory of arrays that are read for the last time, given back to the system while reading goes on.

A process that copies a part of a large cache to new memory then holds less at once. It is also faster: the system
serves the new memory from the pages that have just come back, instead of asking the machine below it for others.
Only Linux can do so; elsewhere nothing is given back.
"""

from __future__ import annotations

import sys

import numpy as np

from chunkkv.executors.huge_pages import HUGE_PAGE_BYTES
from chunkkv.executors.mappings import MADV_DONTNEED, advise


class SpentMemory:
    """Gives back the memory of arrays that own it, and whose contents nobody reads again.

    Arrays that follow each other in memory count as one piece. Only whole huge pages are given back: parts of one stay
    in memory until all of it is free.

    Attributes
    ----------
    given_back : int
        Bytes that were given back so far.
    """

    def __init__(self) -> None:
        self._start = self._end = self.given_back = 0

    def add(self, array: np.ndarray) -> None:
        """Take a contiguous array that was read for the last time; all of its elements become meaningless."""
        assert array.flags.c_contiguous, array.strides
        first = array.ctypes.data
        if first != self._end:
            self._start = -(-first // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        self._end = first + array.nbytes
        stop = self._end // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        if stop > self._start and sys.platform == "linux":
            advise((self._start, stop), MADV_DONTNEED)
            self.given_back += stop - self._start
            self._start = stop
