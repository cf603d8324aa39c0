"""Contexts of engines whose layers or heads keep unequal numbers of tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.class_engines import CLASSES, RANKED_HEADS, session, settings_of

from chunkkv import ChunkKVSession, Context, SamplingParams
from chunkkv.contexts import context_of_row
from chunkkv.sampling import log_softmax_at

SPLITS: dict[str, dict[str, Any]] = {
    "recent local heads": CLASSES,
    "local heads choose chunks": {**CLASSES, "local_policy": "chunks"},
    "one ranking": {"budget_split": "ranked"},
    "one ranking of all heads": RANKED_HEADS,
}


def tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 300, count).tolist()


@pytest.mark.parametrize("name", SPLITS)
def test_a_context_holds_the_lengths_of_the_classes(name: str) -> None:
    engine = session(settings_of(**SPLITS[name]))
    document, turn, question = tokens(90, 1), tokens(41, 2), tokens(20, 3)
    params = SamplingParams(8, ignore_eos=True, logprobs=True)
    context = engine.compress(document)
    assert len(context.slots) == engine.executor.cache_layout.length_classes > 1
    assert len(set(context.slots)) > 1 and 30 <= context.kept_tokens <= 36
    longer = context.extend(turn, keep_ratio=0.5)
    assert all(after > before for after, before in zip(longer.slots, context.slots, strict=True))
    copied = context_of_row(engine, context.cache, context.token_ids, context.slots)
    held: dict[int, Context] = {}
    alone = engine.generate(question, params, context=context)
    together = engine.generate([question, turn], params, context=copied, on_context=held.__setitem__)
    assert together[0].token_ids == alone.token_ids
    after = [*question, *alone.token_ids[:-1], 7]
    expected = engine.generate(after, params, context=context)
    found = engine.generate([7], params, context=held[0])
    assert found.token_ids == expected.token_ids
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-3)
    steps = decode_steps(engine, context, question)
    np.testing.assert_allclose(alone.logprobs[0], log_softmax_at(steps[-1], alone.token_ids[0]), atol=1e-3)
    whole = engine.compress(document, keep_ratio=1.0)
    plain = engine.generate([*document, *question], params, keep_ratio=1.0)
    assert engine.generate(question, params, context=whole).token_ids == plain.token_ids


def decode_steps(engine: ChunkKVSession, context: Context, ids: list[int]) -> np.ndarray:
    """Return the logits behind each token of a text that is appended one by one behind a context."""
    executor = engine.executor
    cache = executor.new_cache(1, executor.capacity_for(tuple(count + len(ids) for count in context.slots)))
    executor.continuer().copy(context.cache, context.slots, cache)
    decoder = executor.decoder(cache)
    slots = np.array(context.slots, np.int32)[:, None]
    return np.array([decoder.step([0], [t], [len(context) + i], slots + i)[0] for i, t in enumerate(ids)])
