"""Structured logs: one JSON object per line on standard error."""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
import threading
from typing import Any

LEVELS = ("debug", "info", "warning", "error")
_lock = threading.Lock()


class Log:
    """Writes events of at least `level`; `fields` are in every line."""

    def __init__(self, level: str = "info", **fields: Any) -> None:
        self._least, self._fields = LEVELS.index(level), fields

    def __call__(self, level: str, event: str, **fields: Any) -> None:
        """Write one line; a log that cannot be written stops nothing."""
        if LEVELS.index(level) < self._least:
            return
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "level": level, "event": event, **self._fields, **fields}, default=str)
        with _lock, contextlib.suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)
