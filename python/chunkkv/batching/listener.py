"""Who waits for an answer: the callbacks of a batcher, and a listener that hands events to another thread."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Protocol

from chunkkv.errors import ChunkKVError
from chunkkv.requests import Request
from chunkkv.results import StreamEvent


class Listener(Protocol):
    """Who waits for an answer. Callbacks run on the batcher's thread and must not block."""

    def on_accepted(self, request: Request) -> None:
        """Take the checked request, before it waits; called from the thread that submits."""

    def on_event(self, event: StreamEvent) -> None:
        """Take new text; the last event carries the result in `finished`."""

    def on_error(self, error: ChunkKVError) -> None:
        """Take the end of an answer that failed; nothing follows."""

    def is_cancelled(self) -> bool:
        """Return whether nobody wants the answer any more; asked before every token."""


class QueueListener:
    """Hands events to the thread that iterates over events()."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[StreamEvent | ChunkKVError] = queue.SimpleQueue()
        self._cancelled = False

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits to be taken from events()."""
        return self._events.empty()

    def cancel(self) -> None:
        """Tell the batcher that nobody wants the answer any more."""
        self._cancelled = True

    def on_accepted(self, request: Request) -> None:
        """See Listener."""

    def on_event(self, event: StreamEvent) -> None:
        """See Listener."""
        self._events.put(event)

    def on_error(self, error: ChunkKVError) -> None:
        """See Listener."""
        self._events.put(error)

    def is_cancelled(self) -> bool:
        """See Listener."""
        return self._cancelled

    def events(self) -> Iterator[StreamEvent]:
        """Yield events until the last one; raises the error that ended the answer. Closing it cancels the answer."""
        try:
            while True:
                event = self._events.get()
                if isinstance(event, ChunkKVError):
                    raise event
                yield event
                if event.finished is not None:
                    return
        finally:
            self.cancel()
