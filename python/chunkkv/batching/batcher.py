"""Continuous batching: requests join and leave while others decode.

One thread owns the engine. It prefills one prompt at a time, oldest first, and between two prefills every open answer
gets a token, so neither a long queue nor a long prompt stops the others for more than one prompt.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Protocol

from chunkkv import profiling
from chunkkv.batching.lanes import Lane, Lanes, Seat, room_for
from chunkkv.errors import ChunkKVError, ConfigError, EngineRunError, OverloadedError, RequestError, RequestTimeoutError
from chunkkv.requests import Prompt, Request
from chunkkv.results import StreamEvent
from chunkkv.sampling import SamplingParams
from chunkkv.session import Answer, ChunkKVSession

PROBE_WAIT_S = 0.5


@dataclass(frozen=True)
class BatchingLimits:
    """What a batcher takes on; raises ConfigError for a value out of range.

    `slots` answers grow at once, `waiting` requests more may queue. `queue_timeout_s` bounds the wait for a slot,
    `request_timeout_s` wait and answer together. `kv_bytes` bounds the memory of all caches (None = as needed).
    """

    slots: int = 8
    waiting: int = 64
    queue_timeout_s: float = 60.0
    request_timeout_s: float = 600.0
    kv_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("slots", 1), ("waiting", 1), ("queue_timeout_s", 0), ("request_timeout_s", 0)):
            value = getattr(self, name)
            if not value >= least or (least == 0 and not 0 < value < math.inf):
                rule = f"a whole number of at least {least}" if least else "a number of seconds above 0"
                raise ConfigError(f"{name} is {value}; give {rule}")
        if self.kv_bytes is not None and self.kv_bytes < 1:
            raise ConfigError(f"kv_bytes is {self.kv_bytes}; give a number of bytes of at least 1, or none")


class Listener(Protocol):
    """Who waits for an answer; called from the batcher's thread, so none of it may block."""

    def on_accepted(self, request: Request) -> None:
        """Take the checked request, before it waits; called from the thread that submits."""

    def on_event(self, event: StreamEvent) -> None:
        """Take new text; the last event carries the result in `finished`."""

    def on_error(self, error: ChunkKVError) -> None:
        """Take the end of an answer that failed; nothing follows."""

    def is_cancelled(self) -> bool:
        """Return whether nobody wants the answer any more; asked before every token."""


@dataclass(frozen=True)
class Load:
    """What a batcher is doing: answers that grow, requests that wait, and bytes of KV caches used and allocated."""

    active: int
    waiting: int
    kv_bytes_used: int
    kv_bytes_allocated: int


