"""Makes contexts: from a prompt, and from the row of an answer."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from chunkkv.contexts.context import Context, check_continues, check_prefilled
from chunkkv.contexts.engine import Engine
from chunkkv.contexts.origin import Origin, origin_of
from chunkkv.contexts.scorers import Scorer, default_scorer, with_scorer
from chunkkv.executors.interface import KVCache, PrefillProgress, no_progress
from chunkkv.requests import CallProgress, Prompt, Request, make_requests


def make_context(
    engine: Engine,
    prompt: Prompt,
    keep_ratio: float | None = None,
    budget_tokens: int | None = None,
    scorer: str | None = None,
    add_special_tokens: bool = True,
    on_prefill: PrefillProgress | None = None,
) -> Context:
    """Return `prompt` as a context; see ChunkKVSession.compress."""
    check_continues(engine)
    request, by, origin = context_request(engine, prompt, keep_ratio, budget_tokens, scorer, add_special_tokens)
    executor = engine.executor
    cache = executor.new_cache(1, executor.capacity_for(request.class_lengths))
    progress = CallProgress([request], on_prefill or no_progress)
    (prefilled,) = executor.prefiller().run([request], cache, threading.Event(), progress)
    check_prefilled(prefilled)
    progress.add([request.read_tokens])
    slots = prefilled.kept_lengths or request.class_lengths
    return Context(request.ids, slots, cache, origin, engine, by.name)


def context_request(
    engine: Engine,
    prompt: Prompt,
    keep_ratio: float | None = None,
    budget_tokens: int | None = None,
    scorer: str | None = None,
    add_special_tokens: bool = True,
) -> tuple[Request, Scorer, Origin]:
    """Return the checked request that makes a prompt a context, its scorer, and what it was made from.

    Parameters and errors are those of ChunkKVSession.compress.
    """
    origin = origin_of(prompt)
    ids: Prompt = prompt if origin == Origin() else origin.begin(engine.tokenizer, add_special_tokens)
    (request,) = make_requests([ids], None, engine.limits, engine.settings, keep_ratio, budget_tokens, 0)
    request, by = with_scorer(engine, request, scorer, of_context=True)
    return request, by, origin


def context_of_row(
    engine: Engine, cache: KVCache, token_ids: np.ndarray, slots: Sequence[int], origin: Origin | None = None
) -> Context:
    """Return what a row holds as a context, as a copy: the row may be used for something else afterwards.

    Parameters
    ----------
    engine : Engine
        The session that filled the row.
    cache : KVCache
        The row, as a cache of one row.
    token_ids : numpy.ndarray
        Every token that the row stands for [L] int64.
    slots : sequence of int
        Slots that are filled, one number for each length class.
    origin : Origin or None, default None
        What the tokens were made from; None leaves token ids.
    """
    check_continues(engine)
    executor = engine.executor
    own = executor.new_cache(1, executor.capacity_for(tuple(slots)))
    executor.continuer().copy(cache, slots, own)
    scorer = default_scorer(engine).name
    return Context(np.asarray(token_ids, np.int64), tuple(slots), own, origin or Origin(), engine, scorer)
