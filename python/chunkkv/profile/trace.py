"""A trace: ranges and GPU kernels of a run, which range encloses which, and the JSON file that holds it all."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from chunkkv.engine.json_files import read_object
from chunkkv.errors import ProfileError
from chunkkv.files import write_whole
from chunkkv.profiling import RecordedRange

_FORMAT, _VERSION = "chunkkv-profile", 1
MAX_TIME = 2**62


class Range(NamedTuple):
    """A range of one thread (`nested`) or of its process; times are nanoseconds of one clock."""

    name: str
    start_ns: int
    end_ns: int
    thread: int
    nested: bool
    request_id: int
    kept_tokens: int


class Kernel(NamedTuple):
    """A GPU kernel: when it ran, and when and where the call ran that launched it (`thread` 0: unknown)."""

    name: str
    start_ns: int
    end_ns: int
    launch_start_ns: int
    launch_end_ns: int
    thread: int


@dataclass(frozen=True)
class Trace:
    """What was measured; `about` says on what, `notes` what is missing from it."""

    ranges: tuple[Range, ...]
    kernels: tuple[Kernel, ...] = ()
    notes: tuple[str, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the trace as JSON."""
        found = {"format": _FORMAT, "version": _VERSION, "about": self.about, "notes": self.notes}
        found |= {"ranges": self.ranges, "kernels": self.kernels}
        write_json(path, found)

    @classmethod
    def read(cls, path: Path) -> Trace:
        """Read what write() wrote; raises ProfileError for anything else."""
        found = read_object(path, ProfileError)
        if found.get("format") != _FORMAT or found.get("version") != _VERSION:
            raise ProfileError(f"{path} is no trace of this version; give a file that chunkkv profile wrote")
        ranges = _rows(found.get("ranges"), Range, (str, int, int, int, bool, int, int))
        kernels = _rows(found.get("kernels"), Kernel, (str, int, int, int, int, int))
        notes, about = found.get("notes"), found.get("about")
        sound = isinstance(notes, list) and all(isinstance(note, str) for note in notes) and isinstance(about, dict)
        if ranges is None or kernels is None or not sound:
            raise ProfileError(f"{path} is damaged; profile again")
        return cls(ranges, kernels, tuple(notes), about)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_whole(path, json.dumps(value) + "\n")


def from_recorder(ranges: Iterable[RecordedRange], **about: Any) -> Trace:
    """Return the trace of what a recorder saw."""
    return Trace(
        tuple(
            Range(one.name, one.start_ns, one.end_ns, one.thread, one.nested, one.request_id, one.kept_tokens)
            for one in ranges
        ),
        about=about,
    )


def _rows(value: Any, kind: type, types: tuple[type, ...]) -> tuple | None:
    """Return a list of JSON rows as `kind`, or None where one has other types or a time that makes no sense."""
    if not isinstance(value, list):
        return None
    for row in value:
        if not isinstance(row, list) or len(row) != len(types):
            return None
        if any(type(entry) is not wanted for entry, wanted in zip(row, types, strict=True)):
            return None
        if not 0 <= row[1] <= row[2] < MAX_TIME:
            return None
    return tuple(kind(*row) for row in value)


@dataclass(frozen=True)
class Tree:
    """Who encloses whom: indices into ranges, None where there is nothing.

    `parents` has one entry per range, `launchers` one per kernel: the innermost nested range of the launching thread
    around the launch. So every kernel belongs to one range, however many are open.
    """

    parents: tuple[int | None, ...]
    launchers: tuple[int | None, ...]

    def path(self, index: int | None) -> Iterable[int]:
        """Yield a range and those around it, from the inside out."""
        while index is not None:
            yield index
            index = self.parents[index]


def enclosing(trace: Trace) -> Tree:
    """Find for every nested range and every kernel launch the innermost range around it, in one sweep per thread."""
    threads: dict[int, list[tuple[int, int, bool, int]]] = defaultdict(list)
    for index, one in enumerate(trace.ranges):
        if one.nested:
            threads[one.thread].append((one.start_ns, -one.end_ns, False, index))
    for index, kernel in enumerate(trace.kernels):
        threads[kernel.thread].append((kernel.launch_start_ns, -kernel.launch_end_ns, True, index))
    parents: list[int | None] = [None] * len(trace.ranges)
    launchers: list[int | None] = [None] * len(trace.kernels)
    for events in threads.values():
        open_ranges: list[int] = []
        for start, negative_end, is_kernel, index in sorted(events):
            while open_ranges and trace.ranges[open_ranges[-1]].end_ns < start:
                open_ranges.pop()
            found = next((at for at in reversed(open_ranges) if trace.ranges[at].end_ns >= -negative_end), None)
            if is_kernel:
                launchers[index] = found
            else:
                parents[index] = found
                open_ranges.append(index)
    return Tree(tuple(parents), tuple(launchers))
