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

from chunkkv.errors import ConfigError, NativeArgumentError
from chunkkv.limits import CHOICES, KEEP_SCALE, KERNEL_CHOICES
from chunkkv.native.arguments import settings_struct
from chunkkv.settings import ChunkKVSettings, keep_ratio_to_per_10k

lengths = st.integers(0, 2**31 - 1)
ratios = st.integers(1, KEEP_SCALE)
least = st.integers(46, 4_000)
CLASSES = {
    "budget_split": "classes",
    "num_kv_heads": 4,
    "reading_heads": ((0, 2), (), (0, 1, 2)),
    "reading_share_per_10k": 20_000,
    "local_share_per_10k": 2_857,
}
NOT_IN_KERNELS = [(name, word) for name, words in KERNEL_CHOICES.items() for word in CHOICES[name] if word not in words]
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


@drawn
@given(
    length=st.integers(0, 2**20),
    ratio=ratios,
    budget=st.one_of(st.just(0), st.integers(1, 2**20)),
    min_tokens=least,
    reading=st.lists(st.sets(st.integers(0, 7)), min_size=1, max_size=5),
    share=st.integers(10_000, 60_000),
)
def test_classes_keep_what_was_requested_in_total(
    length: int, ratio: int, budget: int, min_tokens: int, reading: list[set[int]], share: int
) -> None:
    heads, readers = 8 * len(reading), sum(map(len, reading))
    share = min(share, heads * KEEP_SCALE // readers) if 0 < readers < heads else KEEP_SCALE
    local = (heads * KEEP_SCALE - readers * share) // (heads - readers) if readers < heads else KEEP_SCALE
    options = ChunkKVSettings(
        min_tokens=min_tokens,
        budget_split="classes",
        num_kv_heads=8,
        reading_heads=tuple(tuple(sorted(heads)) for heads in reading),
        reading_share_per_10k=share,
        local_share_per_10k=local,
    )
    kept = options.kept_tokens(length, ratio, budget)
    of_reading, of_local = options.class_lengths(length, ratio, budget)
    assert min(length, min_tokens) <= of_local <= kept <= of_reading <= length
    total = readers * of_reading + (heads - readers) * of_local
    # Whole tokens per head: less than one per local head is left over.
    assert total <= heads * kept < total + max(heads - readers, 1)
    if length <= min_tokens or readers in (0, heads):
        assert of_reading == of_local == kept
    elif ratio == KEEP_SCALE and not budget:
        assert of_reading == of_local == length
    elif heads * kept - (heads - readers) * min_tokens > readers * length and not budget:
        assert of_reading == min(length, max(min_tokens, length * ratio * share // 10**8))


def test_a_uniform_budget_has_one_length_class() -> None:
    options = ChunkKVSettings(keep_per_10k=2_000, layer_groups=((0,), (1,)))
    assert options.length_classes == 1
    assert options.class_lengths(1_000) == options.class_capacities(1_000) == (200,)
    assert options.class_lengths(1_000, 3_000) == (300,)
    assert options.class_lengths(1_000, budget_tokens=90) == (90,)


def test_class_lengths_follow_the_shares() -> None:
    options = ChunkKVSettings(keep_per_10k=2_000, **CLASSES)
    assert options.length_classes == 2
    assert options.class_lengths(1_000) == options.class_capacities(1_000) == (390, 64)
    assert options.class_lengths(10_000) == (4_000, 571)
    assert options.class_lengths(10_000, budget_tokens=1_000) == (2_000, 285)
    assert options.class_lengths(10_000, 8_000) == (10_000, 6_571)
    assert options.class_lengths(64) == (64, 64)


def test_ranked_layers_may_keep_what_all_others_leave() -> None:
    options = ChunkKVSettings(keep_per_10k=2_000, budget_split="ranked", layer_groups=((0,), (1,), (2,)))
    assert options.length_classes == 3
    assert options.class_capacities(1_000) == (600 - 2 * 30,) * 3
    assert options.class_capacities(1_000, 9_000) == (1_000,) * 3
    with pytest.raises(ConfigError, match=naming("'ranked' class_capacities")):
        options.class_lengths(1_000)


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
            {"min_tokens": 29},
            "min_tokens 29 window sinks chunk_size 30",
        ),
        (
            {"budget_tokens": 63},
            "budget_tokens 63 min_tokens 64",
        ),
        ({"max_keep_per_10k": 4_999}, "keep_ratio 0.5 max_keep_ratio 0.4999"),
        ({"window_reduce": "sum"}, "window_reduce 'sum' mean max"),
        ({"head_reduce": "sum"}, "head_reduce 'sum' mean max"),
        ({"value_norm": True}, "value_norm True off on"),
        ({"heads": "own"}, "heads 'own' shared each"),
        ({"budget_split": "even"}, "budget_split 'even' uniform classes ranked"),
        ({"local_policy": "last"}, "local_policy 'last' chunks recent"),
        ({"score": "logits", "value_norm": "on"}, "value_norm 'on' 'logits' 'softmax' 'off'"),
        ({"score": "given", "head_reduce": "max"}, "head_reduce 'max' 'given' 'softmax' 'mean'"),
        ({"leaders": (0,)}, "leaders (0,) ()"),
        ({"leaders": (0, 1), "layer_groups": ((0, 1), (2,))}, "leaders (0,1) ((0,1),(2,))"),
        ({"leaders": (0,), "layer_groups": ((0, 1), (2,))}, "leaders (0,) ((0,1),(2,))"),
        ({"budget_split": "classes"}, "num_kv_heads 0 'classes'"),
        ({"reading_heads": ((0,),)}, "reading_heads ((0,),) 'uniform' 'classes'"),
        ({"reading_share_per_10k": 20_000}, "reading_share_per_10k 20000 local_share_per_10k 10000 'classes'"),
        ({"local_share_per_10k": 10_001}, "local_share_per_10k 10001 0 10000"),
        ({"reading_share_per_10k": 9_999}, "reading_share_per_10k 9999 10000"),
        ({"budget_split": "ranked", "heads": "each"}, "num_kv_heads 0 'ranked' 'each'"),
        ({"budget_split": "ranked", "num_kv_heads": 2}, "num_kv_heads 2 'ranked' heads 'each'"),
        ({"budget_split": "ranked", "reading_heads": ((0,),)}, "reading_heads 'ranked' 'classes'"),
        ({"budget_split": "ranked", "layer_groups": ((0, 1),)}, "'ranked' ((0,1),) layer_reuse 1"),
        ({**CLASSES, "local_share_per_10k": 5_000}, "20000 5 5000 7 average 11250.0 10000"),
        ({**CLASSES, "reading_heads": ((0, 2), (), (0, 1, 4))}, "layer 2 (0,1,4) 0 3"),
        ({**CLASSES, "reading_heads": ((2, 0), (), (0, 1, 2))}, "layer 0 (2,0) ascending"),
        ({**CLASSES, "reading_heads": ((0, 0), (), (0, 1, 2))}, "layer 0 (0,0) once"),
        ({**CLASSES, "layer_groups": ((0,), (1,))}, "reading_heads 3 2"),
        ({**CLASSES, "layer_groups": ((0,), (1, 2))}, "(1,2) [(),(0,1,2)] reading_heads"),
    ],
)
def test_every_invalid_value_is_named_with_what_is_allowed(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=naming(named)):
        ChunkKVSettings(**changes)


