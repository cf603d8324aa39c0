"""SQLite files in the shape of nsys export's, in the schemas that real exports of 2022 and 2024 had."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROCESS = 7 << 24
SCHEMAS = ("2.9.1", "3.13.2")
_NVTX = 'start INT, "end" INT, eventType INT, rangeId INT, category INT, color INT, text TEXT, globalTid INT'
_NVTX += ", endGlobalTid INT, textId INT, domainId INT, uint64Value INT, int64Value INT, doubleValue REAL"
_NVTX += ", uint32Value INT, int32Value INT, floatValue REAL"
_KERNEL = 'start INT, "end" INT, deviceId INT, contextId INT, streamId INT, correlationId INT, globalPid INT'
_KERNEL += ", demangledName INT, shortName INT, mangledName INT, gridX INT, blockX INT"
_RUNTIME = 'start INT, "end" INT, eventClass INT, globalTid INT, correlationId INT, nameId INT, returnValue INT'
_RUNTIME += ", callchainId INT"


@dataclass(frozen=True)
class Event:
    """A range: push/pop, or start/end where not `nested`; `registered` text is stored by number."""

    name: str
    start: int
    end: int | None
    thread: int = 42
    nested: bool = True
    payload: int | None = None
    registered: bool = False
    domain: str = "chunkkv"
    process: int = PROCESS


@dataclass(frozen=True)
class Launch:
    """A kernel, and the call that launched it: 5 ns in the runtime, 3 of them in the driver."""

    name: str
    start: int
    end: int
    call: int
    thread: int = 42
    process: int = PROCESS
    number: int = 0
    has_call: bool = True


EXAMPLE_EVENTS = (
    Event("prefill", 10, 1000, payload=7 * 10**9 + 399),
    Event("score", 20, 100, registered=True),
    Event("compact", 200, 300),
    Event("request", 5, 5000, thread=43, nested=False, payload=7 * 10**9 + 399),
    Event("sample", 1000, 1005, payload=7 * 10**9 + 399),
    Event("decode", 2000, 2400, payload=7 * 10**9 + 399),
    Event("sample", 2500, 2505, payload=7 * 10**9 + 399),
)
EXAMPLE_LAUNCHES = (
    Launch("score_kernel", 500, 600, 30, number=1),
    Launch("compact_kernel", 700, 750, 210, number=2),
    Launch("attention_kernel", 800, 810, 400, number=3),
)


def write_export(
    path: Path,
    events: Sequence[Event] = EXAMPLE_EVENTS,
    launches: Sequence[Launch] = EXAMPLE_LAUNCHES,
    schema: str = SCHEMAS[1],
    without: Sequence[str] = (),
) -> Path:
    """Write the file; tables with nothing in them, and those in `without`, are left out, as nsys does."""
    texts: dict[str, int] = {}

    def number_of(text: str) -> int:
        return texts.setdefault(text, len(texts) + 100)

    domains = {}
    for event in events:
        if event.domain:
            domains.setdefault((event.process, event.domain), len(domains) + 1)
    nvtx: list[dict[str, Any]] = [
        {"start": 1, "eventType": 75, "text": name, "globalTid": process + 1, "domainId": number}
        for (process, name), number in domains.items()
    ]
    for event in events:
        row = {"start": event.start, "end": event.end, "eventType": 59 if event.nested else 60}
        row |= {"globalTid": event.process + event.thread, "int64Value": event.payload}
        row |= {"domainId": domains.get((event.process, event.domain), 0)}
        row |= {"textId": number_of(event.name)} if event.registered else {"text": event.name}
        nvtx.append(row)
    kernels, calls = [], []
    for launch in launches:
        name = number_of(launch.name)
        row = {"start": launch.start, "end": launch.end, "correlationId": launch.number, "shortName": name}
        kernels.append(row | {"globalPid": launch.process, "demangledName": name, "deviceId": 0, "streamId": 7})
        row = {"globalTid": launch.process + launch.thread, "correlationId": launch.number, "nameId": name}
        if launch.has_call:
            calls.append(row | {"start": launch.call, "end": launch.call + 5, "eventClass": 0})
            calls.append(row | {"start": launch.call + 1, "end": launch.call + 4, "eventClass": 1})
    calls.append({"globalTid": PROCESS + 42, "correlationId": 10**6, "start": 1, "end": 2})  # a call without a kernel
    meta = "EXPORT_META_DATA" if schema == "2.9.1" else "META_DATA_EXPORT"
    tables: dict[str, tuple[str, list[dict[str, Any]]]] = {
        "NVTX_EVENTS": (_NVTX + (", jsonTextId INT, jsonText TEXT" if schema == "3.13.2" else ""), nvtx),
        "CUPTI_ACTIVITY_KIND_KERNEL": (_KERNEL + (", greenContextId INT" if schema == "3.13.2" else ""), kernels),
        "CUPTI_ACTIVITY_KIND_RUNTIME": (_RUNTIME, calls),
        "StringIds": ("id INT, value TEXT", [{"id": number, "value": text} for text, number in texts.items()]),
        meta: ("name TEXT, value TEXT", [{"name": "EXPORT_SCHEMA_VERSION", "value": schema}]),
    }
    with closing(sqlite3.connect(path)) as connection, connection:
        for table, (columns, rows) in tables.items():
            if rows and table not in without:
                _write_table(connection, table, columns, rows)
    return path


def _write_table(connection: sqlite3.Connection, table: str, columns: str, rows: list[dict[str, Any]]) -> None:
    connection.execute(f"CREATE TABLE {table} ({columns})")
    for row in rows:
        names, places = ", ".join(f'"{name}"' for name in row), ", ".join("?" * len(row))
        connection.execute(f"INSERT INTO {table} ({names}) VALUES ({places})", list(row.values()))