class ContinuousBatcher:
    """Serves requests on one session from one thread of its own; call close() at the end, or use it in `with`."""

    def __init__(self, session: ChunkKVSession, limits: BatchingLimits | None = None) -> None:
        limits = BatchingLimits() if limits is None else limits
        if limits.slots > session.limits.max_batch_size:
            raise ConfigError(
                f"slots is {limits.slots}; this engine takes at most {session.limits.max_batch_size} rows: "
                "give fewer slots, or build with a larger --max_batch_size"
            )
        self.session, self.limits = session, limits
        kv_bytes = room_for(session, limits.kv_bytes)
        self._lanes = Lanes(session.executor, limits.slots, session.limits.max_seq_len, kv_bytes)
        self._queue: deque[_Job] = deque()
        self._open: list[_Job] = []
        self._wake = threading.Condition()
        self._closing: ChunkKVError | None = None
        self._draining = False
        self._thread = threading.Thread(target=self._run, name="chunkkv-batcher", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        listener: Listener,
        *,
        keep_ratio: float | None = None,
        budget_tokens: int | None = None,
        probe: bool = False,
    ) -> None:
        """Queue one prompt; its tokens are those that session.generate gives for the same seed.

        A `probe` asks whether answers still grow: a full queue does not refuse it, and where it finds no slot it ends
        with RequestTimeoutError after PROBE_WAIT_S and the next step; only a batcher that is stuck leaves it waiting.

        Raises RequestError or EngineMismatchError for what the engine cannot serve, OverloadedError where the queue is
        full or the batcher closes; a request that was queued always ends with a last event or an error.
        """
        (request,) = self.session.requests([prompt], sampling, keep_ratio, budget_tokens)
        needed = request.kept_tokens + sampling.max_new_tokens
        if not self._lanes.could_hold(needed):
            raise RequestError(
                f"{needed} tokens do not fit kv_bytes {self.limits.kv_bytes}: ask for fewer new tokens or a smaller "
                "budget, or give the server more memory"
            )
        listener.on_accepted(request)
        limits = replace(self.limits, queue_timeout_s=PROBE_WAIT_S) if probe else self.limits
        job = _Job(request, sampling, listener, limits)
        with self._wake:
            if self._closing or self._draining:
                raise self._closing or OverloadedError("the server is going down; ask again later")
            if not probe and len(self._open) + len(self._queue) >= self.limits.slots + self.limits.waiting:
                raise OverloadedError(
                    f"the queue is full: {len(self._open)} answers in work, {len(self._queue)} requests waiting; "
                    "ask again later"
                )
            self._queue.append(job)
            self._wake.notify()

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        keep_ratio: float | None = None,
        budget_tokens: int | None = None,
    ) -> Iterator[StreamEvent]:
        """Queue one prompt and return its events as they come; closing the iterator cancels the answer."""
        listener = _QueueListener()
        sampling = SamplingParams() if sampling is None else sampling
        self.submit(prompt, sampling, listener, keep_ratio=keep_ratio, budget_tokens=budget_tokens)
        return listener.events()

    def load(self) -> Load:
        """Return what the batcher is doing now."""
        with self._wake:
            jobs, waiting = list(self._open), len(self._queue)
        per_token = self.session.executor.kv_bytes_per_token
        used = sum(job.request.kept_tokens + job.new_tokens for job in jobs) * per_token
        return Load(len(jobs), waiting, used, self._lanes.allocated_bytes)

    def close(self, drain: bool = False) -> None:
        """Take no more requests and return when all have ended: answered with `drain`, else with OverloadedError."""
        with self._wake:
            self._draining = True
            if not drain:
                self._closing = OverloadedError("the server went down before the answer was complete; ask again")
            self._wake.notify()
        self._thread.join()

    def __enter__(self) -> ContinuousBatcher:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _run(self) -> None:
        """Work until closed; whatever happens, nobody is left waiting."""
        failure: ChunkKVError = OverloadedError("the server went down before the answer was complete; ask again")
        try:
            while self._wait_for_work():
                self._drop_stale()
                self._admit()
                for lane in self._lanes.busy():
                    self._step(lane)
        except BaseException as error:
            failure = EngineRunError(f"the batcher stopped: {type(error).__name__}: {error}")
            raise
        finally:
            with self._wake:
                self._closing = self._closing or failure
                left, self._queue = [*self._open, *self._queue], deque()
            for job in left:
                self._fail(job, failure)

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not self._queue and not self._open and not self._draining:
                self._wake.wait()
            return not self._closing and bool(self._queue or self._open)

    def _drop_stale(self) -> None:
        """End what was cancelled or took too long, waiting or in work."""
        now = time.perf_counter()
        with self._wake:
            jobs = [*self._queue, *self._open]
        for job in jobs:
            if job.is_cancelled():
                self._end_cancelled(job)
            elif error := job.timeout(now):
                self._fail(job, error)

    def _admit(self) -> None:
        """Prefill the oldest request if there is room for it; others wait behind it, so that none starves."""
        with self._wake:
            if not self._queue or len(self._open) >= self.limits.slots:
                return
            job = self._queue[0]
        try:
            seat = self._lanes.seat(job.needed)
            if seat is None:
                return
            job.begin(self.session, seat)
        except Exception as error:  # of an engine, a driver or a library: this request fails, the others go on
            self._fail(job, _as_chunkkv_error(error))
            return
        with self._wake:
            self._queue.remove(job)
            self._open.append(job)
        self._advance(job, lambda: job.prefill(self.session, seat))

    def _step(self, lane: Lane) -> None:
        """Append one token to every answer of a lane."""
        jobs = [job for job in self._open if job.seat is not None and job.seat.lane is lane]
        try:
            decoder, started = lane.decoder(), time.perf_counter()
            for job in jobs:
                job.open_answer.feed(decoder)
            with profiling.range_of("decode", [job.request for job in jobs]):
                logits = decoder.run()
            seconds = time.perf_counter() - started
        except Exception as error:
            self._lanes.discard(lane)  # what it holds is undefined now
            for job in jobs:
                self._fail(job, _as_chunkkv_error(error))
            return
        for job in jobs:
            job.open_answer.decode_s += seconds
            self._advance(job, lambda job=job: job.open_answer.accept(logits[job.open_answer.number]))

    def _advance(self, job: _Job, next_event) -> None:
        """Hand a job's next event to its listener and let the job go at its end."""
        try:
            event = next_event()
        except Exception as error:
            self._fail(job, _as_chunkkv_error(error))
            return
        job.new_tokens += len(event.token_ids)
        if event.finished is not None:
            self._release(job)
        if event.finished is not None and event.finished.finish_reason == "cancelled" and (late := job.timeout()):
            self._tell(job, lambda: job.listener.on_error(late))
        else:
            self._tell(job, lambda: job.listener.on_event(event))

    def _end_cancelled(self, job: _Job) -> None:
        self._release(job)
        answer = job.answer or Answer(0, job.request, job.sampling, self.session)
        self._tell(job, lambda: job.listener.on_event(answer.cancelled()))

    def _fail(self, job: _Job, error: ChunkKVError) -> None:
        self._release(job)
        self._tell(job, lambda: job.listener.on_error(error))

    def _release(self, job: _Job) -> None:
        with self._wake:
            for held in (self._queue, self._open):
                if job in held:
                    held.remove(job)
        job.leave()

    def _tell(self, job: _Job, call) -> None:
        """Call a listener; one that fails has lost its client and takes nothing else down."""
        try:
            call()
        except Exception:
            job.gone = True


