"""A prefill in one piece, for engines that cannot stop between two blocks."""

from __future__ import annotations

from collections.abc import Callable

from chunkkv.executors.interface import PrefillResult


class WholePrefillRun:
    """The PrefillRun of an engine that prefills in one piece.

    Parameters
    ----------
    tokens : int
        Tokens of the prompts together.
    run : callable
        Prefills them.
    """

    def __init__(self, tokens: int, run: Callable[[], list[PrefillResult]]) -> None:
        self.tokens_left, self._run = tokens, run

    def step(self) -> list[PrefillResult]:
        """Prefill; see PrefillRun.step."""
        self.tokens_left = 0
        return self._run()
