"""Continuous batching: requests join and leave while others decode.

One thread owns the engine. In turn it gives every open answer a token and prefills one block, so that a long prompt
stops nobody for longer than a block. Short prompts go first, and every third block goes to the oldest prompt.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from chunkkv.answer import cancelled_in_queue, decode_step
from chunkkv.batching.heartbeat import STALL_TIMEOUT_S, Heartbeat
from chunkkv.batching.job import AnswerJob, as_chunkkv_error, share_prompt
from chunkkv.batching.limits import BatchingLimits, Load
from chunkkv.batching.listener import Listener, QueueListener
from chunkkv.batching.pools import check_room, make_pool
from chunkkv.batching.schedule import PIECE_TOKENS, Turns, admissible, count_overtaken
from chunkkv.batching.seats import Batch
from chunkkv.contexts import Context, check_continues
from chunkkv.errors import ChunkKVError, EngineRunError, OverloadedError, RequestError
from chunkkv.requests import Prompt
from chunkkv.results import StreamEvent
from chunkkv.sampling import SamplingParams
from chunkkv.session import ChunkKVSession

_CLOSED = "the batcher was closed before the answer was complete; ask again"
_ASK_WAITING_S = 0.1  # whether waiting requests were cancelled is asked so often; asking may be a message to a server


class ContinuousBatcher:
    """Serves requests on one session from one thread of its own; call close() at the end, or use it in `with`.

    Raises ConfigError for more slots than the engine has rows, and for memory in which no answer has room.

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
        self.session, self.limits = session, BatchingLimits() if limits is None else limits
        self._pool, self.slots = make_pool(session, self.limits)
        self._queue: deque[AnswerJob] = deque()
        self._prefilling: list[AnswerJob] = []
        self._open: list[AnswerJob] = []
        self._turns = Turns()
        self._queue_may_move = False  # something was added to the queue or given back since it was last looked at
        self._asked_waiting_at = 0.0
        self._heart = Heartbeat()
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
        context: Context | None = None,
        scorer: str | None = None,
        on_context: Callable[[Context], None] | None = None,
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
        keep_ratio, budget_tokens, add_special_tokens, context, scorer : optional
            As for ChunkKVSession.generate.
        on_context : callable or None, default None
            Called on the batcher's thread before the last event of an answer that was not cancelled, with a Context
            that holds the prompt and the answer, without its last token, which no step has read.
        """
        self.submit_answers(
            prompt,
            [sampling],
            [listener],
            keep_ratio=keep_ratio,
            budget_tokens=budget_tokens,
            add_special_tokens=add_special_tokens,
            context=context,
            scorer=scorer,
            on_context=on_context,
        )

    def submit_answers(
        self,
        prompt: Prompt,
        samplings: Sequence[SamplingParams],
        listeners: Sequence[Listener],
        *,
        keep_ratio: float | None = None,
        budget_tokens: int | None = None,
        add_special_tokens: bool = True,
        context: Context | None = None,
        scorer: str | None = None,
        on_context: Callable[[Context], None] | None = None,
    ) -> None:
        """Queue one prompt with several answers, all of them or none; see submit.

        Where the engine can copy rows (capability `continues_rows`), the prompt is prefilled once, and every answer
        begins with a copy of what it keeps.

        Parameters
        ----------
        samplings : sequence of SamplingParams
            How the tokens of each answer are chosen; all with the same `max_new_tokens`.
        listeners : sequence of Listener
            Who waits for each answer.
        prompt, keep_ratio, budget_tokens, add_special_tokens, context, scorer, on_context : optional
            As for submit, for every answer.
        """
        if on_context is not None:
            check_continues(self.session)
        if len({sampling.max_new_tokens for sampling in samplings}) != 1:
            raise RequestError("answers to one prompt need the same max_new_tokens; submit others by themselves")
        (request,) = self.session.requests(
            [prompt], samplings[0], keep_ratio, budget_tokens, add_special_tokens, context, scorer
        )
        jobs = [
            AnswerJob(request, sampling, listener, self.limits, on_context)
            for sampling, listener in zip(samplings, listeners, strict=True)
        ]
        check_room(self._pool, self.slots + self.limits.waiting, jobs)
        for listener in listeners:
            listener.on_accepted(request)
        with self._wake:
            if self._closing or self._draining:
                raise self._closing or OverloadedError("the batcher is closing; ask again later")
            in_work, waiting = len(self._open) + len(self._prefilling), self._waiting()
            if in_work + waiting + len(jobs) > self.slots + self.limits.waiting:
                raise OverloadedError(
                    f"the queue is full: {in_work} answers in work, {waiting} requests waiting; ask again later"
                )
            self._queue.extend(share_prompt(jobs) if self.session.executor.capabilities.continues_rows else jobs)
            self._queue_may_move = True
            self._wake.notify()

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        keep_ratio: float | None = None,
        budget_tokens: int | None = None,
        context: Context | None = None,
    ) -> Iterator[StreamEvent]:
        """Queue one prompt and return its events as they come; closing the iterator cancels the answer."""
        listener = QueueListener()
        sampling = SamplingParams() if sampling is None else sampling
        self.submit(prompt, sampling, listener, keep_ratio=keep_ratio, budget_tokens=budget_tokens, context=context)
        return listener.events()

    def load(self) -> Load:
        """Return what the batcher is doing now."""
        with self._wake:
            prefilling, jobs, waiting = list(self._prefilling), list(self._open), self._waiting()
        tokens = sum(job.request.kept_tokens + job.new_tokens for job in jobs)
        tokens += sum(job.request.read_tokens - job.tokens_left for job in prefilling)
        return Load(
            active=len(prefilling) + len(jobs),
            waiting=waiting,
            kv_bytes_used=tokens * self.session.executor.kv_bytes_per_token,
            kv_bytes_allocated=self._pool.allocated_bytes,
            kv_bytes_bound=self._pool.bound,
            slots=self.slots,
        )

    def check_alive(self, stall_timeout_s: float = STALL_TIMEOUT_S) -> None:
        """Return at once where answers still grow, however busy the batcher is; it queues nothing.

        Raises EngineRunError where the batcher has stopped, or where no block and no step has ended for
        `stall_timeout_s` seconds although there is work. A prompt of many blocks may take longer than that.
        """
        if not self._thread.is_alive():
            raise EngineRunError(str(self._closing or _CLOSED))
        self._heart.check(stall_timeout_s)

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
                self._seat_followers()
                for batch in self._pool.busy():
                    self._step(batch)
                    self._heart.beat()
                self._prefill_round()
        except BaseException as error:
            failure = EngineRunError(f"the batcher stopped: {type(error).__name__}: {error}")
            raise
        finally:
            with self._wake:
                self._closing = self._closing or failure
                left = [*self._open, *self._prefilling, *self._queue]
            for job in left:
                self._fail_all(job, failure)

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not (self._queue or self._prefilling or self._open or self._draining):
                self._heart.rest()
                self._wake.wait()
            self._heart.wake()
            return not self._closing and bool(self._queue or self._prefilling or self._open)

    def _drop_stale(self) -> None:
        """End what was cancelled or took too long, in work or, asked now and then, waiting."""
        now = time.perf_counter()
        with self._wake:
            jobs = [*self._open, *self._prefilling]
            if now - self._asked_waiting_at >= _ASK_WAITING_S:
                self._asked_waiting_at = now
                jobs += self._queue
                jobs += [follower for job in jobs for follower in job.followers]
        for job in jobs:
            if job.is_cancelled():
                self._end_cancelled(job)
            elif error := job.timeout(now):
                self._fail(job, error)

    def _prefill_round(self) -> None:
        """Prefill one block, or as many short prompts as make up a block."""
        spent = 0
        while (job := self._next_prompt()) is not None:
            tokens = min(job.tokens_left or PIECE_TOKENS, PIECE_TOKENS)  # compression counts as a block
            if spent and spent + tokens > PIECE_TOKENS:
                return
            spent += tokens
            self._prefill_piece(job)
            self._heart.beat()

    def _next_prompt(self) -> AnswerJob | None:
        """Return the prompt whose turn it is, among those in work and the waiting ones for which there is room."""
        waiting: list[AnswerJob] = []
        with self._wake:
            if self._queue_may_move:
                waiting = admissible(self._queue, self._fits)
                self._queue_may_move = bool(waiting)
        return self._turns.choose([*self._prefilling, *waiting])

    def _fits(self, job: AnswerJob) -> bool:
        return self._pool.fits(job.needs) and len(self._open) + len(self._prefilling) < self.slots

    def _prefill_piece(self, job: AnswerJob) -> None:
        """Run a block of a prompt; a request that waited takes its seat first."""
        try:
            if job.seat is None:
                self._seat(job)
            event = job.prefill_piece(self.session, is_whole=not self._pool.prefills_in_pieces)
        except Exception as error:  # of an engine, a driver or a library: this request fails, the others go on
            self._fail_all(job, as_chunkkv_error(error))
            return
        if event is not None:
            with self._wake:
                self._prefilling.remove(job)
                self._open.append(job)
                self._queue_may_move = True  # the memory of the prefill is free
            self._advance(job, lambda: event)

    def _seat(self, job: AnswerJob) -> None:
        with self._wake:
            count_overtaken(self._queue, job, self._fits)
            self._queue.remove(job)
            self._prefilling.append(job)
        job.begin(self._pool.take(job.needs))

    def _step(self, batch: Batch) -> None:
        """Append one token to every answer of a batch."""
        jobs = [job for job in self._open if job.seat is not None and job.seat.batch is batch]
        try:
            for source, target in batch.compact():
                (moved,) = (job for job in jobs if job.seat is not None and job.seat.row == source)
                batch.move(source, target, moved.open_answer.next_slots)
                moved.move_to(target)
            logits = decode_step(batch.decoder(), [job.open_answer for job in jobs])
        except Exception as error:
            self._pool.discard(batch)  # what it holds is undefined now
            for job in jobs:
                self._fail_all(job, as_chunkkv_error(error))
            return
        for job, row_logits in zip(jobs, logits, strict=True):
            self._advance(job, partial(job.open_answer.accept, row_logits))

    def _advance(self, job: AnswerJob, next_event: Callable[[], StreamEvent]) -> None:
        """Hand a job's next event to its listener and let the job go at its end."""
        try:
            event = next_event()
        except Exception as error:
            self._fail(job, as_chunkkv_error(error))
            return
        job.new_tokens += len(event.token_ids)
        if event.finished is not None:
            self._tell(job, lambda: job.tell_context(self.session))
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

    def _fail_all(self, job: AnswerJob, error: ChunkKVError) -> None:
        """Fail a job and those that wait for its prompt, of which nothing is left."""
        followers = job.part_with_followers()
        for each in (job, *followers):
            self._fail(each, error)

    def _release(self, job: AnswerJob) -> None:
        """Let a job go. If others wait for its prompt, the next one takes its place, where and as far as it is."""
        with self._wake:
            heir = job.next_follower()
            for jobs in (self._queue, self._prefilling, self._open):
                if job in jobs and heir is not None:
                    jobs[jobs.index(job)] = heir
                elif job in jobs:
                    jobs.remove(job)
            self._queue_may_move = True
        job.leave()
        if heir is not None and heir.prefilled is not None:
            self._advance(heir, partial(heir.begin_answer, self.session))

    def _seat_followers(self) -> None:
        """Give the answers that wait for a prompt which is prefilled seats of their own, as far as there is room."""
        for holder in [job for job in self._open if job.followers]:
            while holder.followers and self._fits(holder.followers[0]):
                with self._wake:
                    follower = holder.followers.popleft()
                    self._open.append(follower)
                self._advance(follower, partial(follower.begin_beside, holder, self._pool.take, self.session))
                self._heart.beat()

    def _waiting(self) -> int:
        """Return how many requests wait for their turn; the lock is held."""
        return len(self._queue) + sum(len(job.followers) for job in (*self._queue, *self._prefilling, *self._open))

    def _tell(self, job: AnswerJob, call: Callable[[], None]) -> None:
        """Call a listener; one that fails has lost its client and takes nothing else down."""
        try:
            call()
        except Exception:
            job.client_gone = True