class _Job:
    """A request on its way: waiting, then in a seat with an answer that grows."""

    def __init__(self, request: Request, sampling: SamplingParams, listener: Listener, limits: BatchingLimits) -> None:
        self.request, self.sampling, self.listener, self._limits = request, sampling, listener, limits
        self.needed = request.kept_tokens + sampling.max_new_tokens
        self.submitted = time.perf_counter()
        self.answer: Answer | None = None
        self.seat: Seat | None = None
        self.new_tokens = 0
        self.gone = False
        self._life = ExitStack()  # a span in profilers, from the wait to the last token
        self._life.enter_context(profiling.range_of("request", (request,), nested=False))

    def leave(self) -> None:
        """Give the seat back; the request is over."""
        if self.seat is not None:
            self.seat.lane.free(self.seat.row)
            self.seat = None
        self._life.close()

    @property
    def open_answer(self) -> Answer:
        """The answer of a request that has begun."""
        assert self.answer is not None, "the request still waits"
        return self.answer

    def is_cancelled(self) -> bool:
        """Return whether nobody wants the answer any more; a listener that fails has lost its client."""
        try:
            self.gone = self.gone or self.listener.is_cancelled()
        except Exception:
            self.gone = True
        return self.gone

    def timeout(self, now: float | None = None) -> RequestTimeoutError | None:
        """Return what to tell where the request has taken too long."""
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

    def begin(self, session: ChunkKVSession, seat: Seat) -> None:
        """Take a seat."""
        self.seat = seat
        self.answer = Answer(seat.row, self.request, self.sampling, session)
        self.answer.capacity = seat.lane.capacity

    def prefill(self, session: ChunkKVSession, seat: Seat) -> StreamEvent:
        """Run the prompt and return the first token."""
        cache = seat.lane.cache.rows(seat.row, 1)
        (prefilled,) = session.executor.prefiller().run([self.request], cache, _Asked(self))
        return self.open_answer.begin(prefilled, self.submitted)


class _Asked(threading.Event):
    """An event that is set once a job's listener has gone or its time is over: prefill asks it between blocks."""

    def __init__(self, job: _Job) -> None:
        super().__init__()
        self._job = job

    def is_set(self) -> bool:
        return self._job.is_cancelled() or self._job.timeout() is not None


class _QueueListener:
    """Hands events to the thread that iterates over them."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[StreamEvent | ChunkKVError] = queue.SimpleQueue()
        self._cancelled = False

    def on_accepted(self, request: Request) -> None:
        pass

    def on_event(self, event: StreamEvent) -> None:
        self._events.put(event)

    def on_error(self, error: ChunkKVError) -> None:
        self._events.put(error)

    def is_cancelled(self) -> bool:
        return self._cancelled

    def events(self) -> Iterator[StreamEvent]:
        """Yield events until the last one; raises the error that ended the answer."""
        try:
            while True:
                event = self._events.get()
                if isinstance(event, ChunkKVError):
                    raise event
                yield event
                if event.finished is not None:
                    return
        finally:
            self._cancelled = True


def _as_chunkkv_error(error: Exception) -> ChunkKVError:
    if isinstance(error, ChunkKVError):
        return error
    return EngineRunError(f"the engine failed: {type(error).__name__}: {error}")
