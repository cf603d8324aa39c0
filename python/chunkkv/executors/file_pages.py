"""Pages of a mapped file of weights, taken out of the process's memory when they are not needed for long.

An engine maps its weights and packs most of them into memory of its own. It keeps the mapping of a tensor that is also
read as it is, such as an embedding table: packing reads all of it, a prompt few rows. Pages that are taken out stay in
the system's cache of files, so reading them again costs a page fault. Only Linux tells what is mapped where; elsewhere
nothing is taken out.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chunkkv.executors.mappings import MADV_DONTNEED, MAPS, Mapping, Range, advise, own_mappings, with_amounts, without

_LEAST_BYTES = 1 << 20  # smaller tensors are not worth a system call
# Else a mapping might be that of a graph which another thread loads, and be released after that graph has gone.
_ONE_LOADS = threading.Lock()


class FilePages:
    """The pages of the files that one engine has mapped, which must live as long as this does."""

    def __init__(self) -> None:
        self.places: tuple[Range, ...] = ()

    def release(self) -> None:
        """Take them out of the process's memory; whoever reads them again gets them from the file."""
        for place in self.places:
            advise(place, MADV_DONTNEED)


@contextmanager
def file_pages(folder: Path) -> Iterator[FilePages]:
    """Find where the body maps files of a folder for good, and release their pages once it has ended.

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
        large = with_amounts(lambda one: one.name.startswith(inside) and one.size >= _LEAST_BYTES)
        new = filter(can_be_released, large)
        # The system joins neighbours to one mapping, so one that is new may have a part that was there.
        pages.places = tuple(place for mapping in new for place in without(mapping.place, before))
        pages.release()


def can_be_released(mapping: Mapping) -> bool:
    """Return whether a mapping's pages are large and all as the file has them, so that taking them out loses nothing.

    A private mapping that was written to has pages of its own.
    """
    return mapping.is_file and mapping.size >= _LEAST_BYTES and mapping.own_copies == 0
