"""A progress bar on standard error, where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Moves a bar on."""

    def __call__(self, count: int = 1) -> None:
        """Count `count` more prompts as done."""


BeginStep = Callable[[str, int], Advance]  # called with the name of a step and its number of prompts


@contextmanager
def progress_bars(quiet: bool) -> Iterator[BeginStep]:
    """Yield a function that adds the bar of a step; with `quiet`, and where no terminal listens, nothing is shown."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet or not sys.stderr.isatty()) as progress:

        def begin(name: str, total: int) -> Advance:
            bar = progress.add_task(name, total=total)

            def advance(count: int = 1) -> None:
                progress.advance(bar, count)

            return advance

        yield begin
