"""Structured logs through the standard library: loggers under `chunkkv`, one JSON object per line on standard error.

The modules of chunkkv.triton log an event's name, with its fields in `extra={"fields": {...}}`; fields() makes that
argument. Who hosts them can configure the loggers as any others: configure() then leaves them alone.
"""

from __future__ import annotations

import datetime
import json
import logging
from typing import Any

LEVELS = ("debug", "info", "warning", "error")
_ROOT = "chunkkv"


def fields(**values: object) -> dict[str, Any]:
    """Return the argument `extra` of a logging call that gives a line these fields."""
    return {"fields": values}


def configure(level: str = "info", **common: object) -> None:
    """Write the lines of every logger under `chunkkv` to standard error as JSON.

    Does nothing where a handler for them is there already, because then the host has configured logging itself.

    Parameters
    ----------
    level : least important level that is written: one of LEVELS.
    common : fields of every line, such as the model's name.
    """
    logger = logging.getLogger(_ROOT)
    if logger.hasHandlers():
        return
    handler = _Handler()
    handler.setFormatter(JsonFormatter(**common))
    logger.addHandler(handler)
    logger.setLevel(level.upper())


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object: time, level, event, the fields of every line, the fields of this one.

    Parameters
    ----------
    common : fields of every line.
    """

    def __init__(self, **common: object) -> None:
        super().__init__()
        self._common = common

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; a value that JSON does not have is written as its text."""
        moment = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        line = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **self._common,
            **record.__dict__.get("fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Handler(logging.StreamHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore that a line could not be written, to a closed pipe for example: that must not stop a server."""
