"""A request on its way through a batcher."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import count

import numpy as np

from chunkkv import profiling
from chunkkv.answer import Answer
from chunkkv.batching.limits import BatchingLimits
from chunkkv.batching.listener import Listener
from chunkkv.batching.seats import Needs, Seat
from chunkkv.cache_layout import Slots
from chunkkv.contexts import Context, context_of_row
from chunkkv.errors import ChunkKVError, EngineRunError, RequestTimeoutError
from chunkkv.executors.interface import PrefillResult, PrefillRun
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
        self.prefilled: PrefillResult | None = None
        self.followers: deque[AnswerJob] = deque()  # other answers to the prompt, which wait until it is prefilled
        self._follows: AnswerJob | None = None
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
        is_in_work = self.seat is not None or (self._follows is not None and self._follows.seat is not None)
        if not is_in_work and spent > self._limits.queue_timeout_s:
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
        self.run, (self.prefilled,) = None, results
        self.seat.settle(self._kept())
        return self.begin_answer(session)

    def begin_answer(self, session: ChunkKVSession) -> StreamEvent:
        """Return the first token; the prompt is prefilled, and its row decodes from now on."""
        assert self.prefilled is not None and self.seat is not None, "the prompt is prefilled first"
        self.answer = session.start_answer(self.seat.row, self.request, self.sampling, self.seat.capacity)
        return self.answer.begin(self.prefilled, self.submitted)

    def begin_beside(self, holder: AnswerJob, take: Callable[[Needs], Seat], session: ChunkKVSession) -> StreamEvent:
        """Return the first token, in a seat with a copy of the prompt that `holder` has in its row; follow it no more.

        `take` gives the seat.
        """
        assert holder.seat is not None and holder.prefilled is not None, "the prompt is prefilled first"
        self._follows, self.seat = None, take(self.needs)
        self.prefilled = _without_times(holder.prefilled)
        self.seat.copy_from(holder.seat, self._kept())
        return self.begin_answer(session)

    def next_follower(self) -> AnswerJob | None:
        """Return the follower that takes over seat, prefill and the other followers, None where nobody follows.

        One that follows itself does so no more.
        """
        if self._follows is not None:
            self._follows.followers.remove(self)
            self._follows = None
        if not self.followers:
            return None
        heir = self.followers.popleft()
        heir._follows, heir.needs, heir.seat, heir.run = None, self.needs, self.seat, self.run
        heir.prefilled = None if self.prefilled is None else _without_times(self.prefilled)
        heir._followed_by(self.part_with_followers())
        self.seat = None
        return heir

    def part_with_followers(self) -> list[AnswerJob]:
        """Return the followers, which follow nobody now."""
        followers, self.followers = list(self.followers), deque()
        for follower in followers:
            follower._follows = None
        return followers

    def _followed_by(self, followers: Sequence[AnswerJob]) -> None:
        self.followers = deque(followers)
        for follower in followers:
            follower._follows = self

    def _kept(self) -> Slots:
        """Return the slots that the prompt fills, one number for each length class."""
        return (self.prefilled and self.prefilled.kept_lengths) or self.request.class_lengths

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


def share_prompt(jobs: Sequence[AnswerJob]) -> list[AnswerJob]:
    """Return the first of several answers to one prompt, which prefills it; the others follow it.

    A follower takes a seat of its own, with a copy of the prompt, as soon as the prompt is prefilled and there is room.
    Where the first one ends before, the next takes its place: in the queue, in the middle of the prefill, or in its
    row, whose first slots still hold the prompt.
    """
    first, *others = jobs
    first._followed_by(others)
    for job in others:
        job.needs = replace(job.needs, whole_tokens=0)  # the prompt is never in memory as a whole for them
    return [first]


def _without_times(prefilled: PrefillResult) -> PrefillResult:
    """Return a prefill as it is for an answer that did not have to wait for one of its own."""
    return replace(prefilled, prefill_s=0.0, compress_s=0.0, scratch_cache_bytes=0)


def as_chunkkv_error(error: Exception) -> ChunkKVError:
    """Return what a failing engine, driver or library means for a request."""
    if isinstance(error, ChunkKVError):
        return error
    return EngineRunError(f"the engine failed: {type(error).__name__}: {error}")
