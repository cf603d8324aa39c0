"""One call of `generate`: prefills its prompts, then decodes their answers together, and tells what comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Protocol

import numpy as np

from chunkkv import profiling
from chunkkv.answer import Answer, decode_step
from chunkkv.cache_layout import Slots
from chunkkv.contexts import Context, ContinuedRequest, context_of_row, start_prefill
from chunkkv.contexts.engine import Engine
from chunkkv.executors.interface import CancelSignal, KVCache, PrefillProgress, PrefillResult, no_progress
from chunkkv.requests import CallProgress, Request
from chunkkv.results import StreamEvent
from chunkkv.sampling import SamplingParams

ContextListener = Callable[[int, Context], None]


class AnsweringEngine(Engine, Protocol):
    """An engine whose answers can be begun; a ChunkKVSession is one."""

    def start_answer(self, row: int, request: Request, sampling: SamplingParams, capacity: Slots) -> Answer:
        """Return the answer to `request` before its first token."""


class Generation:
    """The prompts of one call and their answers; the caches are its own.

    Parameters
    ----------
    engine : AnsweringEngine
        The session that is called.
    requests : list of Request
        The prompts, all behind a context or none.
    sampling : SamplingParams
        How tokens are chosen.
    cancel : CancelSignal
        Ends all answers within one token.
    on_prefill : PrefillProgress or None
        Is told how many of the prompts' tokens are prefilled.
    on_context : callable or None
        Is told what the row of an answer holds at its end.
    """

    def __init__(
        self,
        engine: AnsweringEngine,
        requests: list[Request],
        sampling: SamplingParams,
        cancel: CancelSignal,
        on_prefill: PrefillProgress | None = None,
        on_context: ContextListener | None = None,
    ) -> None:
        self._engine, self._executor = engine, engine.executor
        self._requests, self._sampling, self._cancel = requests, sampling, cancel
        self._on_prefill, self._on_context = on_prefill or no_progress, on_context

    def events(self) -> Iterator[StreamEvent]:
        """Return the events of all answers as they come; nothing runs before the first is taken."""
        with ExitStack() as spans:
            for request in self._requests:
                spans.enter_context(profiling.range_of("request", (request,), nested=False))
            yield from self._answered()

    def _answered(self) -> Iterator[StreamEvent]:
        began = time.perf_counter()
        rows_slots = [request.slots(self._sampling.max_new_tokens) for request in self._requests]
        needed = tuple(map(max, zip(*rows_slots, strict=True)))
        cache = self._executor.new_cache(len(self._requests), self._executor.capacity_for(needed))
        answers: list[Answer] = []
        for row, request, prefilled in self._prefills(cache):
            answers.append(self._engine.start_answer(row, request, self._sampling, cache.capacity))
            yield self._told(answers[-1], answers[-1].begin(prefilled, began), cache)
        decoder = None  # made when the first step comes: answers of one token need none
        while open_answers := [answer for answer in answers if not answer.finished]:
            if self._cancel.is_set():
                for answer in open_answers:
                    yield self._told(answer, answer.cancelled(), cache)
                return
            decoder = decoder or self._executor.decoder(cache)
            for answer, logits in zip(open_answers, decode_step(decoder, open_answers), strict=True):
                yield self._told(answer, answer.accept(logits), cache)

    def _prefills(self, cache: KVCache) -> Iterator[tuple[int, Request, PrefillResult]]:
        """Prefill all requests, as many at once as the engine takes, and return the result of each with its row."""
        requests, progress = self._requests, CallProgress(self._requests, self._on_prefill)
        prefiller = self._executor.prefiller()
        at_once = 1 if isinstance(requests[0], ContinuedRequest) else prefiller.max_rows
        for first in range(0, len(requests), at_once):
            group = requests[first : first + at_once]
            run = start_prefill(self._executor, prefiller, group, cache.rows(first, len(group)), progress)
            results = None
            while results is None:
                results = [PrefillResult(None) for _ in group] if self._cancel.is_set() else run.step()
            del run  # frees what it holds beside the rows before they decode
            progress.add(request.read_tokens for request in group)
            yield from zip(range(first, first + len(group)), group, results, strict=True)

    def _told(self, answer: Answer, event: StreamEvent, cache: KVCache) -> StreamEvent:
        """Return `event`; where it ends the answer, tell what its row holds before another step may change it."""
        if event.finished is not None and self._on_context is not None and answer.tokens:
            ids = np.concatenate([answer.request.prompt_ids, np.array(answer.tokens[:-1], np.int64)])
            row = cache.rows(answer.row, 1)
            self._on_context(answer.row, context_of_row(self._engine, row, ids, answer.next_slots))
        return event
