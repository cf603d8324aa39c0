"""Structured logs through the standard library: loggers under `chunkkv`, one JSON object per line on standard error.

Servers log an event's name, with its fields in `extra={"fields": {...}}`; fields() makes that
argument. Who hosts them can configure the loggers as any others: configure() then leaves them alone.

Whoever logs never waits for the reader of the log: a thread writes the lines. Where the reader is so slow that
WAITING_LINES lines wait, further ones are dropped, and a line says how many.
"""

from __future__ import annotations

import atexit
import datetime
import json
import logging
import queue
import sys
import threading
import time
from typing import Any

WAITING_LINES = 1000
AT_EXIT_S = 1.0  # for the lines that are not written when the process ends
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
    level : str, default "info"
        Least important level that is written, one of LEVELS.
    **common : object
        Fields of every line, such as the model's name.
    """
    logger = logging.getLogger(_ROOT)
    if logger.hasHandlers():
        return
    handler = WriterHandler()
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


class WriterHandler(logging.Handler):
    """Writes lines to standard error from a thread of its own; one that cannot be written is dropped.

    Parameters
    ----------
    waiting_lines : lines that may wait for the reader. Default: WAITING_LINES.
    """

    def __init__(self, waiting_lines: int = WAITING_LINES) -> None:
        super().__init__()
        self._lines: queue.Queue[str] = queue.Queue(waiting_lines)
        self._dropped = 0
        threading.Thread(target=self._run, name="chunkkv-log", daemon=True).start()
        atexit.register(self.flush)

    def emit(self, record: logging.LogRecord) -> None:
        """Hand a line to the thread, or count it as dropped; called with the handler's lock held."""
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._dropped += 1
        except Exception:  # a value that cannot be formatted stops nothing
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore that a line could not be made."""

    def flush(self) -> None:
        """Wait until all lines are written, for at most AT_EXIT_S seconds."""
        until = time.monotonic() + AT_EXIT_S
        while self._lines.unfinished_tasks and time.monotonic() < until:
            time.sleep(0.005)

    def _run(self) -> None:
        while True:
            line = self._lines.get()
            _write(line)
            if self._dropped and self._lines.empty():
                self.acquire()
                dropped, self._dropped = self._dropped, 0
                self.release()
                missed = logging.makeLogRecord({"levelno": logging.WARNING, "levelname": "WARNING"})
                missed.msg, missed.fields = "log_lines_dropped", {"count": dropped}
                _write(self.format(missed))
            self._lines.task_done()


def _write(line: str) -> None:
    try:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):  # a full disk, a closed pipe or file, no standard error at all
        return
