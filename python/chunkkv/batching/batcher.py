"""Continuous batching: requests join and leave while others decode.

One thread owns the engine. It prefills one prompt at a time, oldest first, and between two prefills every open answer
gets a token, so neither a long queue nor a long prompt stops the others for more than one prompt.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from chunkkv.answer import cancelled_in_queue, decode_step
from chunkkv.batching.cache_pool import CacheBucket, CachePool, cache_bytes
from chunkkv.batching.job import AnswerJob
from chunkkv.batching.limits import BatchingLimits, Load
from chunkkv.batching.listener import Listener, QueueListener
from chunkkv.errors import ChunkKVError, ConfigError, EngineRunError, OverloadedError, RequestError
from chunkkv.requests import Prompt
from chunkkv.results import StreamEvent
from chunkkv.sampling import SamplingParams
from chunkkv.session import ChunkKVSession

_CLOSED = "the batcher was closed before the answer was complete; ask again"
PROBE_WAIT_S = 0.5  # how long a probe waits for a slot before it says that the batcher is busy


class ContinuousBatcher:
    """Serves requests on one session from one thread of its own; call close() at the end, or use it in `with`.

    Raises ConfigError for more slots than the engine has rows.

    ```python
    from chunkkv import ChunkKVSession, SamplingParams
    from chunkkv.batching import BatchingLimits, ContinuousBatcher

    session = ChunkKVSession.from_dir("engines/needle")
    with ContinuousBatcher(session, BatchingLimits(slots=4)) as batcher:
        streams = [batcher.stream(text, SamplingParams(max_new_tokens=16)) for text in ("The door is", "The key is")]
        for stream in streams:  # both answers grow at the same time
            print("".join(event.text for event in stream))
    ```

    Parameters
    ----------
    session : ChunkKVSession
        The engine.
    limits : BatchingLimits or None, default None
        How much it takes on; None takes BatchingLimits().
    """

    def __init__(self, session: ChunkKVSession, limits: BatchingLimits | None = None) -> None:
        limits = BatchingLimits() if limits is None else limits
        if limits.slots > session.limits.max_batch_size:
            raise ConfigError(
                f"slots is {limits.slots}; this engine takes at most {session.limits.max_batch_size} rows: "
                "give fewer slots, or build with a larger --max_batch_size"
            )
        self.session, self.limits = session, limits
        kv_bytes = cache_bytes(session, limits.kv_bytes)
        self._caches = CachePool(session.executor, limits.slots, session.limits.max_seq_len, kv_bytes)
        self._queue: deque[AnswerJob] = deque()
        self._open: list[AnswerJob] = []
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
        add_special_tokens: bool = True,
        probe: bool = False,
    ) -> None:
        """Queue one prompt; its tokens are those that session.generate gives for the same seed.

        Raises RequestError or EngineMismatchError for what the engine cannot serve, OverloadedError where the queue is
        full or the batcher closes; a request that was queued always ends with a last event or an error.

        Parameters
        ----------
        prompt : str, sequence of int or sequence of mappings
            Text, token ids, or the messages of a conversation.
        sampling : SamplingParams
            How tokens are chosen.
        listener : Listener
            Who waits for the answer.
        keep_ratio, budget_tokens, add_special_tokens : optional
            As for ChunkKVSession.generate.
        probe : bool, default False
            The request only asks whether answers still grow. A full queue does not refuse it. Where it finds no slot,
            it ends with RequestTimeoutError after PROBE_WAIT_S and the next step; only a batcher that is stuck leaves
            it waiting.
        """
        (request,) = self.session.requests([prompt], sampling, keep_ratio, budget_tokens, add_special_tokens)
        if not self._caches.could_hold(request.slots(sampling.max_new_tokens)):
            raise RequestError(
                f"{request.kept_tokens + sampling.max_new_tokens} tokens do not fit kv_bytes {self.limits.kv_bytes}: "
                "ask for fewer new tokens or a smaller budget, or give the server more memory"
            )
        listener.on_accepted(request)
        limits = replace(self.limits, queue_timeout_s=PROBE_WAIT_S) if probe else self.limits
        job = AnswerJob(request, sampling, listener, limits)
        with self._wake:
            if self._closing or self._draining:
                raise self._closing or OverloadedError("the batcher is closing; ask again later")
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
        listener = QueueListener()
        sampling = SamplingParams() if sampling is None else sampling
        self.submit(prompt, sampling, listener, keep_ratio=keep_ratio, budget_tokens=budget_tokens)
        return listener.events()

    def load(self) -> Load:
        """Return what the batcher is doing now."""
        with self._wake:
            jobs, waiting = list(self._open), len(self._queue)
        per_token = self.session.executor.kv_bytes_per_token
        used = sum(job.request.kept_tokens + job.new_tokens for job in jobs) * per_token
        return Load(len(jobs), waiting, used, self._caches.allocated_bytes)

    def close(self, drain: bool = False) -> None:
        """Take no more requests and return when all have ended: answered with `drain`, else with OverloadedError."""
        with self._wake:
            self._draining = True
            if not drain:
                self._closing = OverloadedError(_CLOSED)
            self._wake.notify()
        self._thread.join()

    def __enter__(self) -> ContinuousBatcher:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _run(self) -> None:
        """Work until closed; whatever happens, nobody is left waiting."""
        failure: ChunkKVError = OverloadedError(_CLOSED)
        try:
            while self._wait_for_work():
                self._drop_stale()
                self._admit()
                for bucket in self._caches.busy():
                    self._step(bucket)
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
            cache_row = self._caches.take_row(job.needed_slots)
            if cache_row is None:
                return
            job.begin(self.session, cache_row)
        except Exception as error:  # of an engine, a driver or a library: this request fails, the others go on
            self._fail(job, _as_chunkkv_error(error))
            return
        with self._wake:
            self._queue.remove(job)
            self._open.append(job)
        self._advance(job, lambda: job.prefill(self.session, cache_row))

    def _step(self, bucket: CacheBucket) -> None:
        """Append one token to every answer of a bucket."""
        jobs = [job for job in self._open if job.cache_row is not None and job.cache_row.bucket is bucket]
        try:
            logits = decode_step(bucket.decoder(), [job.open_answer for job in jobs])
        except Exception as error:
            self._caches.discard(bucket)  # what it holds is undefined now
            for job in jobs:
                self._fail(job, _as_chunkkv_error(error))
            return
        for job, row_logits in zip(jobs, logits, strict=True):
            self._advance(job, partial(job.open_answer.accept, row_logits))

    def _advance(self, job: AnswerJob, next_event: Callable[[], StreamEvent]) -> None:
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

    def _end_cancelled(self, job: AnswerJob) -> None:
        self._release(job)
        if job.answer is None:
            event = cancelled_in_queue(job.request, job.sampling, self.session.executor.kv_bytes_per_token)
        else:
            event = job.answer.cancelled()
        self._tell(job, lambda: job.listener.on_event(event))

    def _fail(self, job: AnswerJob, error: ChunkKVError) -> None:
        self._release(job)
        self._tell(job, lambda: job.listener.on_error(error))

    def _release(self, job: AnswerJob) -> None:
        with self._wake:
            for jobs in (self._queue, self._open):
                if job in jobs:
                    jobs.remove(job)
        job.leave()

    def _tell(self, job: AnswerJob, call: Callable[[], None]) -> None:
        """Call a listener; one that fails has lost its client and takes nothing else down."""
        try:
            call()
        except Exception:
            job.client_gone = True


def _as_chunkkv_error(error: Exception) -> ChunkKVError:
    if isinstance(error, ChunkKVError):
        return error
    return EngineRunError(f"the engine failed: {type(error).__name__}: {error}")
