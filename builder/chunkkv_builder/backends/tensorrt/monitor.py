"""Shows how far TensorRT is with an engine, and stops it on Ctrl-C."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from chunkkv.command_line import INTERRUPTED
from chunkkv_builder.progress import Progress

_Result = TypeVar("_Result")
_POLL_S = 0.1
GRACE_S = 5.0  # TensorRT is asked to stop at its next step; one that takes longer is left behind


def run_interruptibly(function: Callable[[], _Result], interrupt: Callable[[BaseException], None]) -> _Result:
    """Return what `function` returns; Ctrl-C and SIGTERM come through while it runs.

    Python runs signal handlers between two steps of the main thread only, so a long call into C++ has to run on
    another thread. On a signal `interrupt` is called with its exception, `function` has a few seconds to end, and the
    exception is raised. A function that does not end in time runs on until the process exits, which the caller must
    let happen.
    """
    results: list[_Result] = []
    errors: list[BaseException] = []
    has_ended = threading.Event()  # not Thread.join: before Python 3.13 it takes an interrupted thread for ended

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:  # handed over to the thread that waits
            errors.append(error)
        finally:
            has_ended.set()

    thread = threading.Thread(target=run, name="chunkkv-build", daemon=True)
    try:
        thread.start()
        while not has_ended.wait(_POLL_S):
            pass
    except BaseException as error:
        interrupt(error)
        if not has_ended.wait(GRACE_S):
            atexit.register(_exit_at_once, error)
        raise
    if errors:
        raise errors[0]
    return results[0]


def _exit_at_once(error: BaseException) -> None:
    """End the process with the exit code for `error`, without the interpreter's own end.

    That would stop the thread inside TensorRT when it next calls Python, which ends the process with SIGABRT.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    code = error.code if isinstance(error, SystemExit) else INTERRUPTED
    os._exit(code if isinstance(code, int) else 1)


def progress_monitor(trt: Any, name: str, progress: Progress) -> Any:
    """Return a tensorrt.IProgressMonitor that shows a build as one stage, steps of all its phases counted together.

    Parameters
    ----------
    trt : the Python package of the TensorRT.
    name : what the stage is called.
    progress : where it is shown.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted: BaseException | None = None
            self._lock = threading.Lock()  # TensorRT calls from several threads
            self._open: dict[str, int] = {}
            progress.stage(name, 0)

        def interrupt(self, error: BaseException) -> None:
            """Stop the build at its next step because of `error`."""
            self.interrupted = error

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            def start() -> None:
                self._open[phase_name] = num_steps
                progress.extend(num_steps)

            self._safely(start)

        def step_complete(self, phase_name: str, step: int) -> bool:
            def count() -> None:
                if self._open.get(phase_name, 0) > 0:
                    self._open[phase_name] -= 1
                    progress.advance()

            self._safely(count)
            return self.interrupted is None

        def phase_finish(self, phase_name: str) -> None:
            self._safely(lambda: progress.advance(self._open.pop(phase_name, 0)))  # with the steps that were skipped

        def _safely(self, action: Callable[[], None]) -> None:
            try:
                with self._lock:
                    action()
            except BaseException as error:  # Ctrl-C must not cross TensorRT's frames: it is raised after the build
                self.interrupted = error

    return Monitor()
