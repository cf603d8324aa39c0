"""Shows how far a build has come: a bar on a terminal, one line per stage elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich import progress as bars
from rich.console import Console
from rich.text import Text

from chunkkv.command_line import LOG_LEVELS


class Progress:
    """Shows the stages of a build on standard error; a context manager.

    Parameters
    ----------
    log_level : str, default "info"
        One of LOG_LEVELS. "error" shows nothing, "warning" only warnings, all others stages, notes and warnings.
    console : Console, optional
        Where to write; default: standard error. A terminal gets a bar for each stage, anything else one line with its
        time.
    """

    def __init__(self, log_level: str = "info", console: Console | None = None) -> None:
        self._level = LOG_LEVELS.index(log_level)
        self._console = console or Console(stderr=True, highlight=False)
        shown = self._level >= LOG_LEVELS.index("info")
        self._bar: bars.Progress | None = None
        if shown and self._console.is_terminal:
            self._bar = bars.Progress(
                bars.TextColumn("{task.description:<10}"),
                bars.BarColumn(),
                _Amount(),
                bars.TimeElapsedColumn(),
                console=self._console,
            )
        self._prints_lines = shown and self._bar is None
        self._name, self._began = "", 0.0
        self._task: bars.TaskID | None = None

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._end_stage()
        if self._bar is not None:
            self._bar.stop()

    def stage(self, name: str, total: int, unit: str = "") -> None:
        """Begin a stage, which ends the one before it.

        Parameters
        ----------
        name : str
            What the user reads.
        total : int
            Number of its steps, as far as they are known; see extend.
        unit : str, default ""
            "bytes" where the steps are bytes.
        """
        self._end_stage()
        self._name, self._began = name, time.perf_counter()
        if self._bar is not None:
            self._task = self._bar.add_task(name, total=total, unit=unit)

    def extend(self, steps: int) -> None:
        """Add `steps` to the current stage, whose number of steps was not known when it began."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=(self._bar.tasks[self._task].total or 0) + steps)

    def advance(self, steps: int = 1) -> None:
        """Count `steps` of the current stage as done."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, steps)

    def info(self, text: str) -> None:
        """Print a line at log level "info" and those that show more."""
        if self._level >= LOG_LEVELS.index("info"):
            self._console.print(text, markup=False, soft_wrap=True)

    def warning(self, text: str) -> None:
        """Print a warning, unless the log level is "error"."""
        if self._level >= LOG_LEVELS.index("warning"):
            self._console.print(f"warning: {text}", markup=False, soft_wrap=True)

    def _end_stage(self) -> None:
        if not self._name:
            return
        if self._bar is not None and self._task is not None:
            total = self._bar.tasks[self._task].total
            self._bar.update(self._task, completed=total or 1, total=total or 1)
        if self._prints_lines:
            self.info(f"{self._name:<10} {time.perf_counter() - self._began:6.1f} s")
        self._name, self._task = "", None


class _Amount(bars.ProgressColumn):
    """The column that says how much of a stage is done: a count, or bytes with a binary unit."""

    def render(self, task: bars.Task) -> Text:
        done, total = int(task.completed), int(task.total or 0)
        if task.fields.get("unit") == "bytes":
            return Text(f"{human_bytes(done)}/{human_bytes(total)}")
        return Text(f"{done}/{total}")


def human_bytes(count: int) -> str:
    """Return `count` bytes in the largest binary unit that leaves at least 1, with one decimal."""
    value, units = float(count), iter(("B", "KiB", "MiB", "GiB"))
    for unit in units:
        if value < 1024:
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
