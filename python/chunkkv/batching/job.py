"""A request on its way through a batcher."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count

import numpy as np

from chunkkv import profiling
from chunkkv.answer import Answer
from chunkkv.batching.limits import BatchingLimits
from chunkkv.batching.listener import Listener
from chunkkv.batching.seats import Needs, Seat
from chunkkv.contexts import Context, context_of_row
from chunkkv.errors import RequestTimeoutError
from chunkkv.executors.interface import PrefillRun
from chunkkv.requests import Request
from chunkkv.results import StreamEvent
from chunkkv.sampling import SamplingParams
from chunkkv.session import ChunkKVSession

_next_number = count(1).__next__


class AnswerJob:
    """A request that waits, then is prefilled, then has a row of a cache with an answer that grows.

    Parameters
    ----------
    request : Request
        The checked prompt.
    sampling : SamplingParams
        How its tokens are chosen.
    listener : Listener
        Who waits for the answer.
    limits : BatchingLimits
        Bounds the time it may take.
    on_context : callable or None, default None
        Is told what the row holds at the end.
    """

    def __init__(
        self,
        request: Request,
        sampling: SamplingParams,
        listener: Listener,
        limits: BatchingLimits,
        on_context: Callable[[Context], None] | None = None,
    ) -> None:
        self.request, self.sampling, self.listener, self._limits = request, sampling, listener, limits
        self._on_context = on_context
        self.number = _next_number()
        self.needs = Needs.of(request, sampling.max_new_tokens)
        self.submitted = time.perf_counter()
        self.overtaken = 0  # by later requests, because there was no room for this one
        self.seat: Seat | None = None
        self.run: PrefillRun | None = None
        self.answer: Answer | None = None
        self.new_tokens = 0
        self.client_gone = False
        self._life = ExitStack()  # a span in profilers, from the wait to the last token
        self._life.enter_context(profiling.range_of("request", (request,), nested=False))

    def leave(self) -> None:
        """Give the seat back; the request is over."""
        self.run = None
        if self.seat is not None:
            self.seat.leave()
            self.seat = None
        self._life.close()

    @property
    def tokens_left(self) -> int:
        """Prompt tokens that are not prefilled."""
        return self.request.read_tokens if self.run is None else self.run.tokens_left

    @property
    def open_answer(self) -> Answer:
        """The answer of a request that has begun."""
        assert self.answer is not None, "the request still waits"
        return self.answer

    def is_cancelled(self) -> bool:
        """Return whether nobody wants the answer any more; a listener that fails has lost its client."""
        try:
            self.client_gone = self.client_gone or self.listener.is_cancelled()
        except Exception:
            self.client_gone = True
        return self.client_gone

    def timeout(self, now: float | None = None) -> RequestTimeoutError | None:
        """Return what to tell where the request has taken too long; `now` is a perf_counter(), None asks for it."""
        spent = (time.perf_counter() if now is None else now) - self.submitted
        if spent > self._limits.request_timeout_s:
            return RequestTimeoutError(
                f"the request took longer than {self._limits.request_timeout_s:g} s ({self.new_tokens} tokens made): "
                "ask for fewer tokens, or raise the server's request_timeout_s"
            )
        if self.seat is None and spent > self._limits.queue_timeout_s:
            return RequestTimeoutError(
                f"the request waited longer than {self._limits.queue_timeout_s:g} s for its turn; ask again later"
            )
        return None

    def begin(self, seat: Seat) -> None:
        """Take a seat, and start the prefill there."""
        self.seat = seat
        self.run = seat.prefill(self.request)

    def prefill_piece(self, session: ChunkKVSession, is_whole: bool) -> StreamEvent | None:
        """Run a piece of the prompt, or with `is_whole` all that is left; returns the first token at the end."""
        assert self.run is not None and self.seat is not None, "begin() comes first"
        results = self.run.step()
        while results is None and is_whole:
            results = self.run.step()
        if results is None:
            return None
        self.run = None
        self.seat.settle(results[0].kept_lengths or self.request.class_lengths)
        self.answer = session.start_answer(self.seat.row, self.request, self.sampling, self.seat.capacity)
        return self.answer.begin(results[0], self.submitted)

    def tell_context(self, session: ChunkKVSession) -> None:
        """Tell who asked what the row holds; the answer has ended and its seat is still taken."""
        if self._on_context is None or self.seat is None or not self.open_answer.tokens:
            return
        answer = self.open_answer
        ids = np.concatenate([self.request.prompt_ids, np.array(answer.tokens[:-1], np.int64)])
        row = self.seat.batch.row_cache(self.seat.row)
        self._on_context(context_of_row(session, row, ids, answer.next_slots))

    def move_to(self, row: int) -> None:
        """Take another row of the batch, to which the cache was moved."""
        assert self.seat is not None, "only a request with a row moves"
        self.seat.row = self.open_answer.row = row
