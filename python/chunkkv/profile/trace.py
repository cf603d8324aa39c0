"""A trace: ranges and GPU kernels of a run, which range encloses which, and the JSON file that holds it all."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from chunkkv.engine.fields import Fields
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
        fields = Fields(read_object(path, ProfileError), str(path), ProfileError, "the file is damaged, profile again")
        if fields.get("format") != _FORMAT or fields.get("version") != _VERSION:
            raise ProfileError(f"{path} is no trace of this version; give a file that chunkkv profile wrote")
        ranges = tuple(Range(*row) for row in fields.rows("ranges", (str, int, int, int, bool, int, int)))
        kernels = tuple(Kernel(*row) for row in fields.rows("kernels", (str, int, int, int, int, int)))
        events: tuple[Range | Kernel, ...] = (*ranges, *kernels)
        for event in events:
            if not 0 <= event.start_ns <= event.end_ns < MAX_TIME:
                span = f"{event.start_ns} to {event.end_ns}"
                raise ProfileError(f"{path}: {event.name!r} runs from {span}; the file is damaged, profile again")
        return cls(ranges, kernels, fields.texts("notes"), dict(fields.section("about").values))


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
