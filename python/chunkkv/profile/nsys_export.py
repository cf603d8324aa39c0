"""Reads what `nsys export --type sqlite` wrote: NVTX ranges, and GPU kernels with the calls that launched them.

Tables are written only where there is something to put into them, and columns differ between versions.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

from chunkkv.errors import ProfileError
from chunkkv.profile.trace import MAX_TIME, Kernel, Range, Trace
from chunkkv.profiling import DOMAIN, split_payload

_MAGIC = b"SQLite format 3\0"
_RANGES, _KERNELS, _CALLS = "NVTX_EVENTS", "CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_RUNTIME"
_STRINGS, _META = "StringIds", ("META_DATA_EXPORT", "EXPORT_META_DATA")  # the second name is that of 2022
_PUSH_POP, _START_END, _DOMAIN_CREATE = 59, 60, 75
_PAYLOADS = ("int64Value", "uint64Value", "int32Value", "uint32Value")
_NEEDED = {
    _RANGES: ("start", "end", "eventType", "globalTid", "text"),
    _KERNELS: ("start", "end", "correlationId", "globalPid", "shortName"),
    _CALLS: ("start", "end", "correlationId", "globalTid"),
    _STRINGS: ("id", "value"),
}
_PROCESS_BITS = 24  # a globalTid is a globalPid with the thread in its lowest bits


def read_export(path: Path) -> Trace:
    """Return the ranges of the domain "chunkkv" and all kernels; raises ProfileError for a file that has no ranges."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
    except OSError as error:
        raise ProfileError(f"{path} cannot be read: {error.strerror}") from None
    if magic != _MAGIC:
        raise ProfileError(f"{path} is no SQLite file; make one with nsys export --type sqlite REPORT.nsys-rep")
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro", uri=True)) as connection:
            connection.execute("PRAGMA trusted_schema = OFF")
            return _Export(connection, path).trace()
    except (sqlite3.Error, ValueError, OverflowError) as error:
        raise ProfileError(f"{path} is damaged ({error}); export the report again") from None


