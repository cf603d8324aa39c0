"""A request on its way through a batcher."""

from __future__ import annotations

import time
from contextlib import ExitStack

from chunkkv import profiling
from chunkkv.answer import Answer
from chunkkv.batching.cache_pool import CacheRow
from chunkkv.batching.limits import BatchingLimits
from chunkkv.batching.listener import Listener
from chunkkv.errors import RequestTimeoutError
from chunkkv.requests import Request
from chunkkv.results import StreamEvent
from chunkkv.sampling import SamplingParams
from chunkkv.session import ChunkKVSession


class AnswerJob:
    """A request that waits, then has a row of a cache with an answer that grows.

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
    """

    def __init__(self, request: Request, sampling: SamplingParams, listener: Listener, limits: BatchingLimits) -> None:
        self.request, self.sampling, self.listener, self._limits = request, sampling, listener, limits
        self.needed_slots = request.slots(sampling.max_new_tokens)
        self.submitted = time.perf_counter()
        self.answer: Answer | None = None
        self.cache_row: CacheRow | None = None
        self.new_tokens = 0
        self.client_gone = False
        self._life = ExitStack()  # a span in profilers, from the wait to the last token
        self._life.enter_context(profiling.range_of("request", (request,), nested=False))

    def leave(self) -> None:
        """Give the row back; the request is over."""
        if self.cache_row is not None:
            self.cache_row.bucket.free(self.cache_row.row)
            self.cache_row = None
        self._life.close()

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
        if self.answer is None and spent > self._limits.queue_timeout_s:
            return RequestTimeoutError(
                f"the request waited longer than {self._limits.queue_timeout_s:g} s for its turn; ask again later"
            )
        return None

    def begin(self, session: ChunkKVSession, cache_row: CacheRow) -> None:
        """Take a row of a cache."""
        self.cache_row = cache_row
        self.answer = session.start_answer(cache_row.row, self.request, self.sampling, cache_row.bucket.capacity)

    def prefill(self, session: ChunkKVSession, cache_row: CacheRow) -> StreamEvent:
        """Run the prompt and return the first token."""
        cache = cache_row.bucket.cache.rows(cache_row.row, 1)
        (prefilled,) = session.executor.prefiller().run([self.request], cache, CancelOrTimeout(self))
        return self.open_answer.begin(prefilled, self.submitted)


class CancelOrTimeout:
    """The CancelSignal of a job: set once its listener has gone or its time is over."""

    def __init__(self, job: AnswerJob) -> None:
        self._job = job

    def is_set(self) -> bool:
        """Return whether to stop; prefill asks between two blocks."""
        return self._job.is_cancelled() or self._job.timeout() is not None
