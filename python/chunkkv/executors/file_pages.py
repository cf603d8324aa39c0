"""Pages of a mapped file of weights, taken out of the process's memory when they are not needed for long.

An engine maps its weights and packs most of them into memory of its own. It keeps the mapping of a tensor that is also
read as it is, such as an embedding table: packing reads all of it, a prompt few rows. Pages that are taken out stay in
the system's cache of files, so reading them again costs a page fault. Only Linux tells what is mapped where; elsewhere
nothing is taken out.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from chunkkv.executors.mappings import MADV_DONTNEED, MAPS, Mapping, Range, advise, own_mappings, with_amounts, without

_LEAST_BYTES = 1 << 20  # smaller tensors are not worth a system call for each block
# Else a mapping might be that of a graph which another thread loads, and be released after that graph has gone.
_ONE_LOADS = threading.Lock()


class FilePages:
    """The pages of the large tensors that one engine has mapped from files, which must live as long as this does."""

    def __init__(self) -> None:
        self.places: tuple[Range, ...] = ()

    def release(self) -> None:
        """Take them out of the process's memory; whoever reads them again gets them from the file."""
        _release(self.places)


@contextmanager
def file_pages(folder: Path) -> Iterator[FilePages]:
    """Find where the body maps files of a folder for good, and release their pages once it has ended.

    Small tensors are released that once, and not by FilePages. Nothing is where no tensor is large.

    One thread at a time: every graph that maps its weights is loaded in such a body.

    Parameters
    ----------
    folder : Path
        Where the files lie.
    """
    pages = FilePages()
    if sys.platform != "linux":
        yield pages
        return
    inside = f"{folder.resolve()}/"
    with _ONE_LOADS:
        before = [mapping.place for mapping in own_mappings(MAPS) if mapping.name.startswith(inside)]
        yield pages
        # The system joins neighbours to one mapping, so one that is new may have a part that was there.
        new = [
            place
            for mapping in _mapped_from(inside)
            if can_be_released(mapping)
            for place in without(mapping.place, before)
        ]
        pages.places = tuple(place for place in new if place[1] - place[0] >= _LEAST_BYTES)
        _release(new)


def can_be_released(mapping: Mapping) -> bool:
    """Return whether all of a mapping's pages are as the file has them, so that taking them out loses nothing.

    A private mapping that was written to has pages of its own.
    """
    return mapping.is_file and mapping.own_copies == 0


def _mapped_from(folder: str) -> list[Mapping]:
    """Return the mappings of files in a folder, with their amounts; none where all are small."""
    found = [mapping for mapping in own_mappings(MAPS) if mapping.name.startswith(folder)]
    if all(mapping.size < _LEAST_BYTES for mapping in found):
        return []
    return with_amounts(lambda one: one.name.startswith(folder))


def _release(places: Sequence[Range]) -> None:
    for place in places:
        advise(place, MADV_DONTNEED)
