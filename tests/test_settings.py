"""Settings: N(L), what is refused and how it is said, and their form in config.json."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkkv.errors import ConfigError
from chunkkv.settings import KEEP_SCALE, ChunkKVSettings, keep_ratio_to_per_10k

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
        (0, r"share is 0; allowed is \(0, 1\]: 0\.2 keeps 20 %"),
        (-0.5, r"share is -0\.5; allowed is"),
        (1.0001, r"share is 1\.0001; allowed is"),
        (20, "share is 20; allowed is"),
        (math.nan, "share is nan; allowed is"),
        (math.inf, "share is inf; allowed is"),
        (1e-5, r"share is 1e-05; the smallest keep ratio is 0\.0001"),
        (True, r"share is True; give a number in \(0, 1\]"),
        ("0.2", "share is '0.2'; give a number"),
        (None, "share is None; give a number"),
    ],
)
def test_bad_ratios_are_named(ratio: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        keep_ratio_to_per_10k(ratio, "share")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"keep_per_10k": 0}, "keep_per_10k is 0; allowed is 1 to 10000"),
        ({"keep_per_10k": 10_001}, "keep_per_10k is 10001; allowed is 1 to 10000"),
        ({"budget_tokens": -1}, "budget_tokens is -1; allowed is 0 to 2147483647"),
        ({"budget_tokens": 2**31}, "budget_tokens is 2147483648; allowed"),
        ({"max_keep_per_10k": 0}, "max_keep_per_10k is 0; allowed is 1 to 10000"),
        ({"window": 0}, "window is 0; allowed is 1 to 128"),
        ({"window": 129}, "window is 129; allowed is 1 to 128"),
        ({"window": True}, "window is True; give a whole number from 1 to 128"),
        ({"chunk_size": 0}, "chunk_size is 0; allowed is 1 to 256"),
        ({"chunk_size": 2.0}, r"chunk_size is 2\.0; give a whole number from 1 to 256"),
        ({"sinks": -1}, "sinks is -1; allowed is 0 to 65536"),
        ({"sinks": "4"}, "sinks is '4'; give a whole number"),
        ({"pooling": 0}, "pooling is 0; allowed is 1 to 63"),
        ({"pooling": 4}, r"pooling is 4; allowed are odd values \(1 = off, 5 = SnapKV's\)"),
        ({"pooling": 65}, "pooling is 65; allowed is 1 to 63"),
        ({"boundaries": "sentence"}, "boundaries is 'sentence'; allowed is fixed or delimiter"),
        ({"leader": None}, "leader is None; allowed is first or last"),
        ({"score": "mean"}, "score is 'mean'; allowed is softmax or logits"),
        ({"min_tokens": 0}, "min_tokens is 0; allowed is 1 to"),
        (
            {"min_tokens": 45},
            r"min_tokens is 45; it must be at least window \+ sinks \+ chunk_size = 46: raise min_tokens",
        ),
        (
            {"budget_tokens": 63},
            "budget_tokens is 63, below min_tokens = 64, which is kept anyway: raise budget_tokens",
        ),
        ({"max_keep_per_10k": 4_999}, r"keep_ratio 0\.5 is above max_keep_ratio 0\.4999: raise max_keep_ratio"),
    ],
)
def test_every_invalid_value_is_named_with_what_is_allowed(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
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
        ({"windows": 3}, "unknown chunkkv setting 'windows'; known are boundaries, budget_tokens, chunk_size"),
        ({"window": None}, "window is None; give a whole number"),
        ({"pooling": 2}, "pooling is 2; allowed are odd"),
        ({"layer_groups": "all"}, "layer_groups is 'all'; give a list of non-empty lists of layer numbers"),
        ({"layer_groups": [[0], []]}, r"layer_groups is \[\[0\], \[\]\]"),
        ({"layer_groups": [0, 1]}, r"layer_groups is \[0, 1\]"),
        ({"layer_groups": [["0"]]}, r"layer_groups is \[\['0'\]\]"),
    ],
)
def test_stored_settings_are_checked(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ChunkKVSettings.from_dict({**ChunkKVSettings().to_dict(), **changes})


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ChunkKVSettings)])
def test_no_stored_setting_may_be_missing(name: str) -> None:
    values = ChunkKVSettings().to_dict()
    del values[name]
    with pytest.raises(ConfigError, match=f"chunkkv setting '{name}' is missing"):
        ChunkKVSettings.from_dict(values)


@pytest.mark.parametrize(("leader", "expected"), [("first", [0, 2, 3]), ("last", [1, 2, 5])])
def test_the_leader_is_the_first_or_last_of_a_group(leader: str, expected: list[int]) -> None:
    options = ChunkKVSettings(leader=leader, layer_groups=[[0, 1], [2], [3, 4, 5]])
    assert options.layer_groups == ((0, 1), (2,), (3, 4, 5))
    assert [options.leader_of(group) for group in options.layer_groups] == expected
