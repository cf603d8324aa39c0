"""The results file of a run: JSON lines, a header and one record per example, appended so that a run can be resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chunkkv.engine.fields import Fields
from chunkkv.errors import ConfigError
from chunkkv.files import errors_name_target

RECORDS_FILE = "records.jsonl"
FORMAT, FORMAT_VERSION = "chunkkv-evaluation", 1

_REMEDY = "remove this line and those below it to go on from there"

Record = dict[str, Any]


def append_record(path: Path, record: Record) -> None:
    """Append one line to the file and wait until it is on the disk."""
    with errors_name_target(path, path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_records(path: Path, data: bytes | None = None) -> list[Record]:
    """Return the header and the records of a results file, or of `data`, its bytes.

    Raises ConfigError for anything else.
    """
    try:
        lines = (path.read_bytes() if data is None else data).decode("utf-8").splitlines()
    except (ValueError, OSError) as problem:
        raise ConfigError(f"{path} cannot be read as results of an evaluation: {problem}") from None
    records = [_parsed(line, f"{path} line {number}", number) for number, line in enumerate(lines, 1)]
    known = not records or (isinstance(records[0], dict) and records[0].get("format") == FORMAT)
    if not known or not all(isinstance(record, dict) for record in records):
        raise ConfigError(f"{path} is no file of results; give another output_dir")
    if records and records[0].get("format_version") != FORMAT_VERSION:
        raise ConfigError(f"{path}: format_version is {records[0].get('format_version')!r}, not {FORMAT_VERSION}")
    return records


def _parsed(line: str, where: str, number: int) -> Record:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as problem:
        remedy = "give another output_dir" if number == 1 else f"the record is damaged, {_REMEDY}"
        raise ConfigError(f"{where} cannot be read as results of an evaluation: {problem}; {remedy}") from None


def resume_records(path: Path, header: Record) -> list[Record]:
    """Prepare the file for the run that `header` describes, and return the records that are in it already.

    Makes the folder, removes a last line that was cut off, and writes the header where there is none. Raises
    ConfigError where the file holds the results of another run.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.read_bytes() if path.exists() else b""
    complete = data[: data.rfind(b"\n") + 1]
    records = read_records(path, complete)
    if len(records) == 1:  # a header alone: the run never began, so its flags may change
        records, complete = [], b""
    header = json.loads(json.dumps(header))  # as it reads back from the file
    if records and records[0] != header:
        changed = sorted(name for name in header if records[0].get(name) != header[name])
        raise ConfigError(
            f"output_dir {path.parent} holds the results of another run, with other {', '.join(changed)}: "
            "give another directory, or the same flags to go on"
        )
    if complete != data:
        with path.open("r+b") as file:
            file.truncate(len(complete))
    if not records:
        append_record(path, header)
    return records[1:]


def check_records(path: Path, records: Sequence[Record], keys: Sequence[Mapping[str, Any]]) -> None:
    """Raise ConfigError unless the records are undamaged and of the examples that `keys` describe, in their order."""
    for number, (record, key) in enumerate(zip(records, keys, strict=False), 2):  # line 1 is the header
        _check_record(Fields(record, f"{path} line {number}", ConfigError, f"the record is damaged, {_REMEDY}"))
        if any(record.get(name) != value for name, value in key.items()):
            raise ConfigError(f"{path} line {number} is not that of {dict(key)}, which was to come: {_REMEDY}")
    if len(records) > len(keys):
        raise ConfigError(f"{path} holds {len(records)} records for {len(keys)} examples; remove the file")


def _check_record(fields: Fields) -> None:
    """Raise the error of `fields` where a record lacks what tables are made of."""
    fields.integer("tokens", low=0)
    pieces = fields.items("pieces")
    for outcome in fields.sections("outcomes"):
        outcome.text("policy")
        outcome.integer("keep", low=0)
        outcome.integer("kept", low=0)
        for name in ("right", "through"):
            if not pieces or len(outcome.items(name)) != len(pieces):
                raise outcome.error(name, f"give one entry for each of the {len(pieces)} pieces of the answer")
