"""A trace: ranges and GPU kernels of a run, which range encloses which, and the JSON file that holds it all."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from chunkkv.engine.json_files import read_object
from chunkkv.errors import ProfileError
from chunkkv.files import write_whole
from chunkkv.profiling import RecordedRange

Row = TypeVar("Row")
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
    """What was measured.

    Parameters
    ----------
    ranges : tuple[Range, ...]
        The named ranges, in any order.
    kernels : tuple[Kernel, ...], default ()
        The GPU kernels; empty where none were traced.
    notes : tuple[str, ...], default ()
        What is missing from the trace, one sentence each.
    about : dict[str, Any]
        Where the trace comes from: the tool and its version.
    """

    ranges: tuple[Range, ...]
    kernels: tuple[Kernel, ...] = ()
    notes: tuple[str, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the trace as JSON."""
        values = {
            "format": _FORMAT,
            "version": _VERSION,
            "about": self.about,
            "notes": self.notes,
            "ranges": self.ranges,
            "kernels": self.kernels,
        }
        write_whole(path, json.dumps(values) + "\n")

    @classmethod
    def read(cls, path: Path) -> Trace:
        """Read what write() wrote; raises ProfileError for anything else."""
        values = read_object(path, ProfileError)
        if values.get("format") != _FORMAT or values.get("version") != _VERSION:
            raise ProfileError(f"{path} is no trace of this version; give a file that chunkkv profile wrote")
        ranges = _rows(values.get("ranges"), Range, (str, int, int, int, bool, int, int))
        kernels = _rows(values.get("kernels"), Kernel, (str, int, int, int, int, int))
        notes, about = values.get("notes"), values.get("about")
        if (
            ranges is None
            or kernels is None
            or not isinstance(notes, list)
            or not all(isinstance(note, str) for note in notes)
            or not isinstance(about, dict)
        ):
            raise ProfileError(f"{path} is damaged; profile again")
        return cls(ranges, kernels, tuple(notes), about)


def from_recorder(ranges: Iterable[RecordedRange], **about: Any) -> Trace:
    """Return the trace of the ranges that a recorder kept; the keyword arguments say where they come from."""
    return Trace(
        tuple(
            Range(
                recorded.name,
                recorded.start_ns,
                recorded.end_ns,
                recorded.thread,
                recorded.nested,
                recorded.request_id,
                recorded.kept_tokens,
            )
            for recorded in ranges
        ),
        about=about,
    )


def _rows(value: Any, kind: Callable[..., Row], types: tuple[type, ...]) -> tuple[Row, ...] | None:
    """Return a list of JSON rows as `kind`, or None where one has other types or a time that makes no sense."""
    if not isinstance(value, list):
        return None
    for row in value:
        if not isinstance(row, list) or len(row) != len(types):
            return None
        if any(type(entry) is not expected for entry, expected in zip(row, types, strict=True)):  # a bool is no int
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
    for index, stage in enumerate(trace.ranges):
        if stage.nested:
            threads[stage.thread].append((stage.start_ns, -stage.end_ns, False, index))
    for index, kernel in enumerate(trace.kernels):
        threads[kernel.thread].append((kernel.launch_start_ns, -kernel.launch_end_ns, True, index))
    parents: list[int | None] = [None] * len(trace.ranges)
    launchers: list[int | None] = [None] * len(trace.kernels)
    for events in threads.values():
        open_ranges: list[int] = []  # a stack, the innermost last; ends are negative so that outer ranges sort first
        for start, negative_end, is_kernel, index in sorted(events):
            while open_ranges and trace.ranges[open_ranges[-1]].end_ns < start:
                open_ranges.pop()
            # What crosses the end of the innermost open range belongs to the range around both.
            around = next((at for at in reversed(open_ranges) if trace.ranges[at].end_ns >= -negative_end), None)
            if is_kernel:
                launchers[index] = around
            else:
                parents[index] = around
                open_ranges.append(index)
    return Tree(tuple(parents), tuple(launchers))