class _Export:
    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection, self._path = connection, path
        self._notes: list[str] = []
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        known = (*_NEEDED, *_META)
        # A newer nsys may give a table a version; saying that nothing was traced would be wrong then.
        self._unknown = {
            table: sorted(name for name in names if name not in known and name.upper().startswith(f"{table}_"))
            for table in known
        }
        self._columns = {
            name: {row[1] for row in connection.execute(f"PRAGMA table_info({name})")}
            for name in names
            if name in known
        }
        for name, needed in _NEEDED.items():
            if name in self._columns and (absent := [column for column in needed if column not in self._columns[name]]):
                raise ProfileError(f"{path}: table {name} has no column {absent[0]!r}; this schema is not known")
        self._strings: dict[int, str] = {}
        if _STRINGS in self._columns:
            self._strings = dict(connection.execute(f"SELECT id, value FROM {_STRINGS}"))

    def trace(self) -> Trace:
        """Return everything; what is missing is noted."""
        if _RANGES not in self._columns:
            like = self._unknown_tables(_RANGES)
            raise ProfileError(
                f"{self._path} holds no NVTX ranges (there is no table {_RANGES}{like}): run nsys profile with "
                "--trace=cuda,nvtx, and install the extra 'profile' where chunkkv runs"
            )
        kernels = tuple(self._kernels())
        ranges = self._ranges(max((kernel.end_ns for kernel in kernels), default=0))
        return Trace(ranges, kernels, tuple(self._notes), {"tool": "nsys", "schema": self._schema_version()})

    def _unknown_tables(self, table: str) -> str:
        """Return which tables of a like name the export has, to be said behind what is missing; "" for none."""
        unknown = self._unknown[table]
        return (
            f", or they are in {', '.join(unknown)}, which is not known: export with an older nsys" if unknown else ""
        )

    def _schema_version(self) -> str:
        for table in _META:
            if {"name", "value"} <= self._columns.get(table, set()):
                query = f"SELECT value FROM {table} WHERE name = 'EXPORT_SCHEMA_VERSION'"
                for (value,) in self._connection.execute(query):
                    return str(value)
        return "unknown"

    def _name(self, text: Any, identity: Any) -> str:
        """Return the text of an event; a registered string leaves the text empty and names it by number."""
        name = self._strings.get(identity, "") if text is None else text
        return name if isinstance(name, str) else str(name)

    def _ranges(self, last_ns: int) -> tuple[Range, ...]:
        """Return the ranges; those that had not ended are cut at the last time in the trace."""
        columns = self._columns[_RANGES]
        text_id, domain = (name if name in columns else "NULL" for name in ("textId", "domainId"))
        payload = ", ".join(name for name in _PAYLOADS if name in columns) or "NULL"
        rows = self._connection.execute(
            f'SELECT start, "end", eventType, globalTid, text, {text_id}, {domain}, coalesce({payload}, 0) '
            f"FROM {_RANGES} WHERE eventType IN ({_PUSH_POP}, {_START_END}, {_DOMAIN_CREATE})"
        ).fetchall()
        domains = {
            (self._count(tid) >> _PROCESS_BITS, number): self._name(text, identity)
            for _, _, kind, tid, text, identity, number, _ in rows
            if kind == _DOMAIN_CREATE
        }
        ranges = [row for row in rows if row[2] != _DOMAIN_CREATE]
        range_domains = [domains.get((self._count(row[3]) >> _PROCESS_BITS, row[6]), "") for row in ranges]
        ours = [row for row, name in zip(ranges, range_domains, strict=True) if name == DOMAIN]
        if not ours:
            others = ", ".join(sorted({name or "(default)" for name in range_domains})) or "none"
            raise ProfileError(
                f"{self._path} has no range of the domain {DOMAIN!r} (domains found: {others}); install the extra "
                "'profile' where chunkkv runs, and profile again"
            )
        last_ns = max(last_ns, *(self._count(time or 0) for row in ours for time in row[:2]))
        if unfinished := sum(row[1] is None for row in ours):
            self._notes.append(f"{unfinished} ranges had not ended when the trace did; they are cut there")
        return tuple(self._range(row, last_ns) for row in ours)

    def _range(self, row: tuple, last_ns: int) -> Range:
        start, end, kind, tid, text, identity, _, value = row
        end = last_ns if end is None else end
        self._check_times(start, end)
        request_id, kept_tokens = split_payload(self._count(value))
        return Range(self._name(text, identity), start, end, tid, kind == _PUSH_POP, request_id, kept_tokens)

    def _kernels(self) -> Iterator[Kernel]:
        if _KERNELS not in self._columns:
            reason = "no GPU kernels were traced" + self._unknown_tables(_KERNELS)
            self._notes.append(f"{reason}: times are those of the host alone")
            return
        calls = self._calls()
        unknown = 0
        query = f'SELECT start, "end", correlationId, globalPid, shortName FROM {_KERNELS} ORDER BY start'
        for start, end, correlation, process, name in self._connection.execute(query):
            self._check_times(start, end)
            call = calls.get((self._count(process) >> _PROCESS_BITS, correlation))
            unknown += call is None
            yield Kernel(self._name(None, name), start, end, *(call or (0, 0, 0)))
        if unknown:
            self._notes.append(f"{unknown} kernels have no launching call in the export: they belong to no stage")

    def _calls(self) -> dict[tuple[int, int], tuple[int, int, int]]:
        """Return start, end and thread of the call behind a process's correlation number.

        A launch may have a row of the runtime and one of the driver, both of the same number: it is one call.
        """
        if _CALLS not in self._columns:
            if unknown := self._unknown_tables(_CALLS):
                self._notes.append(f"no launching calls were read{unknown}")
            return {}
        rows = self._connection.execute(
            f'SELECT min(start), max("end"), min(globalTid), correlationId FROM {_CALLS} WHERE correlationId IN '
            f"(SELECT correlationId FROM {_KERNELS}) GROUP BY globalTid >> {_PROCESS_BITS}, correlationId"
        )
        calls = {}
        for start, end, tid, correlation in rows:
            self._check_times(start, end)
            calls[self._count(tid) >> _PROCESS_BITS, correlation] = (start, end, tid)
        return calls

    def _count(self, value: Any) -> int:
        if not isinstance(value, int) or value < 0:
            raise ProfileError(f"{self._path} is damaged ({value!r} where a number belongs); export the report again")
        return value

    def _check_times(self, start: Any, end: Any) -> None:
        if not self._count(start) <= self._count(end) < MAX_TIME:
            raise ProfileError(f"{self._path} is damaged (an event from {start} to {end}); export the report again")
