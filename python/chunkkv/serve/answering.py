"""Hands the events of a request's answers from the batcher's thread to the event loop that writes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from chunkkv.errors import ChunkKVError
from chunkkv.requests import Request
from chunkkv.results import StreamEvent


@dataclass(frozen=True)
class AnswerPiece:
    """An event of one of the answers.

    Parameters
    ----------
    number : int
        Which answer, from 0.
    event : StreamEvent
        New text and tokens.
    """

    number: int
    event: StreamEvent


class AnswerGroup:
    """The answers of one request.

    Parameters
    ----------
    loop : asyncio.AbstractEventLoop
        Where they are written.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: asyncio.Queue[AnswerPiece | ChunkKVError] = asyncio.Queue()
        self._cancelled = False
        self._open = 0
        self.requests: list[Request] = []

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody wants the answers any more."""
        return self._cancelled

    def cancel(self) -> None:
        """End all answers within a token; any thread may call it."""
        self._cancelled = True

    def listener(self) -> AnswerDoor:
        """Return the listener of the next answer."""
        self._open += 1
        return AnswerDoor(self, self._open - 1)

    def put(self, item: AnswerPiece | ChunkKVError) -> None:
        """Take an event from the batcher's thread."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, item)

    async def pieces(self) -> AsyncIterator[AnswerPiece]:
        """Yield the events of all answers as they come; raises the error of the first one that fails."""
        try:
            while self._open:
                item = await self._events.get()
                if isinstance(item, ChunkKVError):
                    raise item
                if item.event.finished is not None:
                    self._open -= 1
                yield item
        finally:
            self.cancel()


class AnswerDoor:
    """The batcher's listener of one answer.

    Parameters
    ----------
    group : AnswerGroup
        The answers of the request.
    number : int
        Which of them it is.
    """

    def __init__(self, group: AnswerGroup, number: int) -> None:
        self._group, self._number = group, number

    def on_accepted(self, request: Request) -> None:
        """Keep the checked request."""
        self._group.requests.append(request)

    def on_event(self, event: StreamEvent) -> None:
        """Pass it on."""
        self._group.put(AnswerPiece(self._number, event))

    def on_error(self, error: ChunkKVError) -> None:
        """Pass it on."""
        self._group.put(error)

    def is_cancelled(self) -> bool:
        """Return whether the client has gone."""
        return self._group.is_cancelled
