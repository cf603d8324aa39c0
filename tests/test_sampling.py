"""Choosing tokens: greedy, filters, penalty, seeds, log probabilities, and cutting text at stop strings."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.messages import naming

from chunkkv.errors import RequestError
from chunkkv.sampling import Sampler, SamplingParams, StopText

LOGITS = np.array([1.0, 3.0, 2.0, -1.0, 3.0], np.float32)


def draws(count: int, **params) -> list[int]:
    sampler = Sampler(SamplingParams(**params), np.array([], np.int64), len(LOGITS))
    return [sampler.choose(LOGITS)[0] for _ in range(count)]


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
    assert [sampler.choose(LOGITS)[0] for _ in range(3)] == [4, 2, 0]


def test_repetition_penalty_lowers_negative_logits_too():
    logits = np.array([-1.0, -1.5], np.float32)
    assert Sampler(SamplingParams(repetition_penalty=2.0), np.array([0]), 2).choose(logits)[0] == 1


def test_logprob_is_of_the_model_not_of_the_filtered_distribution():
    sampler = Sampler(SamplingParams(temperature=1.0, top_k=1, seed=0, logprobs=True), np.array([]).astype(int), 5)
    token, logprob = sampler.choose(LOGITS)
    expected = float(LOGITS[token]) - math.log(np.exp(LOGITS.astype(np.float64)).sum())
    assert logprob == pytest.approx(expected, abs=1e-6)


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
        ("seed", -1),
        ("stop", ("",)),
        ("stop", (3,)),
        ("stop", 5),
        ("ignore_eos", "no"),
        ("logprobs", 3),
    ],
)
def test_bad_parameters_are_named(name, value):
    with pytest.raises(RequestError, match=naming(name)):
        SamplingParams(**{name: value})


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
