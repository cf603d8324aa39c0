"""The NumPy reference beyond one shared choice: windows of requests, reductions, heads, classes, one ranking of all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.messages import naming
from support.op_cases import OpCase, named

from chunkkv import reference, reference_layers
from chunkkv.errors import ConfigError
from chunkkv.settings import ChunkKVSettings

HEADS, KV_HEADS, WINDOW, LENGTH, DIM = 6, 2, 4, 11, 4
GROUP = HEADS // KV_HEADS
TINY = ChunkKVSettings(window=2, chunk_size=3, sinks=1, min_tokens=6, pooling=1)
drawn = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    shapes = (HEADS, WINDOW, DIM), (KV_HEADS, LENGTH, DIM), (KV_HEADS, LENGTH, DIM)
    query, key, value = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return query, key, value


def literal(observed: int, window_reduce: str, head_reduce: str, heads: list[int], norms: bool) -> list[float]:
    """Section 2 as loops over tokens, heads and queries."""
    query, key, value = (array.astype(np.float64) for array in arrays())
    reduce = {"mean": lambda numbers: sum(numbers) / len(numbers), "max": max}
    scores = []
    for token in range(LENGTH - WINDOW):
        of_heads = []
        for head in heads:
            weights = []
            for row in range(WINDOW - observed, WINDOW):
                visible = key[head // GROUP, : LENGTH - WINDOW + row + 1]
                exponents = [np.exp(query[head, row] @ k / DIM**0.5) for k in visible]
                weights.append(exponents[token] / sum(exponents))
            factor = sum(number**2 for number in value[head // GROUP, token]) ** 0.5 if norms else 1.0
            of_heads.append(reduce[window_reduce](weights) * factor)
        scores.append(reduce[head_reduce](of_heads))
    return scores + [0.0] * WINDOW


@pytest.mark.parametrize("observed", [1, 3, WINDOW])
@pytest.mark.parametrize("window_reduce", ["mean", "max"])
@pytest.mark.parametrize("head_reduce", ["mean", "max"])
@pytest.mark.parametrize("norms", [False, True])
def test_scores_equal_literal_loops(observed: int, window_reduce: str, head_reduce: str, norms: bool) -> None:
    query, key, value = arrays()
    words: dict[str, Any] = {"observed": observed, "window_reduce": window_reduce, "head_reduce": head_reduce}
    words["value"] = value if norms else None
    shared = reference.token_scores(query, key, WINDOW, **words)
    each = reference.token_scores(query, key, WINDOW, heads="each", **words)
    every_head = list(range(HEADS))
    np.testing.assert_allclose(shared, literal(observed, window_reduce, head_reduce, every_head, norms), rtol=1e-6)
    for head in range(KV_HEADS):
        group = every_head[head * GROUP : (head + 1) * GROUP]
        np.testing.assert_allclose(
            each[head], literal(observed, window_reduce, head_reduce, group, norms), rtol=1e-6, err_msg=str(head)
        )


def test_logits_of_a_short_window_and_of_each_head() -> None:
    query, key, _ = arrays()
    of_heads = np.einsum("hwd,htd->ht", query[:, -2:], np.repeat(key, GROUP, axis=0))[:, : LENGTH - WINDOW]
    each = reference.token_scores(query, key, WINDOW, score="logits", observed=2, heads="each")
    np.testing.assert_allclose(each[:, : LENGTH - WINDOW], of_heads.reshape(KV_HEADS, GROUP, -1).sum(axis=1), rtol=1e-5)
    shared = reference.token_scores(query, key, WINDOW, score="logits", observed=2)
    np.testing.assert_allclose(shared, each.sum(axis=0), rtol=1e-5)


@pytest.mark.parametrize("observed", [0, WINDOW + 1])
def test_a_window_outside_the_engines_is_named(observed: int) -> None:
    query, key, _ = arrays()
    with pytest.raises(ConfigError, match=naming(f"window {observed} 1 {WINDOW}")):
        reference.token_scores(query, key, WINDOW, observed=observed)


def test_given_scores_are_pooled_and_end_before_the_window() -> None:
    scores = np.array([3.0, 6.0, 9.0, 100.0], dtype=np.float32)
    assert reference.given_scores(scores, 1).tolist() == [3.0, 6.0, 9.0, 0.0]
    assert reference.given_scores(np.stack([scores, 2 * scores]), 1, 3).tolist() == [[3, 6, 5, 0], [6, 12, 10, 0]]


def test_missing_inputs_are_named() -> None:
    call = named("plain").inputs()
    for changes, words in (
        ({"score": "given"}, "score 'given' scores"),
        ({"value_norm": "on"}, "value_norm 'on' value"),
    ):
        with pytest.raises(ConfigError, match=naming(words)):
            reference.select_batch(call.query, call.key, call.lengths, replace(named("plain").settings, **changes))


def test_given_scores_choose_what_the_engines_own_scores_choose() -> None:
    case = named("pooling 3")
    call = case.inputs()
    own = reference.select_batch(call.query, call.key, call.lengths, replace(case.settings, pooling=1))
    raw = reference.select_batch(
        None, call.key, call.lengths, replace(case.settings, pooling=1, score="given"), scores=own.token_scores
    )
    assert all((one == other).all() for one, other in zip(own, raw, strict=True))


def test_recent_keeps_sinks_and_the_last_tokens() -> None:
    assert reference.recent_tokens(10, 5, 2).tolist() == [0, 1, 7, 8, 9]
    assert reference.recent_tokens(10, 5, 0).tolist() == [5, 6, 7, 8, 9]
    assert reference.recent_tokens(4, 9, 2).tolist() == [0, 1, 2, 3]


def test_compaction_copies_each_heads_own_rows() -> None:
    x = np.arange(2 * 5 * 3).reshape(2, 5, 3)
    assert (reference.compact(x, np.array([[0, 4], [1, 2]])) == np.stack([x[0, [0, 4]], x[1, [1, 2]]])).all()
    assert (reference.compact(x, np.array([0, 4])) == x[:, [0, 4]]).all()


def layers_of(options: ChunkKVSettings, count: int, lengths: tuple[int, ...]) -> dict[str, Any]:
    calls = [OpCase(f"layer {layer}", options, lengths, heads=8, kv_heads=4).inputs() for layer in range(count)]
    return {
        "queries": {layer: call.query for layer, call in enumerate(calls)},
        "keys": [call.key for call in calls],
        "lengths": calls[0].lengths,
        "settings": options,
    }


CLASSES = replace(
    TINY,
    keep_per_10k=4_000,
    budget_split="classes",
    num_kv_heads=4,
    layer_groups=((0,), (1,), (2,)),
    reading_heads=((0, 2), (), (0, 1, 2, 3)),
    reading_share_per_10k=15_000,
    local_share_per_10k=5_000,
)


@pytest.mark.parametrize("local_policy", ["recent", "chunks"])
@pytest.mark.parametrize("heads", ["shared", "each"])
def test_classes_keep_their_shares_and_the_total_that_was_requested(local_policy: str, heads: str) -> None:
    options = replace(CLASSES, local_policy=local_policy, heads=heads)
    parts = reference_layers.select_layers(**layers_of(options, 3, (60, 40, 6)))
    # Layer 0: heads 0 and 2 read, 1 and 3 do not; layer 1 has local heads only, layer 2 reading heads only.
    names, counts = ("reading", "local", "local", "reading"), (2, 2, 4, 4)
    assert len(parts) == len(names)
    for row, length in enumerate((60, 40, 6)):
        lengths = dict(zip(("reading", "local"), options.class_lengths(length), strict=True))
        assert [part.kept_lengths[row] for part in parts] == [lengths[name] for name in names]
        total = sum(part.kept_lengths[row] * count for part, count in zip(parts, counts, strict=True))
        assert total <= 12 * options.kept_tokens(length) < total + 6
    if local_policy == "recent":
        assert parts[2].kept_indices.reshape(3, -1, parts[2].kept_indices.shape[-1])[0, 0].tolist() == [
            0,
            *range(60 - parts[2].kept_lengths[0] + 1, 60),
        ]


def test_a_class_chooses_by_its_own_heads() -> None:
    call = layers_of(CLASSES, 3, (60,))
    part = reference_layers.select_layers(**call)[0]
    alone = reference.select_batch(
        call["queries"][0][:, [0, 1, 4, 5]],
        call["keys"][0][:, [0, 2]],
        call["lengths"],
        replace(TINY, layer_groups=()),
        budget_tokens=np.array([CLASSES.class_lengths(60)[0]]),
    )
    assert (part.kept_indices == alone.kept_indices).all()


# One ranking of two layers. Thirteen tokens: sink 0, chunks 1-3, 4-6, 7-9 and 10, window 11-12; every layer keeps its
# best chunk at least.


def ranked(first: list[float], second: list[float], kept: int) -> list[list[int]]:
    options = replace(TINY, budget_split="ranked", layer_groups=((0,), (1,)))
    scores = np.stack([[0.0, *np.repeat(means, [3, 3, 3, 1]), 0.0, 0.0] for means in (first, second)])
    return [
        indices.tolist() for indices in reference_layers.select_ranked(scores.astype(np.float32), 13, kept, options)
    ]


def test_the_layer_with_the_better_chunks_keeps_more() -> None:
    assert ranked([4, 3, 2, 1], [0.4, 0.3, 0.2, 0.1], 6) == [[0, 1, 2, 3, 11, 12], [0, 1, 2, 3, 11, 12]]
    assert ranked([4, 3, 2, 1], [0.4, 0.3, 0.2, 0.1], 7) == [[0, 1, 2, 3, 4, 5, 11, 12], [0, 1, 2, 3, 11, 12]]
    # The second layer's floor is its own best chunk; its chunk 1-3 then loses to all but the last of the first layer.
    assert ranked([4, 3, 2, 1], [1.5, 2.5, 0.2, 0.1], 8) == [[0, 1, 2, 3, 4, 5, 6, 7, 11, 12], [0, 4, 5, 6, 11, 12]]


def test_equal_chunks_go_to_the_lower_layer_first() -> None:
    assert ranked([1, 1, 1, 1], [1, 1, 1, 1], 8) == [[0, 1, 2, 3, 4, 5, 6, 7, 11, 12], [0, 1, 2, 3, 11, 12]]


def test_equal_chunks_of_heads_go_by_layer_then_position_then_head() -> None:
    """Two layers of two heads; the first token that is left goes to all heads of the layer before the next does."""
    options = ranked_heads(2, 2)
    scores = np.zeros((2, 2, 13), np.float32)
    chosen = reference_layers.select_ranked(scores, 13, 7, options)  # each head's floor, and 4 tokens more
    assert [kept.tolist() for kept in chosen] == 2 * [[0, 1, 2, 3, 4, 5, 11, 12]] + 2 * [[0, 1, 2, 3, 11, 12]]


def ranked_heads(layers: int, heads: int) -> ChunkKVSettings:
    split: dict[str, Any] = {"budget_split": "ranked", "heads": "each", "num_kv_heads": heads}
    return replace(TINY, **split, layer_groups=tuple((layer,) for layer in range(layers)))


@drawn
@given(
    seed=st.integers(0, 2**32 - 1),
    kept=st.integers(6, 40),
    length=st.integers(7, 40),
    layers=st.integers(1, 4),
    heads=st.integers(1, 3),
)
def test_one_ranking_keeps_the_total_the_floors_and_what_a_smaller_total_kept(
    seed: int, kept: int, length: int, layers: int, heads: int
) -> None:
    options = ranked_heads(layers, heads)
    scores = np.random.default_rng(seed).choice([0.0, 0.25, 0.5, 1.0], size=(layers, heads, length)).astype(np.float32)
    kept = min(kept, length)
    chosen = reference_layers.select_ranked(scores, length, kept, options)
    assert len(chosen) == layers * heads and sum(map(len, chosen)) == layers * heads * kept
    less = reference_layers.select_ranked(scores, length, max(6, kept - 1), options) if kept > 6 else chosen
    for part, indices in enumerate(chosen):
        assert (np.diff(indices) > 0).all() and {0, length - 2, length - 1} <= set(indices.tolist())
        alone = reference.select_tokens(scores.reshape(-1, length)[part], length, 6, options)
        assert set(alone.tolist()) | set(less[part].tolist()) <= set(indices.tolist())
        assert len(indices) <= options.class_capacities(length, budget_tokens=kept)[part]


@drawn
@given(seed=st.integers(0, 2**32 - 1), kept=st.integers(6, 40), layers=st.integers(1, 4), heads=st.integers(1, 3))
def test_equal_heads_win_what_a_layer_that_shares_wins(seed: int, kept: int, layers: int, heads: int) -> None:
    scores = np.random.default_rng(seed).choice([0.0, 0.25, np.nan, 1.0], size=(layers, 40)).astype(np.float32)
    options = ranked_heads(layers, heads)
    shared = reference_layers.select_ranked(scores, 40, kept, options)
    each = reference_layers.select_ranked(np.repeat(scores[:, None], heads, axis=1), 40, kept, options)
    assert [one.tolist() for one in each] == [kept.tolist() for kept in shared for _ in range(heads)]


def test_ranked_layers_keep_whole_batches() -> None:
    options = replace(TINY, keep_per_10k=4_000, budget_split="ranked", layer_groups=((0,), (1,), (2,)))
    call = layers_of(options, 3, (60, 6, 33))
    chosen = reference_layers.select_layers(**call)
    totals = np.sum([selection.kept_lengths for selection in chosen], axis=0)
    assert totals.tolist() == [3 * options.kept_tokens(length) for length in (60, 6, 33)]
    assert len({tuple(selection.kept_lengths) for selection in chosen}) > 1
    for selection in chosen:
        for row, count in enumerate(selection.kept_lengths):
            assert (selection.kept_indices[row, :count] >= 0).all()
            assert (selection.kept_indices[row, count:] == reference.PAD_INDEX).all()
