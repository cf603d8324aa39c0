"""Reads JSON objects and text files, with errors that name the file and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chunkkv.errors import ChunkKVError


def read_text(path: Path, error: type[ChunkKVError]) -> str:
    """Return the UTF-8 text of `path` without a byte-order mark; raises `error` where it cannot be read as that."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror or problem}") from None
    except UnicodeDecodeError as problem:
        raise error(f"{path} is not UTF-8 text (byte {problem.start}); save it as UTF-8") from None


def read_object(path: Path, error: type[ChunkKVError]) -> dict[str, Any]:
    """Return the JSON object in `path`; raises `error` where it cannot be read or is something else."""
    text = read_text(path, error)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise error(f"{path} is no valid JSON: {problem}") from None
    if not isinstance(value, dict):
        raise error(f"{path} holds a JSON {type(value).__name__}; it must be an object")
    return value
