"""Weights on huge pages: a decode step reads all of them, and with pages of 4 KB it waits for address translation.

Engines allocate their weights themselves, so the system is asked after a graph was loaded. It may refuse: then nothing
changes. Only Linux has such calls.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

HUGE_PAGE_BYTES = 2 << 20
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_SMAPS = Path("/proc/self/smaps")
# Of madvise(2): use huge pages here from now on; and, from Linux 6.1 on, move what is there to huge pages at once.
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
# Moving a mapping fills its holes. Stacks of threads and reserved memory are nearly empty, weights are full.
_LEAST_RESIDENT = 0.9
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ (\d+) *(.*)$")
_RESIDENT = re.compile(r"^Rss: +(\d+) kB$")

Range = tuple[int, int]


@contextmanager
def on_huge_pages() -> Iterator[None]:
    """Move the large blocks of memory that the body allocates and fills to huge pages, once it has ended.

    Does nothing where the system has no huge pages, or where they are switched off.
    """
    is_possible = _system_gives_them()
    before = [] if not is_possible else [place for place, _ in _anonymous_memory()]
    yield
    if not is_possible:
        return
    for place, resident in _anonymous_memory():
        if resident >= _LEAST_RESIDENT * (place[1] - place[0]):
            for start, stop in without(place, before):
                _move(start, stop)


def without(place: Range, others: Sequence[Range]) -> list[Range]:
    """Return what is left of a range of addresses when `others` are taken out of it."""
    left, (start, stop) = [], place
    for first, last in sorted(others):
        if last > start and first < stop:
            if first > start:
                left.append((start, first))
            start = last
    if start < stop:
        left.append((start, stop))
    return left


def anonymous_memory(smaps: str) -> list[tuple[Range, int]]:
    """Return the addresses of the writable memory that belongs to no file, and how many bytes of each are resident.

    Parameters
    ----------
    smaps : str
        What /proc/self/smaps says.
    """
    places: list[tuple[Range, int]] = []
    place: Range | None = None
    for line in smaps.splitlines():
        if mapping := _MAPPING.match(line):
            start, stop, access, file_number, name = mapping.groups()
            is_anonymous = access == "rw-p" and file_number == "0" and name in ("", "[heap]")
            place = (int(start, 16), int(stop, 16)) if is_anonymous else None
        elif place is not None and (resident := _RESIDENT.match(line)):
            places.append((place, int(resident.group(1)) << 10))
    return places


def _anonymous_memory() -> list[tuple[Range, int]]:
    try:
        return anonymous_memory(_SMAPS.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return []


def _system_gives_them() -> bool:
    if sys.platform != "linux":
        return False
    try:
        return "[never]" not in _SETTING.read_text(encoding="ascii")
    except OSError:
        return False


def _move(start: int, stop: int) -> None:
    """Move the whole huge pages between two addresses; a system that refuses leaves them as they are."""
    start, stop = -(-start // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES, stop // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if start >= stop:
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
        madvise(start, stop - start, advice)
