"""Progress on standard error: bars where that is a terminal, now and then a line where it is not."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from chunkkv.executors.interface import PrefillProgress

LINE_INTERVAL_S = 10.0  # between two lines of one step
PATIENCE_S = 2.0  # what is done earlier prints no line
_BAR_PATIENCE_S, _BAR_TOKENS = 0.3, 256  # a prompt that is shorter and done earlier gets no bar


class Advance(Protocol):
    """Moves a bar on."""

    def __call__(self, count: int = 1) -> None:
        """Count `count` more prompts as done."""


BeginStep = Callable[[str, int], Advance]  # called with the name of a step and its number of prompts


@contextmanager
def progress_bars(quiet: bool) -> Iterator[BeginStep]:
    """Yield a function that begins a step, shown with an estimate of the time that is left; with `quiet`, nothing is.

    A terminal gets a bar; anything else a line after some seconds, then every ten seconds, and one at the end.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda name, total: _ignore if quiet else _StepLines(name, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def begin(name: str, total: int) -> Advance:
            bar = progress.add_task(name, total=total)

            def advance(count: int = 1) -> None:
                progress.advance(bar, count)

            return advance

        yield begin


@contextmanager
def prefill_progress(quiet: bool) -> Iterator[PrefillProgress]:
    """Yield what shows the prefill of a prompt; with `quiet`, nothing is shown.

    A terminal gets a bar, which goes when the prompt is done. Anything else gets lines, where it takes some seconds.
    """
    if quiet or not sys.stderr.isatty():
        yield (lambda done, total: None) if quiet else _Lines("prefill", "tokens").show
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("prefill"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeRemainingColumn())
    began, bars = time.monotonic(), Progress(*columns, console=Console(stderr=True), transient=True)
    bar = bars.add_task("prefill", total=None)

    def show(done: int, total: int) -> None:
        bars.update(bar, completed=done, total=total)
        if done >= total:
            bars.stop()  # before the first word of the answer
        elif total >= _BAR_TOKENS or time.monotonic() - began > _BAR_PATIENCE_S:
            bars.start()

    try:
        yield show
    finally:
        bars.stop()


def _ignore(count: int = 1) -> None:
    pass


class _StepLines:
    """The Advance of a step that is shown in lines."""

    def __init__(self, name: str, total: int) -> None:
        self._total, self._done = total, 0
        self._lines = _Lines(name, "prompts")

    def __call__(self, count: int = 1) -> None:
        self._done += count
        self._lines.show(self._done, self._total)


class _Lines:
    """Prints lines on how far something is: the first after PATIENCE_S, then one every LINE_INTERVAL_S, one at its end.

    What is done when it begins, as in an evaluation that goes on, does not count for the estimate.
    """

    def __init__(self, name: str, unit: str) -> None:
        self._name, self._unit, self._began = name, unit, time.monotonic()
        self._next_line, self._done_before = self._began + PATIENCE_S, -1

    def show(self, done: int, total: int) -> None:
        """Print how far it is, unless it has just begun or a line was printed shortly before."""
        now = time.monotonic()
        if self._done_before < 0:
            self._done_before = done if now - self._began < _BAR_PATIENCE_S else 0
        is_end = done >= total and self._next_line > self._began + PATIENCE_S
        if now < self._next_line and not is_end:
            return
        self._next_line = now + LINE_INTERVAL_S
        spent, counted = now - self._began, done - self._done_before
        left = f", about {_clock(spent / counted * (total - done))} left" if counted > 0 and done < total else ""
        print(f"{self._name}: {done:,} of {total:,} {self._unit}, {_clock(spent)}{left}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
