"""What TensorRT logs when something fails, and the object that everything else of it is made with."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import Any

from chunkkv.errors import BackendUnavailableError
from chunkkv.gpu.tensorrt_library import TensorRT

_LOGGERS: dict[Any, Any] = {}  # by package; see ErrorLog.logger
_LISTENERS: list[weakref.ref[ErrorLog]] = []
_LOCK = threading.Lock()  # of both; TensorRT logs from several threads


class ErrorLog:
    """Keeps the last errors that TensorRT logs: its functions return nothing on failure and say the reason there."""

    def __init__(self) -> None:
        self.errors: deque[str] = deque(maxlen=50)

    def logger(self, trt: Any) -> Any:
        """Return the ILogger of the Python package `trt`, whose errors are kept here from now on.

        There is one for each package, which lives until the process ends: TensorRT keeps the address of the first
        logger that it is given, even when the objects made with it are gone, and ignores those of later objects. Where
        several logs are in use each gets all errors.
        """
        with _LOCK:
            _LISTENERS[:] = [reference for reference in _LISTENERS if reference() not in (None, self)]
            _LISTENERS.append(weakref.ref(self))
            if trt not in _LOGGERS:
                _LOGGERS[trt] = _new_logger(trt)
            return _LOGGERS[trt]

    def explanation(self, without: str | None = None) -> str:
        """Return ": " and the kept errors in one line, or "" if there are none; to be added to a message.

        Errors that begin with `without` are left out.
        """
        told = [error for error in self.errors if without is None or not error.startswith(without)]
        return ": " + "; ".join(told) if told else ""


def _new_logger(trt: Any) -> Any:
    severity = trt.ILogger.Severity

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, level: Any, text: str) -> None:
            if level not in (severity.ERROR, severity.INTERNAL_ERROR):
                return
            with _LOCK:
                listeners = [listener for reference in _LISTENERS if (listener := reference()) is not None]
            for listener in listeners:
                listener.errors.append(" ".join(text.split()))

    return Logger()


def start(trt: TensorRT, kind: Any, logger: Any, errors: ErrorLog) -> Any:
    """Make the first object of a TensorRT: kind(logger), where `kind` is its Builder or its Runtime.

    Raises BackendUnavailableError where it cannot be made, as on a machine without a GPU.
    """
    try:
        return kind(logger)
    except (TypeError, RuntimeError):  # the bindings raise these where the library returned nothing
        reason = errors.explanation() or ": is there an NVIDIA GPU?"
        raise BackendUnavailableError(f"{trt.title} cannot start{reason}") from None
