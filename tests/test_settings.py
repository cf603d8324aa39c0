"""Settings: N(L), what is refused and how it is said, and their form in config.json."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.messages import naming

from chunkkv.errors import ConfigError
from chunkkv.limits import KEEP_SCALE
from chunkkv.settings import ChunkKVSettings, keep_ratio_to_per_10k

lengths = st.integers(0, 2**31 - 1)
ratios = st.integers(1, KEEP_SCALE)
least = st.integers(46, 4_000)
drawn = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@drawn
@given(length=lengths, ratio=ratios, min_tokens=least)
def test_ratio_mode_is_the_integer_formula(length: int, ratio: int, min_tokens: int) -> None:
    kept = ChunkKVSettings(keep_per_10k=ratio, min_tokens=min_tokens).kept_tokens(length)
    assert kept == min(length, max(min_tokens, (length * ratio - length * ratio % 10_000) // 10_000))
    assert min(length, min_tokens) <= kept <= length
    assert ChunkKVSettings(min_tokens=min_tokens).kept_tokens(length, keep_per_10k=ratio) == kept
    if length > min_tokens:
        assert abs(kept - max(min_tokens, length * ratio / 10_000)) < 1


@drawn
@given(length=lengths, budget=st.integers(1, 2**31 - 1), min_tokens=least)
def test_budget_mode_is_the_integer_formula(length: int, budget: int, min_tokens: int) -> None:
    expected = min(length, max(min_tokens, budget))
    assert ChunkKVSettings(min_tokens=min_tokens).kept_tokens(length, budget_tokens=budget) == expected
    if budget >= min_tokens:
        assert ChunkKVSettings(min_tokens=min_tokens, budget_tokens=budget).kept_tokens(length) == expected


@drawn
@given(length=lengths, more=lengths, ratio=ratios, higher=ratios, min_tokens=least)
def test_kept_tokens_grow_with_length_and_ratio(length: int, more: int, ratio: int, higher: int, min_tokens) -> None:
    options = ChunkKVSettings(min_tokens=min_tokens)
    (short, long), (low, high) = sorted((length, more)), sorted((ratio, higher))
    assert options.kept_tokens(short, low) <= options.kept_tokens(long, low) <= options.kept_tokens(long, high)
    assert options.kept_tokens(long, KEEP_SCALE) == long


def test_a_request_overrides_the_mode_of_the_engine() -> None:
    budget = ChunkKVSettings(budget_tokens=100, keep_per_10k=5_000)
    assert budget.kept_tokens(1_000) == 100
    assert budget.kept_tokens(1_000, keep_per_10k=3_000) == 300
    assert budget.kept_tokens(1_000, budget_tokens=0) == 500
    assert budget.kept_tokens(1_000, budget_tokens=200) == 200
    assert ChunkKVSettings(keep_per_10k=2_000).kept_tokens(1_000, budget_tokens=300) == 300


@pytest.mark.parametrize(
    ("ratio", "expected"), [(1, 10_000), (1.0, 10_000), (0.2, 2_000), (0.1, 1_000), (1e-4, 1), (0.33333, 3_333)]
)
def test_ratios_round_to_ten_thousandths(ratio: float, expected: int) -> None:
    assert keep_ratio_to_per_10k(ratio) == expected
    assert ChunkKVSettings(keep_per_10k=expected).keep_ratio == pytest.approx(ratio, abs=5e-5)


@pytest.mark.parametrize(
    ("ratio", "named"),
    [
        (0, "share 0 (0,1]"),
        (-0.5, "share -0.5 (0,1]"),
        (1.0001, "share 1.0001 (0,1]"),
        (20, "share 20 (0,1]"),
        (math.nan, "share nan (0,1]"),
        (math.inf, "share inf (0,1]"),
        (1e-5, "share 1e-05 0.0001"),
        (True, "share True (0,1]"),
        ("0.2", "share '0.2'"),
        (None, "share None"),
    ],
)
def test_bad_ratios_are_named(ratio: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=naming(named)):
        keep_ratio_to_per_10k(ratio, "share")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"keep_per_10k": 0}, "keep_per_10k 0 1 10000"),
        ({"keep_per_10k": 10_001}, "keep_per_10k 10001 1 10000"),
        ({"budget_tokens": -1}, "budget_tokens -1 0 2147483647"),
        ({"budget_tokens": 2**31}, "budget_tokens 2147483648"),
        ({"max_keep_per_10k": 0}, "max_keep_per_10k 0 1 10000"),
        ({"window": 0}, "window 0 1 128"),
        ({"window": 129}, "window 129 1 128"),
        ({"window": True}, "window True 1 128"),
        ({"chunk_size": 0}, "chunk_size 0 1 256"),
        ({"chunk_size": 2.0}, "chunk_size 2.0 1 256"),
        ({"sinks": -1}, "sinks -1 0 65536"),
        ({"sinks": "4"}, "sinks '4'"),
        ({"pooling": 0}, "pooling 0 1 63"),
        ({"pooling": 4}, "pooling 4 odd"),
        ({"pooling": 65}, "pooling 65 1 63"),
        ({"boundaries": "sentence"}, "boundaries 'sentence' fixed delimiter"),
        ({"leader": None}, "leader None first last"),
        ({"score": "mean"}, "score 'mean' softmax logits"),
        ({"min_tokens": 0}, "min_tokens 0 1"),
        (
            {"min_tokens": 45},
            "min_tokens 45 window sinks chunk_size 46",
        ),
        (
            {"budget_tokens": 63},
            "budget_tokens 63 min_tokens 64",
        ),
        ({"max_keep_per_10k": 4_999}, "keep_ratio 0.5 max_keep_ratio 0.4999"),
    ],
)
def test_every_invalid_value_is_named_with_what_is_allowed(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=naming(named)):
        ChunkKVSettings(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"keep_per_10k": 1},
        {"keep_per_10k": 10_000},
        {"window": 1},
        {"window": 128, "min_tokens": 142},
        {"chunk_size": 1},
        {"chunk_size": 256, "min_tokens": 292},
        {"sinks": 0},
        {"min_tokens": 46},
        {"pooling": 63},
        {"budget_tokens": 64},
        {"max_keep_per_10k": 5_000},
        {"keep_per_10k": 2_000, "score": "logits", "boundaries": "delimiter", "leader": "first", "pooling": 5},
        {"layer_groups": ((0, 1), (2,), (3, 4, 5))},
    ],
)
def test_settings_survive_json(changes: dict[str, Any]) -> None:
    options = ChunkKVSettings(**changes)
    stored = json.loads(json.dumps(options.to_dict()))
    assert ChunkKVSettings.from_dict(stored) == options
    for name, value in changes.items():
        assert stored[name] == ([list(group) for group in value] if name == "layer_groups" else value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"windows": 3}, "'windows' boundaries budget_tokens chunk_size"),
        ({"window": None}, "window None"),
        ({"pooling": 2}, "pooling 2 odd"),
        ({"layer_groups": "all"}, "layer_groups 'all'"),
        ({"layer_groups": [[0], []]}, "layer_groups [[0],[]]"),
        ({"layer_groups": [0, 1]}, "layer_groups [0,1]"),
        ({"layer_groups": [["0"]]}, "layer_groups [['0']]"),
    ],
)
def test_stored_settings_are_checked(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=naming(named)):
        ChunkKVSettings.from_dict({**ChunkKVSettings().to_dict(), **changes})


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ChunkKVSettings)])
def test_no_stored_setting_may_be_missing(name: str) -> None:
    values = ChunkKVSettings().to_dict()
    del values[name]
    with pytest.raises(ConfigError, match=naming(f"'{name}' missing")):
        ChunkKVSettings.from_dict(values)


@pytest.mark.parametrize(("leader", "expected"), [("first", [0, 2, 3]), ("last", [1, 2, 5])])
def test_the_leader_is_the_first_or_last_of_a_group(leader: str, expected: list[int]) -> None:
    options = ChunkKVSettings(leader=leader, layer_groups=[[0, 1], [2], [3, 4, 5]])
    assert options.layer_groups == ((0, 1), (2,), (3, 4, 5))
    assert [options.leader_of(group) for group in options.layer_groups] == expected
