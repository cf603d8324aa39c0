"""Logits and greedy tokens recorded from transformers, for every checkpoint variant; runs without torch.

How the file was made: tests/golden/make_transformers_golden.py, which also describes its keys.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
from support import engines, graphs
from support.checkpoints import VARIANTS, random_tensors, variant_config, weights_sha256
from support.transformers_golden import Golden, load_golden

from chunkkv import SamplingParams
from chunkkv.requests import make_requests

TOLERANCE = 1e-4
PROMPTS = (0, 1)


@pytest.fixture(scope="module")
def golden() -> Golden:
    return load_golden()


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_the_recorded_weights_are_the_ones_written_here(golden, variant: str) -> None:
    assert weights_sha256(random_tensors(variant_config(variant))) == str(golden[f"{variant}/weights_sha256"])


def test_every_variant_is_recorded(golden) -> None:
    recorded = {key.split("/")[0] for key in golden if "/" in key}
    assert recorded == set(VARIANTS)
    with pytest.raises(KeyError, match=r"make_transformers_golden\.py --only falcon"):
        golden["falcon/prompt0"]


@pytest.mark.parametrize("number", PROMPTS)
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_logits_of_prefill_and_continuation(golden, variant: str, number: int) -> None:
    session = engines.session(variant)
    executor = session.executor
    prompt, expected = (golden[f"{variant}/{key}{number}"] for key in ("prompt", "prefill_logits"))
    for cut, logits in zip(range(len(expected))[::-1], expected, strict=True):
        ids = prompt[: len(prompt) - cut]
        request = make_requests([ids], None, session.limits, session.settings, 1.0, None, 12)[0]
        cache = executor.new_cache(1, len(ids) + 12)
        (found,) = executor.prefiller().run([request], cache, threading.Event())
        assert found.choice is None
        assert np.abs(found.logits - logits).max() <= TOLERANCE
    decoder = executor.decoder(cache)
    continuation, later = (golden[f"{variant}/{key}{number}"] for key in ("continuation", "continuation_logits"))
    for step, (token, logits) in enumerate(zip(continuation, later, strict=False)):
        found = decoder.step([0], [token], [len(prompt) + step], [len(prompt) + step])
        assert np.abs(found[0] - logits).max() <= TOLERANCE


@pytest.mark.parametrize("chunkkv", [True, False])
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_greedy_tokens_of_a_batch(golden, variant: str, chunkkv: bool) -> None:
    session = engines.session(variant, chunkkv)
    prompts, expected = ([golden[f"{variant}/{key}{n}"] for n in PROMPTS] for key in ("prompt", "continuation"))
    params = SamplingParams(max_new_tokens=len(expected[0]), ignore_eos=True)
    results = session.generate(prompts, params, keep_ratio=1.0)
    assert [result.token_ids for result in results] == [tuple(tokens.tolist()) for tokens in expected]


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_one_shot_prefill_gives_the_same_logits(golden, variant: str) -> None:
    session = engines.session(variant)
    prompts, expected = ([golden[f"{variant}/{key}{n}"] for n in PROMPTS] for key in ("prompt", "prefill_logits"))
    ids = np.zeros((len(prompts), max(map(len, prompts))), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    rows = np.ones(len(prompts), np.int32)
    inputs = {
        "input_ids": ids,
        "lengths": np.array([len(prompt) for prompt in prompts], np.int32),
        "keep_per_10k": rows * 4_000,
        "budget_tokens": rows * 0,
        "window": rows * session.settings.window,
        "capacity": np.array([ids.shape[1]], np.int64),
    }
    (logits,) = graphs.load(graphs.prefill_path(variant, session)).run(["logits"], inputs)
    assert np.abs(logits[:, 0] - np.array([recorded[-1] for recorded in expected])).max() <= TOLERANCE


def test_a_wrong_position_would_be_seen(golden) -> None:
    """Positions shifted by one step move the logits far beyond the tolerance, so the checks above can fail."""
    session = engines.session("llama3")
    prompt, expected = golden["llama3/prompt0"], golden["llama3/continuation_logits0"][0]
    cache = session.executor.new_cache(1, len(prompt) + 1)
    request = make_requests([prompt], None, session.limits, session.settings, 1.0, None, 1)[0]
    session.executor.prefiller().run([request], cache, threading.Event())
    decoder = session.executor.decoder(cache)
    found = decoder.step([0], [golden["llama3/continuation0"][0]], [len(prompt) + 1], [len(prompt)])
    assert np.abs(found[0] - expected).max() > 100 * TOLERANCE
