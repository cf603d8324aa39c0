"""Choosing tokens: greedy, filters, penalty, seeds, log probabilities, and cutting text at stop strings."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.messages import naming

from chunkkv.errors import EngineRunError, RequestError
from chunkkv.sampling import Sampler, SamplingParams, check_bias
from chunkkv.stop_text import StopText

LOGITS = np.array([1.0, 3.0, 2.0, -1.0, 3.0], np.float32)


def draws(count: int, **params) -> list[int]:
    sampler = Sampler(SamplingParams(**params), np.array([], np.int64), len(LOGITS))
    return [sampler.choose(LOGITS).token for _ in range(count)]


def test_greedy_takes_the_lowest_id_of_equal_logits():
    assert draws(3) == [1, 1, 1]


def test_sampling_follows_the_softmax():
    counts = np.bincount(draws(4000, temperature=1.0, seed=0), minlength=5) / 4000
    expected = np.exp(LOGITS) / np.exp(LOGITS).sum()
    assert np.abs(counts - expected).max() < 0.03


def test_top_k_keeps_the_k_best():
    assert set(draws(300, temperature=5.0, top_k=2, seed=1)) == {1, 4}


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    probabilities = np.exp(LOGITS) / np.exp(LOGITS).sum()
    top_p = float(probabilities[1] + probabilities[4] + 0.01)  # the two best fall just short, so a third belongs to it
    assert set(draws(500, temperature=1.0, top_p=top_p, seed=2)) == {1, 2, 4}
    assert set(draws(50, temperature=1.0, top_p=1e-6, seed=2)) == {1}


def test_seed_makes_a_prompt_repeatable():
    first = draws(20, temperature=1.0, seed=7)
    assert first == draws(20, temperature=1.0, seed=7)
    assert first != draws(20, temperature=1.0, seed=8)


def test_repetition_penalty_counts_prompt_and_answer():
    sampler = Sampler(SamplingParams(repetition_penalty=4.0), np.array([1]), len(LOGITS))
    assert [sampler.choose(LOGITS).token for _ in range(3)] == [4, 2, 0]


def test_repetition_penalty_lowers_negative_logits_too():
    logits = np.array([-1.0, -1.5], np.float32)
    assert Sampler(SamplingParams(repetition_penalty=2.0), np.array([0]), 2).choose(logits).token == 1


def test_logprob_is_of_the_model_not_of_the_filtered_distribution():
    sampler = Sampler(SamplingParams(temperature=1.0, top_k=1, seed=0, logprobs=True), np.array([]).astype(int), 5)
    choice = sampler.choose(LOGITS)
    expected = float(LOGITS[choice.token]) - math.log(np.exp(LOGITS.astype(np.float64)).sum())
    assert choice.logprob == pytest.approx(expected, abs=1e-6)


def test_penalties_count_the_tokens_of_the_answer_alone():
    logits = np.array([1.0, 3.0, 2.5, 0.0], np.float32)
    presence = Sampler(SamplingParams(presence_penalty=1.0), np.array([1, 2]), 4)
    assert [presence.choose(logits).token for _ in range(5)] == [1, 2, 1, 1, 1]
    frequency = Sampler(SamplingParams(frequency_penalty=1.0), np.array([1, 2]), 4)
    assert [frequency.choose(logits).token for _ in range(5)] == [1, 2, 1, 2, 0]


def test_penalties_count_the_tokens_of_the_prompt_where_asked():
    logits, prompt = np.array([1.0, 3.0, 2.5, 0.0], np.float32), np.array([1, 2, 1])
    presence = Sampler(SamplingParams(presence_penalty=2.5, penalise_prompt=True), prompt, 4)
    assert [presence.choose(logits).token for _ in range(3)] == [0, 1, 1]
    frequency = Sampler(SamplingParams(frequency_penalty=1.0, penalise_prompt=True), prompt, 4)
    assert [frequency.choose(logits).token for _ in range(3)] == [2, 0, 1]


def test_a_bias_is_added_to_the_logits_and_not_to_log_probabilities():
    sampler = Sampler(SamplingParams(logit_bias={0: 2.5, 1: -100}, logprobs=True), np.array([], np.int64), 5)
    choice = sampler.choose(LOGITS)
    assert choice.token == 0
    assert choice.logprob == pytest.approx(1.0 - math.log(np.exp(LOGITS.astype(np.float64)).sum()), abs=1e-6)
    with pytest.raises(RequestError, match=naming("logit_bias 5 4")):
        check_bias(SamplingParams(logit_bias={5: 1.0}), 5)


@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_end_tokens_are_not_chosen_within_min_tokens(temperature: float) -> None:
    params = SamplingParams(min_tokens=3, temperature=temperature, seed=0)
    sampler = Sampler(params, np.array([], np.int64), 5, end_ids=[1, 4])
    tokens = [sampler.choose(LOGITS * 9).token for _ in range(4)]
    assert tokens[:3] == [2, 2, 2] and tokens[3] in (1, 4)


def test_the_likeliest_tokens_come_with_their_log_probabilities() -> None:
    sampler = Sampler(SamplingParams(logprobs=True, top_logprobs=3), np.array([], np.int64), 5)
    choice = sampler.choose(LOGITS)
    exact = LOGITS.astype(np.float64) - math.log(np.exp(LOGITS.astype(np.float64)).sum())
    assert [token for token, _ in choice.top] == [1, 4, 2]
    np.testing.assert_allclose([logprob for _, logprob in choice.top], exact[[1, 4, 2]], atol=1e-12)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.5),
        ("max_new_tokens", True),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("repetition_penalty", 1e-50),
        ("repetition_penalty", 1e300),
        ("temperature", 10**400),
        ("seed", -1),
        ("stop", ("",)),
        ("stop", (3,)),
        ("stop", 5),
        ("stop_token_ids", 5),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", "1"),
        ("ignore_eos", "no"),
        ("logprobs", 3),
        ("min_p", 1.1),
        ("min_p", -0.1),
        ("presence_penalty", 101),
        ("frequency_penalty", math.nan),
        ("logit_bias", [1]),
        ("logit_bias", {"1": 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: 101}),
        ("logit_bias", {1: True}),
        ("min_tokens", -1),
        ("min_tokens", 129),
        ("top_logprobs", 2),
        ("top_logprobs", 101),
    ],
)
def test_bad_parameters_are_named(name, value):
    with pytest.raises(RequestError, match=naming(name)):
        SamplingParams(**{name: value})


def by_full_sort(scores: np.ndarray, params: SamplingParams, uniform: float) -> int:
    """Draw the plain way: rank the whole vocabulary, cut it, and look `uniform` up in the sums of the probabilities."""
    order = np.argsort(-scores, kind="stable")
    ratios = np.exp((scores[order].astype(np.float64) - scores.max()) / params.temperature)
    order = order[ratios >= params.min_p][: params.top_k or None]
    ranked = scores[order].astype(np.float64) / params.temperature
    weights = np.exp(ranked - ranked[0])
    weights /= weights.sum()
    if params.top_p < 1:
        count = max(1, int((np.cumsum(weights) - weights < params.top_p).sum()))
        order, weights = order[:count], weights[:count] / weights[:count].sum()
    return int(order[min(int(np.searchsorted(np.cumsum(weights), uniform, "right")), len(order) - 1)])


SHAPES = {
    "flat": lambda random: random.standard_normal(30_000),
    "peaked": lambda random: random.standard_normal(30_000) * 3 + np.where(random.random(30_000) < 1e-3, 12, 0),
    "ties": lambda random: np.round(random.standard_normal(30_000) * 2),
    "wide": lambda random: random.standard_normal(30_000) * 1e37,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"top_k": 50},
        {"top_p": 0.9},
        {"top_k": 20_000, "top_p": 0.5},
        {"top_p": 1e-9},
        {"min_p": 0.2},
        {"min_p": 0.01, "top_k": 9, "top_p": 0.8},
    ],
    ids=str,
)
def test_tokens_of_a_seed_equal_those_of_a_full_sort(shape: str, filters: dict) -> None:
    logits = SHAPES[shape](np.random.default_rng(3)).astype(np.float32)
    params = SamplingParams(temperature=0.7, seed=5, **filters)
    sampler = Sampler(params, np.array([], np.int64), len(logits))
    uniforms = np.random.default_rng(5)
    expected = [by_full_sort(logits, params, uniforms.random()) for _ in range(20)]
    assert [sampler.choose(logits).token for _ in range(20)] == expected


def test_no_more_than_a_part_of_a_vocabulary_is_sorted(monkeypatch) -> None:
    logits = np.random.default_rng(0).standard_normal(151_936).astype(np.float32)
    lengths = []
    argsort = np.argsort
    monkeypatch.setattr(
        np, "argsort", lambda values, **options: lengths.append(len(values)) or argsort(values, **options)
    )
    for filters in ({}, {"top_k": 50}, {"top_p": 0.9}):
        sampler = Sampler(SamplingParams(temperature=0.7, seed=1, **filters), np.array([], np.int64), len(logits))
        for _ in range(5):
            sampler.choose(logits)
    assert lengths and max(lengths) < 1000


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1e-310},
        {"temperature": 5e-324, "top_p": 0.5},
        {"temperature": 1e308, "top_k": 3},
        {"temperature": 1e-310, "repetition_penalty": 1e-3},
        {"temperature": 1.0, "repetition_penalty": 1e3},
        {"repetition_penalty": 1e-3},
        {"temperature": np.float32(1e-40)},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [1.0, 1e38])
def test_extreme_values_are_right_and_silent(settings: dict, size: float) -> None:
    logits = np.resize(LOGITS, 5000) * np.float32(size)
    sampler = Sampler(SamplingParams(seed=0, logprobs=True, **settings), np.array([0, 3]), len(logits))
    for _ in range(5):
        choice = sampler.choose(logits)
        token, logprob = choice.token, choice.logprob
        assert 0 <= token < len(logits) and logprob is not None and math.isfinite(logprob)
        if settings.get("temperature", 1.0) < 1e-30 and "repetition_penalty" not in settings:
            assert logits[token] == logits.max()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_that_are_not_finite_are_an_error(value: float, temperature: float) -> None:
    logits = np.array([1.0, value, 2.0, value], np.float32)
    sampler = Sampler(SamplingParams(temperature=temperature), np.array([], np.int64), len(logits))
    with pytest.raises(EngineRunError, match=naming("2 4 infinite NaN")):
        sampler.choose(logits)


@pytest.mark.parametrize(
    ("name", "value", "plain"),
    [
        ("max_new_tokens", np.int8(100), 100),
        ("top_k", np.uint16(7), 7),
        ("seed", np.int64(2), 2),
        ("temperature", np.float32(0.5), 0.5),
        ("top_p", np.float16(0.5), 0.5),
        ("repetition_penalty", np.int64(2), 2.0),
        ("ignore_eos", np.True_, True),
    ],
)
def test_numbers_of_numpy_become_pythons(name: str, value: object, plain: object) -> None:
    stored = getattr(SamplingParams(**{name: value}), name)
    assert stored == plain and type(stored) is type(plain)


def test_one_stop_string_may_be_given_bare():
    assert SamplingParams(stop="end").stop == ("end",)


@given(
    text=st.text(alphabet="ab.", max_size=40),
    stops=st.lists(st.text(alphabet="ab.", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 40), max_size=6),
)
def test_stop_text_equals_searching_the_whole_text(text, stops, cuts):
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    stop = StopText(tuple(stops))
    shown = ""
    seen = ""
    for left, right in itertools.pairwise(edges):
        seen = text[:right]
        shown += stop.push(text[left:right])
        if stop.found:
            break
    shown += stop.flush()
    places = [place for place in (seen.find(s) for s in stops) if place >= 0]
    assert stop.found == bool(places)
    assert shown == (text[: min(places)] if places else text)


SPECIAL = {"<|end|>": 1, "<|end|>x": 3, "<|turn|>": 2}


def stopped(stop: list[str], stream: list[str | int]) -> tuple[str, bool]:
    cutter = StopText(stop, SPECIAL)
    text = "".join(cutter.push_special(part) if isinstance(part, int) else cutter.push(part) for part in stream)
    return text + cutter.flush(), cutter.found


@pytest.mark.parametrize(
    ("stop", "stream", "expected"),
    [
        (["<|end|>"], ["a", 1, "b"], ("a", True)),
        (["<|end|>"], ["a", 2, "b"], ("ab", False)),
        (["<|end|>x"], ["a", 1, "b", 3, "c"], ("ab", True)),
        (["b<|end|>\n"], ["ab", 1, "\nc"], ("a", True)),
        (["b<|end|>\n"], ["ab", 1, "c"], ("abc", False)),
        (["b<|end|>\n"], ["ab", 1], ("ab", False)),
        (["<|turn|><|end|>"], ["a", 2, 2, 1, "c"], ("a", True)),
        (["<|end|>"], ["a<|e", "nd|>b"], ("a", True)),
        (["ab"], ["a", 1, "b"], ("", True)),
    ],
)
def test_special_tokens_in_stop_strings_are_found_by_their_id(stop: list, stream: list, expected: tuple) -> None:
    assert stopped(stop, stream) == expected
