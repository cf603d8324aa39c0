"""What TensorRT logs when something fails, and the object that everything else of it is made with."""

from __future__ import annotations

from collections import deque
from typing import Any

from chunkkv.errors import BackendUnavailableError
from chunkkv.gpu.tensorrt_library import TensorRT


class ErrorLog:
    """Keeps the last errors that TensorRT logs: its functions return nothing on failure and say the reason there."""

    def __init__(self) -> None:
        self.errors: deque[str] = deque(maxlen=50)

    def logger(self, trt: Any) -> Any:
        """Return an ILogger of the Python package `trt` that writes here.

        It must outlive every object made with it.
        """
        severity, errors = trt.ILogger.Severity, self.errors

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, level: Any, text: str) -> None:
                if level in (severity.ERROR, severity.INTERNAL_ERROR):
                    errors.append(" ".join(text.split()))

        return Logger()

    def explanation(self) -> str:
        """Return ": " and the kept errors in one line, or "" if there are none; to be added to a message."""
        return ": " + "; ".join(self.errors) if self.errors else ""


def start(trt: TensorRT, kind: Any, logger: Any, errors: ErrorLog) -> Any:
    """Make the first object of a TensorRT: kind(logger), where `kind` is its Builder or its Runtime.

    Raises BackendUnavailableError where it cannot be made, as on a machine without a GPU.
    """
    try:
        return kind(logger)
    except (TypeError, RuntimeError):  # the bindings raise these where the library returned nothing
        reason = errors.explanation() or ": is there an NVIDIA GPU?"
        raise BackendUnavailableError(f"{trt.title} cannot start{reason}") from None
