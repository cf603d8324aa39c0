"""Against transformers' own models with the same random weights, float32, in one process."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest
import torch
from support import engines
from transformers import DynamicCache

from chunkkv import SamplingParams, reference
from chunkkv.requests import make_requests
from chunkkv.session import ChunkKVSession

pytestmark = pytest.mark.peers
TOLERANCE = 1e-4
LENGTHS = (61, 23, 40)
STEPS = 6
KEEP_RATIO = 0.2


def prompt(length: int, vocabulary: int = 384, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, length]).integers(3, vocabulary, length)


def engine_steps(session: ChunkKVSession, ids: np.ndarray, forced: np.ndarray, keep_ratio: float | None):
    """Prefill, then feed `forced` one by one; return prefill logits, decode logits and the choice."""
    request = make_requests([ids], None, session.limits, session.settings, keep_ratio, None, len(forced))[0]
    executor = session.executor
    cache = executor.new_cache(1, request.kept_tokens + len(forced))
    (first,) = executor.prefiller().run([request], cache, threading.Event())
    decoder, logits = executor.decoder(cache), []
    for step, token in enumerate(forced):
        logits.append(decoder.step([0], [token], [len(ids) + step], [request.kept_tokens + step])[0])
    return first.logits, np.array(logits), first.choice


def torch_steps(model, ids: np.ndarray, forced: np.ndarray, kept: dict[int, np.ndarray] | None):
    """The same in torch; `kept` lists per layer the positions that stay, keys keep their original rotation."""
    cache = DynamicCache()
    with torch.no_grad():
        first = model(torch.from_numpy(ids)[None], past_key_values=cache).logits[0, -1].numpy()
        for number, layer in enumerate(cache.layers):
            if kept is not None:
                index = torch.from_numpy(kept[number].astype(np.int64))
                layer.keys, layer.values = layer.keys[:, :, index], layer.values[:, :, index]
        logits = []
        for step, token in enumerate(forced):
            place = torch.tensor([[len(ids) + step]])
            output = model(torch.tensor([[int(token)]]), past_key_values=cache, position_ids=place)
            logits.append(output.logits[0, -1].numpy())
    return first, np.array(logits)


@pytest.mark.parametrize("length", LENGTHS)
def test_full_cache_logits(variant: str, model, length: int) -> None:
    ids, forced = prompt(length), prompt(STEPS, seed=1)
    first, later, choice = engine_steps(engines.session(variant), ids, forced, 1.0)
    expected_first, expected_later = torch_steps(model, ids, forced, None)
    assert choice is None
    assert np.abs(first - expected_first).max() <= TOLERANCE
    assert np.abs(later - expected_later).max() <= TOLERANCE


@pytest.mark.parametrize("leader", ["first", "last"])
@pytest.mark.parametrize("boundaries", ["fixed", "delimiter"])
def test_logits_after_eviction_equal_a_torch_model_that_evicts_the_same(variant, model, boundaries, leader) -> None:
    session = engines.session(variant, chunkkv_boundaries=boundaries, chunkkv_leader=leader, chunkkv_layer_reuse=2)
    ids, forced = prompt(61), prompt(STEPS, seed=1)
    _, later, choice = engine_steps(session, ids, forced, KEEP_RATIO)
    kept = {
        layer: choice.kept_indices[session.settings.leader_of(group)]
        for group in session.settings.layer_groups
        for layer in group
    }
    assert all(len(indices) == int(61 * KEEP_RATIO) for indices in kept.values())
    _, expected = torch_steps(model, ids, forced, kept)
    assert np.abs(later - expected).max() <= TOLERANCE
    _, full = torch_steps(model, ids, forced, None)
    assert np.abs(full - expected).max() > 100 * TOLERANCE  # eviction changes the logits, so the check above can fail


def test_choice_equals_the_reference_on_torch_tensors(variant: str, model) -> None:
    """Queries and keys from torch, chosen by the reference: the same positions as the engine's own choice."""
    session = engines.session(variant, chunkkv_layer_reuse=1)
    settings, ids = session.settings, prompt(61)
    _, _, choice = engine_steps(session, ids, prompt(1), None)
    queries, cache = torch_queries(model, ids, settings.window)
    for leader, kept in choice.kept_indices.items():
        key = cache.layers[leader].keys.numpy()
        expected = reference.select_batch(queries[leader], key, np.array([len(ids)]), settings)
        np.testing.assert_allclose(choice.token_scores[leader], expected.token_scores[0], rtol=1e-4, atol=1e-7)
        near = reference.near_cut(expected.token_scores[0], len(ids), len(kept), settings, tolerance=1e-4)
        differing = np.setxor1d(kept, expected.kept_indices[0])
        assert near[differing].all()


def torch_queries(model, ids: np.ndarray, window: int):
    """Return each layer's last rotated queries [1,Hq,w,D] and the cache, caught where torch's attention takes them.

    A model's own scale of attention goes onto the queries, because the reference divides by sqrt(D). A soft cap does
    not exist for scores.
    """
    caught: dict[int, np.ndarray] = {}
    modeling = sys.modules[type(model).__module__]
    attention = modeling.eager_attention_forward

    def catching(module, query, *args, **kwargs):
        scale = kwargs["scaling"] * query.shape[-1] ** 0.5
        caught[module.layer_idx] = query[:, :, -window:].numpy() * np.float32(scale)
        return attention(module, query, *args, **kwargs)

    cache = DynamicCache()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(modeling, "eager_attention_forward", catching)
        model(torch.from_numpy(ids)[None], past_key_values=cache)
    return caught, cache


def test_greedy_tokens_equal_generate(variant: str, model) -> None:
    session = engines.session(variant)
    for length in LENGTHS:
        ids = prompt(length)
        expected = model.generate(torch.from_numpy(ids)[None], do_sample=False, max_new_tokens=24)[0, length:].tolist()
        result = session.generate(ids, SamplingParams(max_new_tokens=24), keep_ratio=1.0)
        assert list(result.token_ids) == expected
