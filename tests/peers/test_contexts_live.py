"""Contexts against transformers: a torch model that evicts the same tokens, keeps positions, and goes on in blocks."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from support import engines
from transformers import DynamicCache

from chunkkv import SamplingParams
from chunkkv.requests import make_requests
from chunkkv.session import ChunkKVSession

pytestmark = pytest.mark.peers
TOLERANCE = 1e-4
DOCUMENT, TURN, QUESTION, STEPS = 100, 40, 21, 6


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, length]).integers(3, 384, length)


class TorchRow:
    """A row of a torch cache: blocks go on at their logical position, behind whatever is left in the cache."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model, self._cache, self.position = model, DynamicCache(), 0

    def append(self, ids: np.ndarray) -> np.ndarray:
        """Return the logits after every token of a block."""
        places = torch.arange(self.position, self.position + len(ids))[None]
        self.position += len(ids)
        with torch.no_grad():
            output = self._model(torch.from_numpy(ids)[None], past_key_values=self._cache, position_ids=places)
        return output.logits[0].numpy()

    def evict(self, first: int, kept: dict[int, np.ndarray]) -> None:
        """Keep, of everything from slot `first` on, the places in `kept`, listed for each layer."""
        for number, layer in enumerate(self._cache.layers):
            places = [np.arange(first), first + kept[number].astype(np.int64)]
            index = torch.from_numpy(np.concatenate(places))
            layer.keys, layer.values = layer.keys[:, :, index], layer.values[:, :, index]


def by_layer(session: ChunkKVSession, kept_indices) -> dict[int, np.ndarray]:
    settings = session.settings
    return {layer: kept_indices[settings.leader_of(group)] for group in settings.layer_groups for layer in group}


@pytest.mark.parametrize("keep_ratio", [1.0, 0.4, 0.1])
def test_question_and_answer_behind_a_context(variant: str, model, keep_ratio: float) -> None:
    session = engines.session(variant)
    document, question = prompt(DOCUMENT), prompt(QUESTION, seed=1)
    context = session.compress(document, keep_ratio=keep_ratio)
    row = TorchRow(model)
    row.append(document)
    if keep_ratio < 1.0:
        request = make_requests([document], None, session.limits, session.settings, keep_ratio, None, 0)[0]
        cache = session.executor.new_cache(1, request.kept_tokens)
        (prefilled,) = session.executor.prefiller().run([request], cache, threading.Event())
        row.evict(0, by_layer(session, prefilled.choice.kept_indices))
    logits = row.append(question)[-1]
    params = SamplingParams(max_new_tokens=STEPS, ignore_eos=True, logprobs=True)
    answer = session.generate(question, params, context=context)
    for token, logprob in zip(answer.token_ids, answer.logprobs, strict=True):
        expected = torch.log_softmax(torch.from_numpy(logits), -1)
        assert abs(float(expected[token]) - logprob) <= TOLERANCE
        assert float(expected.max()) - logprob <= TOLERANCE  # the likeliest, or as likely
        logits = row.append(np.array([token]))[-1]


def test_a_compressed_turn_behind_a_context(variant: str, model) -> None:
    session = engines.session(variant)
    document, turn, question = prompt(DOCUMENT), prompt(TURN, seed=1), prompt(QUESTION, seed=2)
    request = make_requests([document], None, session.limits, session.settings, 0.4, None, 0)[0]
    executor, never = session.executor, threading.Event()
    added = make_requests([turn], None, session.limits, session.settings, 0.4, None, 0)[0]
    cache = executor.new_cache(1, request.kept_tokens + added.kept_tokens + QUESTION)
    (prefilled,) = executor.prefiller().run([request], cache, never)
    continuer = executor.continuer()
    extended = continuer.extend(cache, (request.kept_tokens,), DOCUMENT, added, never)
    slots = (request.kept_tokens + added.kept_tokens,)
    behind = [continuer.append(cache, question[at : at + 16], (slots[0] + at,), DOCUMENT + TURN + at) for at in (0, 16)]
    row = TorchRow(model)
    row.append(document)
    row.evict(0, by_layer(session, prefilled.choice.kept_indices))
    turn_logits = row.append(turn)[-1]
    assert np.abs(extended.logits - turn_logits).max() <= TOLERANCE
    row.evict(request.kept_tokens, by_layer(session, extended.choice.kept_indices))
    expected = row.append(question)[[15, QUESTION - 1]]
    assert np.abs(np.array(behind) - expected).max() <= TOLERANCE
