"""Memory of this process: what it is mapped to, as Linux tells it, and how parts of it are given back."""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

# What is mapped where; and the same with how much of it is where, which takes the system many times as long.
MAPS, SMAPS = Path("/proc/self/maps"), Path("/proc/self/smaps")
# Of madvise(2): take the pages out of this process, use huge pages from now on, and, from Linux 6.1 on, move what is
# there to huge pages at once.
MADV_DONTNEED, MADV_HUGEPAGE, MADV_COLLAPSE = 4, 14, 25
_HEAD = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ (\d+) *(.*)$")
_HEX_DIGITS = frozenset("0123456789abcdef")

Range = tuple[int, int]


@dataclass(frozen=True)
class Mapping:
    """A range of addresses that has one source.

    Parameters
    ----------
    place : tuple of int
        First address, and the one behind the last.
    access : str
        As "rw-p": read, write and execute, private or shared.
    is_file : bool
        Whether the memory is that of a file.
    name : str
        The file, or what the system calls the memory, as "[heap]"; "" without a name.
    resident : int or None, default None
        How many bytes of it lie in memory; None where that was not asked.
    own_copies : int or None, default None
        How many bytes are no longer those of the file because this process wrote to them, or belong to no file; None
        where that was not asked or is not told.
    """

    place: Range
    access: str
    is_file: bool
    name: str
    resident: int | None = None
    own_copies: int | None = None

    @property
    def size(self) -> int:
        """Bytes of addresses."""
        return self.place[1] - self.place[0]


def mappings(text: str) -> list[Mapping]:
    """Return the mappings of a process.

    Parameters
    ----------
    text : str
        What /proc/self/maps says, or /proc/self/smaps.
    """
    found: list[Mapping] = []
    for line in text.split("\n"):
        # There are thousands of lines with other amounts.
        if line.startswith("Rss:"):
            found[-1] = replace(found[-1], resident=_bytes(line))
        elif line.startswith("Anonymous:"):
            found[-1] = replace(found[-1], own_copies=_bytes(line))
        elif line[:1] in _HEX_DIGITS and (head := _HEAD.match(line)):
            start, stop, access, file_number, name = head.groups()
            found.append(Mapping((int(start, 16), int(stop, 16)), access, file_number != "0", name))
    return found


def _bytes(line: str) -> int:
    return int(line.split()[1]) << 10


def own_mappings(source: Path = SMAPS) -> list[Mapping]:
    """Return the mappings of this process; none where the system does not tell them.

    Parameters
    ----------
    source : Path, default SMAPS
        SMAPS, or MAPS where amounts are not needed.
    """
    try:
        return mappings(source.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return []


def with_amounts(wanted: Callable[[Mapping], bool]) -> list[Mapping]:
    """Return those of this process's mappings that `wanted` takes by place and name, with their amounts.

    The system counts amounts slowly, and only for all mappings: it is not asked where none is wanted.
    """
    if not any(map(wanted, own_mappings(MAPS))):
        return []
    return list(filter(wanted, own_mappings()))


def without(place: Range, others: Sequence[Range]) -> list[Range]:
    """Return what is left of a range of addresses when `others` are taken out of it.

    `others` ascend and do not overlap, as the mappings of a process: there may be thousands, of which few are near.
    """
    left, (start, stop) = [], place
    number = bisect_right(others, start, key=itemgetter(1))
    while number < len(others) and others[number][0] < stop:
        first, last = others[number]
        if first > start:
            left.append((start, first))
        start = last
        number += 1
    if start < stop:
        left.append((start, stop))
    return left


def advise(place: Range, advice: int) -> None:
    """Advise the system about whole pages; it may refuse, and then nothing changes. For Linux alone."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    madvise(place[0], place[1] - place[0], advice)


def is_in_memory(address: int) -> bool:
    """Return whether the page of an address of this process was touched and is in memory; True where nobody tells."""
    mincore = getattr(ctypes.CDLL(None), "mincore", None) if sys.platform == "linux" else None
    if mincore is None:
        return True
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    state = ctypes.create_string_buffer(1)
    return bool(mincore(address // mmap.PAGESIZE * mmap.PAGESIZE, 1, state)) or bool(state.raw[0] & 1)


def give_back_freed() -> None:
    """Give memory that was freed back to the system; glibc keeps it for later, other C libraries are left alone."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
