"""Which prompt a batcher works on next, and which waiting request may begin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

PIECE_TOKENS = 512  # prompts are compared by pieces of this size, and short ones share the time of one piece
OLDEST_EVERY = 3  # of so many pieces one goes to the oldest prompt, so that short ones cannot starve a long one
MOST_OVERTAKEN = 32  # so many later requests may begin before one that does not fit; then everybody waits for it


class Prompt(Protocol):
    """A request whose prompt is not done."""

    @property
    def number(self) -> int:
        """Ascends in the order in which requests came."""

    @property
    def tokens_left(self) -> int:
        """Prompt tokens that are not prefilled."""


class Waiting(Prompt, Protocol):
    """A request that has not begun."""

    overtaken: int


PromptT = TypeVar("PromptT", bound=Prompt)
WaitingT = TypeVar("WaitingT", bound=Waiting)


class Turns:
    """Shares the pieces between prompts: the shortest first, and every third piece the oldest."""

    def __init__(self) -> None:
        self._pieces = 0

    def choose(self, prompts: Sequence[PromptT]) -> PromptT | None:
        """Return the prompt that gets the next piece; None where there is none."""
        if not prompts:
            return None
        self._pieces += 1
        if self._pieces % OLDEST_EVERY == 0:
            return min(prompts, key=lambda prompt: prompt.number)
        return min(prompts, key=lambda prompt: (-(-prompt.tokens_left // PIECE_TOKENS), prompt.number))


def admissible(waiting: Sequence[WaitingT], fits: Callable[[WaitingT], bool]) -> list[WaitingT]:
    """Return the waiting requests, oldest first, that may begin now.

    One that does not fit lets later ones pass, but only MOST_OVERTAKEN of them.
    """
    able = []
    for request in waiting:
        if fits(request):
            able.append(request)
        elif request.overtaken >= MOST_OVERTAKEN:
            break
    return able


def count_overtaken(waiting: Sequence[WaitingT], begun: WaitingT, fits: Callable[[WaitingT], bool]) -> None:
    """Count that `begun`, which has not taken its room yet, overtakes the older requests that do not fit."""
    for request in waiting:
        if request.number < begun.number and not fits(request):
            request.overtaken += 1
