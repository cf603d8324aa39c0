"""Weights on huge pages: a decode step reads all of them, and with pages of 4 KB it waits for address translation.

Engines allocate their weights themselves, so the system is asked after a graph was loaded. It may refuse: then nothing
changes. Only Linux has such calls.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chunkkv.executors.mappings import (
    MADV_COLLAPSE,
    MADV_HUGEPAGE,
    MAPS,
    Mapping,
    advise,
    own_mappings,
    with_amounts,
    without,
)

HUGE_PAGE_BYTES = 2 << 20
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Moving a mapping fills its holes. Stacks of threads and reserved memory are nearly empty, weights are full.
_LEAST_RESIDENT = 0.9


@contextmanager
def on_huge_pages() -> Iterator[None]:
    """Move the large blocks of memory that the body allocates and fills to huge pages, once it has ended.

    Does nothing where the system has no huge pages, or where they are switched off.
    """
    is_possible = _system_gives_them()
    before = [] if not is_possible else [mapping.place for mapping in own_mappings(MAPS) if is_anonymous(mapping)]
    yield
    if not is_possible:
        return

    def may_move(mapping: Mapping) -> bool:
        is_large = mapping.size >= HUGE_PAGE_BYTES
        grown = without(mapping.place, before) if is_large and is_anonymous(mapping) else []
        return any(stop - start >= HUGE_PAGE_BYTES for start, stop in grown)

    for mapping in with_amounts(may_move):
        if (mapping.resident or 0) >= _LEAST_RESIDENT * mapping.size:
            for start, stop in without(mapping.place, before):
                _move(start, stop)


def is_anonymous(mapping: Mapping) -> bool:
    """Return whether a mapping is writable memory that belongs to no file."""
    return mapping.access == "rw-p" and not mapping.is_file and mapping.name in ("", "[heap]")


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
    if start < stop:
        for advice in (MADV_HUGEPAGE, MADV_COLLAPSE):
            advise((start, stop), advice)
