"""Whether the thread that owns the engine still gets work done."""

from __future__ import annotations

import time

from chunkkv.errors import EngineRunError

STALL_TIMEOUT_S = 600.0  # a block or step that takes longer will not end


class Heartbeat:
    """Beats at the end of each piece of work, and rests where there is none."""

    def __init__(self) -> None:
        self._beat_at: float | None = None  # None while it rests

    def beat(self) -> None:
        """A piece of work has ended."""
        self._beat_at = time.monotonic()

    def wake(self) -> None:
        """Work has come, if there was none."""
        if self._beat_at is None:
            self.beat()

    def rest(self) -> None:
        """There is nothing to do."""
        self._beat_at = None

    def check(self, stall_timeout_s: float) -> None:
        """Raise EngineRunError where no piece of work has ended for so many seconds although there is work."""
        beat_at = self._beat_at  # another thread may change it
        if beat_at is not None and (silent_s := time.monotonic() - beat_at) > stall_timeout_s:
            raise EngineRunError(
                f"the engine is stuck: no block of a prompt and no step has ended for {silent_s:.0f} s"
            )
