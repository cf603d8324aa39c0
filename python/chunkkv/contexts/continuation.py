"""A question behind a context: its request, and its prefill block by block in one row of a cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from chunkkv import profiling
from chunkkv.contexts.context import Context, check_continues, check_positions
from chunkkv.contexts.engine import Engine
from chunkkv.contexts.origin import continuation_ids
from chunkkv.errors import RequestError
from chunkkv.executors.interface import (
    Executor,
    Prefiller,
    PrefillProgress,
    PrefillResult,
    PrefillRun,
    no_progress,
)
from chunkkv.limits import KEEP_SCALE
from chunkkv.requests import Limits, Prompt, Request, check_token_ids


@dataclass(frozen=True)
class ContinuedRequest(Request):
    """A question behind a context: `ids` are the question's alone, `kept_tokens` counts the slots of both.

    Parameters
    ----------
    context : Context
        What stands before the question.
    """

    context: Context = field(kw_only=True)

    @property
    def prompt_ids(self) -> np.ndarray:
        """Every token before the answer [prompt_tokens] int64: the context's and the question's."""
        return np.concatenate([self.context.token_ids, self.ids])

    @property
    def prompt_tokens(self) -> int:
        """How many tokens stand before the answer."""
        return len(self.context) + len(self.ids)

    @property
    def context_tokens(self) -> int:
        """How many of them belong to the context."""
        return len(self.context)


def continue_requests(
    engine: Engine, prompts: Sequence[Prompt], context: Context, max_new_tokens: int
) -> list[ContinuedRequest]:
    """Return the checked requests of questions behind one context.

    Raises RequestError for a question outside the engine's limits, BackendUnavailableError for an engine that cannot
    continue a context.

    Parameters
    ----------
    engine : Engine
        The session that answers.
    prompts : sequence of str, sequence of int or sequence of mappings
        Text, token ids or messages.
    context : Context
        What stands before them.
    max_new_tokens : int
        Room that each answer needs.
    """
    check_continues(engine)
    context.check_engine(engine)
    _check_count(len(prompts), engine.limits)
    requests = []
    for number, prompt in enumerate(prompts):
        encoded = continuation_ids(context.origin, context.token_ids, prompt, engine.tokenizer, answers=True)
        ids = check_token_ids(encoded, number, engine.limits.vocab_size)
        check_positions(engine, len(context), len(ids), max_new_tokens)
        kept = context.kept_tokens + len(ids)
        lengths = tuple(count + len(ids) for count in context.slots)
        requests.append(ContinuedRequest(ids, KEEP_SCALE, 0, kept, lengths, context=context))
    return requests


class Continuation:
    """The prefill of a question in one row of a cache, a block per step; see PrefillRun.

    Parameters
    ----------
    executor : Executor
        Runs the engine's graphs.
    request : ContinuedRequest
        The question.
    cache : KVCache
        The row, as a cache of one row, with room for `request.class_lengths` slots. The first step copies the context
        into it.
    progress : PrefillProgress, optional
        Is told after each block.
    """

    def __init__(
        self, executor: Executor[Any], request: ContinuedRequest, cache: Any, progress: PrefillProgress = no_progress
    ) -> None:
        self._continuer, self._request, self._cache = executor.continuer(), request, cache
        self._progress, self._seconds = progress, 0.0
        self.tokens_left = len(request.ids)

    def step(self) -> list[PrefillResult] | None:
        """Append the next block; see PrefillRun.step."""
        began = time.perf_counter()
        request, context = self._request, self._request.context
        done = len(request.ids) - self.tokens_left
        with profiling.range_of("prefill", (request,)):
            if done == 0:
                self._continuer.copy(context.cache, context.slots, self._cache)
            ids = request.ids[done : done + self._continuer.block]
            slots = [count + done for count in context.slots]
            logits = self._continuer.append(self._cache, ids, slots, len(context) + done)
        self.tokens_left -= len(ids)
        self._seconds += time.perf_counter() - began
        self._progress(done + len(ids), len(request.ids))
        return None if self.tokens_left else [PrefillResult(logits, prefill_s=self._seconds)]


def start_prefill(
    executor: Executor[Any],
    prefiller: Prefiller[Any],
    requests: Sequence[Request],
    out: Any,
    progress: PrefillProgress = no_progress,
) -> PrefillRun:
    """Return the prefill of `requests` into `out`, a cache of as many rows, before its first step.

    A question behind a context comes alone; its first step copies the context into the row. Other requests are those
    of one run of `prefiller`.
    """
    if isinstance(requests[0], ContinuedRequest):
        return Continuation(executor, requests[0], out, progress)
    return prefiller.start(requests, out, progress)


def _check_count(count: int, limits: Limits) -> None:
    if not 1 <= count <= limits.max_batch_size:
        raise RequestError(
            f"{count} questions were given; this engine takes 1 to {limits.max_batch_size} at once: "
            "give fewer, or build it with a larger --max_batch_size"
        )