def test_the_rule_of_heads_follows_the_score() -> None:
    used = [ChunkKVSettings(score=score) for score in ("softmax", "logits", "given")]
    assert [one.head_reduce for one in used] == ["max", "mean", "mean"]
    changed = dataclasses.replace(used[0], window_reduce="max", value_norm="on", pooling=3)
    assert changed.with_score("given") == dataclasses.replace(used[2], pooling=3)


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
        {"min_tokens": 30},
        {"pooling": 63},
        {"budget_tokens": 64},
        {"max_keep_per_10k": 5_000},
        {"keep_per_10k": 2_000, "score": "logits", "boundaries": "delimiter", "leader": "first", "pooling": 5},
        {"layer_groups": ((0, 1), (2,), (3, 4, 5))},
        {"layer_groups": ((0, 1), (2, 3)), "leaders": (1, 2)},
        {"window_reduce": "max", "head_reduce": "max", "value_norm": "on", "heads": "each"},
        {"score": "given", "budget_split": "ranked", "layer_groups": ((0,), (1,))},
        {"budget_split": "ranked", "heads": "each", "num_kv_heads": 2, "layer_groups": ((0,), (1,))},
        {**CLASSES, "local_policy": "chunks"},
    ],
)
def test_settings_survive_json(changes: dict[str, Any]) -> None:
    options = ChunkKVSettings(**changes)
    stored = json.loads(json.dumps(options.to_dict()))
    assert ChunkKVSettings.from_dict(stored) == options
    for name, value in changes.items():
        assert stored[name] == json.loads(json.dumps(value))


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
        ({"reading_heads": [0]}, "reading_heads [0]"),
        ({"reading_heads": [[True]]}, "reading_heads [[True]]"),
        ({"leaders": "last"}, "leaders 'last'"),
        ({"leaders": [[0]]}, "leaders [[0]]"),
    ],
)
def test_stored_settings_are_checked(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=naming(named)):
        ChunkKVSettings.from_dict({**ChunkKVSettings().to_dict(), **changes})


@pytest.mark.parametrize(("name", "word"), NOT_IN_KERNELS)
def test_words_that_kernels_do_not_compute_are_refused_by_name(name: str, word: str) -> None:
    classes = CLASSES if (name, word) == ("budget_split", "classes") else {}
    options = ChunkKVSettings(**{name: word, **classes})
    for check in (options.check_kernels, lambda: settings_struct(options)):
        with pytest.raises((ConfigError, NativeArgumentError), match=naming(f"{name} '{word}'")):
            check()


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


def test_a_recipe_may_name_a_leader_per_group() -> None:
    options = ChunkKVSettings(leaders=[1, 2, 4], layer_groups=[[0, 1], [2], [3, 4, 5]])
    assert [options.leader_of(group) for group in options.layer_groups] == [1, 2, 4]
