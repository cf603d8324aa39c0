"""Continuations behind a compressed prompt score as in the session itself, in blocks and token by token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support import engines
from support.messages import naming

from chunkkv import SamplingParams
from chunkkv.errors import RequestError
from chunkkv.evaluation.lm_eval import continuations
from chunkkv.evaluation.lm_eval.continuations import CompressedPrompt, log_probabilities
from chunkkv.session import ChunkKVSession

STEPS = 9


@pytest.fixture(scope="module")
def session() -> ChunkKVSession:
    return engines.session("llama3")


def prompt(length: int) -> list[int]:
    return np.random.default_rng([5, length]).integers(3, 384, length).tolist()


@pytest.mark.parametrize("keep_ratio", [1.0, 0.4])
def test_a_greedy_answer_scores_what_the_session_said_of_it(
    session: ChunkKVSession, keep_ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuations, "BLOCK", 4)  # so that there are several blocks
    ids = prompt(60)
    sampling = SamplingParams(max_new_tokens=STEPS, logprobs=True, ignore_eos=True)
    result = session.generate(ids, sampling, keep_ratio=keep_ratio)
    compressed = CompressedPrompt(session, ids, STEPS, keep_ratio)
    assert compressed.kept_tokens == result.statistics.kept_tokens
    total, greedy = compressed.score(result.token_ids)
    assert greedy and total == pytest.approx(sum(result.logprobs), abs=1e-4)
    part, _ = compressed.score(result.token_ids, skipped=3)
    assert part == pytest.approx(sum(result.logprobs[3:]), abs=1e-4)
    other = [*result.token_ids[:-1], (result.token_ids[-1] + 1) % 384]
    worse, greedy = compressed.score(other)
    assert worse < total and not greedy
    assert compressed.score(result.token_ids) == (total, True)  # nothing is left of what was scored before


def test_compression_changes_all_but_the_first_score(session: ChunkKVSession) -> None:
    ids, tokens = prompt(80), prompt(STEPS)
    full, kept = (CompressedPrompt(session, ids, STEPS, keep_ratio) for keep_ratio in (1.0, 0.2))
    assert full.score(tokens[:1])[0] == pytest.approx(kept.score(tokens[:1])[0], abs=1e-6)
    assert abs(full.score(tokens)[0] - kept.score(tokens)[0]) > 1e-3


class _StepsOnly:
    """An executor that scores one token at a time, as those without the capability block_scoring do."""

    def __init__(self, executor: Any) -> None:
        self.capabilities = replace(executor.capabilities, block_scoring=False)
        for name in ("capacity_for", "new_cache", "prefiller", "decoder"):
            setattr(self, name, getattr(executor, name))


def test_token_by_token_gives_the_same(session: ChunkKVSession) -> None:
    ids, tokens = prompt(70), prompt(STEPS)
    stepwise = ChunkKVSession(_StepsOnly(session.executor), session.settings, session.limits)
    for keep_ratio in (1.0, 0.3):
        expected = CompressedPrompt(session, ids, STEPS, keep_ratio).score(tokens)
        found = CompressedPrompt(stepwise, ids, STEPS, keep_ratio).score(tokens)
        assert found[0] == pytest.approx(expected[0], abs=1e-4) and found[1] == expected[1]


def test_a_continuation_beyond_the_engine_is_refused(session: ChunkKVSession) -> None:
    with pytest.raises(RequestError, match=naming("engine 256")):
        CompressedPrompt(session, prompt(250), 7)


def test_log_probabilities_do_not_overflow() -> None:
    logits = np.array([[1e4, 0.0, 0.0], [0.0, 0.0, 0.0]], np.float32)
    np.testing.assert_allclose(log_probabilities(logits, np.array([1, 2])), [-1e4, -np.log(3)])
