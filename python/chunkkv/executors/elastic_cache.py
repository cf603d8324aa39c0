"""A KV cache in host memory whose rows take memory only for the tokens in them, however many slots they have.

The arrays are address space without memory. The operating system gives a page when a slot in it is first written, and
takes all pages of a row back when the row is released. So rows of every length lie in one cache, decode together, and
cost what they hold. A page has the size of a few tokens, because the keys of one head lie one after the other.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from chunkkv.errors import CacheFullError
from chunkkv.executors.host_cache import HostKVCache

PAGE_BYTES = mmap.PAGESIZE
# Of mmap(2): the address space does not count as memory. Python has no name for it before 3.13.
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0


@dataclass(frozen=True)
class ElasticHostKVCache(HostKVCache):
    """Keys and values over address space that is filled page by page; see ElasticKVCache.

    Parameters
    ----------
    maps : tuple of mmap.mmap
        The memory of each array: those of the keys, then those of the values.
    """

    maps: tuple[mmap.mmap, ...] = ()

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """The arrays in the order of their maps."""
        return (*self.keys, *self.values)

    def bytes_of(self, slots: Sequence[int]) -> int:
        """Return the bytes of memory that a row with so many filled slots takes: whole pages per head."""
        return sum(
            array.shape[1] * -(-filled * array.shape[3] * array.itemsize // PAGE_BYTES) * PAGE_BYTES
            for array, filled in zip(self.arrays, self._filled(slots), strict=True)
        )

    def release(self, row: int) -> None:
        """Give the memory of a row back to the operating system; its slots are meaningless then."""
        for array, memory in zip(self.arrays, self.maps, strict=True):
            _give_back(array, memory, row)

    def take_row(self, source: ElasticHostKVCache, source_row: int, row: int, slots: Sequence[int]) -> None:
        """Move the first slots of a row of `source`, maybe this cache itself, to `row`, and release that one.

        Array by array, so that hardly more than one row's memory is in use at any time.
        """
        for target, array, memory, filled in zip(
            self.arrays, source.arrays, source.maps, self._filled(slots), strict=True
        ):
            target[row, :, :filled] = array[source_row, :, :filled]
            _give_back(array, memory, source_row)

    def slot_0(self, row: int) -> tuple[np.ndarray, ...]:
        """Return a copy of the slot that steps of other rows may overwrite while `row` is idle, [H,D] per array."""
        return tuple(array[row, :, 0].copy() for array in self.arrays)

    def restore_slot_0(self, row: int, held: Sequence[np.ndarray]) -> None:
        """Write back what slot_0() returned for this row."""
        for array, values in zip(self.arrays, held, strict=True):
            array[row, :, 0] = values

    def _filled(self, slots: Sequence[int]) -> list[int]:
        """Return the filled slots of each array."""
        return 2 * [slots[part.length_class] for part in self.layout.parts]


def elastic_cache(template: HostKVCache, rows: int, capacity: Sequence[int]) -> ElasticHostKVCache:
    """Return an empty cache of at least `capacity` slots per row with the parts of `template`, whose sizes are free.

    Slots are rounded up until the slots of one head fill whole pages. Raises CacheFullError where the operating system
    refuses the address space.
    """
    layout = template.layout
    slots = [capacity[part.length_class] for part in layout.parts]
    arrays, maps = [], []
    for array, count in zip((*template.keys, *template.values), 2 * slots, strict=True):
        made, memory = _address_space(array, rows, count)
        arrays.append(made)
        maps.append(memory)
    half = len(arrays) // 2
    return ElasticHostKVCache(tuple(arrays[:half]), tuple(arrays[half:]), layout, template.scales, tuple(maps))


def _address_space(template: np.ndarray, rows: int, slots: int) -> tuple[np.ndarray, mmap.mmap]:
    unit = PAGE_BYTES // math.gcd(PAGE_BYTES, template.shape[3] * template.itemsize)
    slots = -(-max(slots, 1) // unit) * unit
    shape = (rows, template.shape[1], slots, template.shape[3])
    size = math.prod(shape) * template.itemsize
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    except (OSError, ValueError, OverflowError) as error:
        raise CacheFullError(
            f"the system refuses {size} bytes of address space for {rows} rows of {slots} slots ({error}): "
            "give fewer slots, or raise the limit of the process (ulimit -v)"
        ) from None
    if sys.platform == "linux":
        memory.madvise(mmap.MADV_NOHUGEPAGE)  # a huge page would hold thousands of slots, used or not
    return np.frombuffer(memory, template.dtype).reshape(shape), memory


def _give_back(array: np.ndarray, memory: mmap.mmap, row: int) -> None:
    size = array.strides[0]
    memory.madvise(mmap.MADV_DONTNEED, row * size, size)
