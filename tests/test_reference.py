"""The NumPy reference: hand-computed examples, every property of docs/method.md, and proof that the checks bite."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from support import op_properties as properties
from support.choice_properties import CHOICE_PROPERTIES
from support.messages import naming
from support.op_cases import CASES, LONG_CASE, STORAGE_TYPES, OpCase, named
from support.op_strategies import op_cases

from chunkkv import reference, reference_layers
from chunkkv.errors import ConfigError, RequestError
from chunkkv.settings import ChunkKVSettings

TINY = ChunkKVSettings(window=2, chunk_size=3, sinks=1, min_tokens=6)
DELIMITER = replace(TINY, boundaries="delimiter")
drawn = settings(max_examples=100, deadline=None, derandomize=True, database=None)


# Section 2: token scores


def test_softmax_scores_by_hand() -> None:
    query = np.ones((1, 1, 1), dtype=np.float32)
    key = np.log(np.array([[[1.0], [2.0], [1.0]]], dtype=np.float32))
    np.testing.assert_allclose(reference.token_scores(query, key, 1), [0.25, 0.5, 0.0], rtol=1e-6)


def test_softmax_is_causal_inside_the_window() -> None:
    query = np.ones((1, 2, 1), dtype=np.float32)
    key = np.log(np.array([[[1.0], [1.0], [2.0]]], dtype=np.float32))
    # The earlier query sees two equal keys (1/2), the later one sees weights 1, 1, 2 (1/4).
    np.testing.assert_allclose(reference.token_scores(query, key, 2), [0.375, 0.0, 0.0], rtol=1e-6)


def test_logits_are_raw_and_summed() -> None:
    query = np.array([[[1.0, 1.0], [2.0, 0.0]], [[0.0, 1.0], [0.0, 3.0]]], dtype=np.float32)
    key = np.array([[[1.0, 2.0], [-1.0, 0.5], [9.0, 9.0], [9.0, 9.0]]], dtype=np.float32)
    scores = reference.token_scores(query, key, 2, score="logits")
    assert scores.tolist() == [3.0 + 2.0 + 2.0 + 6.0, -0.5 - 2.0 + 0.5 + 1.5, 0.0, 0.0]


def test_pooling_always_divides_by_its_width_and_stops_at_the_window() -> None:
    query = np.ones((1, 1, 1), dtype=np.float32)
    key = np.array([[[3.0], [6.0], [9.0], [100.0]]], dtype=np.float32)
    assert reference.token_scores(query, key, 1, pooling=3, score="logits").tolist() == [3.0, 6.0, 5.0, 0.0]
    assert reference.token_scores(query, key, 1, pooling=7, score="logits").tolist() == pytest.approx(
        [18 / 7, 18 / 7, 18 / 7, 0.0]
    )


def test_scores_equal_a_literal_loop_over_heads_queries_and_tokens() -> None:
    rng = np.random.default_rng(5)
    heads, kv_heads, window, length, dim = 6, 2, 3, 9, 4
    query, key = rng.normal(size=(heads, window, dim)), rng.normal(size=(kv_heads, length, dim))
    expected = np.zeros(length)
    for head, row in itertools.product(range(heads), range(window)):
        visible = key[head // (heads // kv_heads), : length - window + row + 1]
        weights = np.exp([query[head, row] @ one / dim**0.5 for one in visible])
        for token in range(length - window):
            expected[token] += weights[token] / weights.sum() / (heads * window)
    np.testing.assert_allclose(reference.token_scores(query, key, window, head_reduce="mean"), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("query_shape", "key_shape", "window", "named_value"),
    [
        ((3, 2, 4), (2, 9, 4), 2, "query 3 heads key 2"),
        ((2, 2, 4), (2, 9, 8), 2, "head 4"),
        ((2, 3, 4), (2, 9, 4), 2, "query 3 window 2"),
        ((2, 5, 4), (2, 4, 4), 5, "key 4 window 5"),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    query_shape: tuple[int, ...], key_shape: tuple[int, ...], window: int, named_value: str
) -> None:
    with pytest.raises(ConfigError, match=naming(named_value)):
        reference.token_scores(np.zeros(query_shape), np.zeros(key_shape), window)


# Section 3: chunks


def test_fixed_chunks_start_behind_the_sinks_and_end_before_the_window() -> None:
    assert reference.chunk_starts(12, TINY).tolist() == [1, 4, 7]
    assert reference.chunk_starts(13, TINY).tolist() == [1, 4, 7, 10]
    assert reference.chunk_starts(3, TINY).tolist() == []
    assert reference.chunk_sizes(reference.chunk_starts(13, TINY), 11).tolist() == [3, 3, 3, 1]


def test_delimiter_chunks_end_after_a_delimiter_or_when_full() -> None:
    flags = np.zeros(14, dtype=bool)
    flags[[0, 2, 3, 9, 11]] = True
    # 1 2. | 3. | 4 5 6 | 7 8 9. | 10 11. — the delimiters in the sinks and at the very end open no chunk.
    assert reference.chunk_starts(14, DELIMITER, flags).tolist() == [1, 3, 4, 7, 10]


def test_delimiter_boundaries_need_the_flags() -> None:
    with pytest.raises(ConfigError, match=naming("is_delimiter None")):
        reference.chunk_starts(14, DELIMITER)


def test_a_short_chunk_is_scored_by_its_own_tokens() -> None:
    scores = np.array([9.0, 1.0, 2.0, 3.0, 5.0, 9.0], dtype=np.float32)
    assert reference.chunk_scores(scores, np.array([1, 4]), 5).tolist() == [2.0, 5.0]
    assert reference.chunk_scores(scores, np.array([], dtype=np.int64), 1).tolist() == []


# Section 4: selection. Thirteen tokens: sink 0, chunks 1-3, 4-6, 7-9 and 10, window 11-12.


def _select(chunk_means: list[float], kept: int) -> list[int]:
    scores = np.array([0.0, *np.repeat(chunk_means, [3, 3, 3, 1]), 0.0, 0.0], dtype=np.float32)
    return reference.select_tokens(scores, 13, kept, TINY).tolist()


def test_whole_chunks_then_the_front_of_the_next() -> None:
    assert _select([1, 3, 2, 0], 6) == [0, 4, 5, 6, 11, 12]
    assert _select([1, 3, 2, 0], 8) == [0, 4, 5, 6, 7, 8, 11, 12]
    assert _select([1, 3, 2, 4], 8) == [0, 4, 5, 6, 7, 10, 11, 12]


def test_a_chunk_that_does_not_fit_ends_the_selection() -> None:
    # The one-token chunk 10 would fit beside the split chunk, but it ranks behind it.
    assert _select([4, 3, 0, 2], 8) == [0, 1, 2, 3, 4, 5, 11, 12]


def test_equal_scores_go_to_the_lower_position_and_nan_ranks_below_minus_infinity() -> None:
    assert _select([1, 2, 2, 2], 6) == [0, 4, 5, 6, 11, 12]
    assert _select([np.nan, -np.inf, np.nan, np.nan], 7) == [0, 1, 4, 5, 6, 11, 12]
    assert _select([np.nan, 1, np.inf, -np.inf], 10) == [0, 4, 5, 6, 7, 8, 9, 10, 11, 12]


def test_rows_up_to_min_tokens_are_untouched() -> None:
    case = OpCase("untouched", replace(TINY, keep_per_10k=1), (6, 2, 7), 2, 1, 4)
    inputs = case.inputs()
    chosen = reference.select_batch(inputs.query, inputs.key, inputs.lengths, case.settings)
    assert chosen.kept_lengths.tolist() == [6, 2, 6]
    assert chosen.kept_indices[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert chosen.kept_indices[1].tolist() == [0, 1, -1, -1, -1, -1]


@pytest.mark.parametrize("length", [-1, 9])
def test_a_length_outside_the_batch_is_refused(length: int) -> None:
    with pytest.raises(RequestError, match=naming("length row 0", length, "0 8")):
        reference.select_batch(np.zeros((1, 2, 2, 4)), np.zeros((1, 1, 8, 4)), np.array([length]), TINY)


# Section 5: compaction


def test_compaction_takes_rows_in_order() -> None:
    x = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    assert reference.compact(x, np.array([0, 2])).tolist() == [[[0, 1], [4, 5]], [[6, 7], [10, 11]]]


@pytest.mark.parametrize("storage", STORAGE_TYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_compaction_copies_bits(case: OpCase, storage: str) -> None:
    properties.check_compaction(reference.select_batch, reference.compact_batch, case, storage)


def test_compaction_of_a_row_equals_the_batched_one() -> None:
    case = named("ragged batch with padding")
    inputs = case.inputs()
    indices, lengths, _ = reference.select_batch(inputs.query, inputs.key, inputs.lengths, case.settings)
    batched = reference.compact_batch(inputs.key, indices)
    for row, count in enumerate(lengths):
        single = reference.compact(inputs.key[row], indices[row, :count])
        assert single.tobytes() == batched[row, :, :count].tobytes()


# Section 6: layer groups


@pytest.mark.parametrize("leader", ["first", "last"])
def test_group_members_take_the_leaders_indices(leader: str) -> None:
    properties.check_group_members(reference_layers.select_layers, reference.select_batch, leader)


def test_members_that_choose_for_themselves_are_caught() -> None:
    def selfish(queries: Any, keys: Any, lengths: Any, used: ChunkKVSettings) -> Any:
        query = queries[used.leader_of(used.layer_groups[0])]
        return [reference.select_batch(query, key, lengths, used) for key in keys]

    with pytest.raises(AssertionError):
        properties.check_group_members(selfish, reference.select_batch, "first")


def test_groups_must_cover_every_layer_and_leaders_need_queries() -> None:
    grouped, queries, keys, lengths = properties.grouped_layers("last")
    with pytest.raises(ConfigError, match=naming("5 layers")):
        reference_layers.select_layers(queries, keys[:5], lengths, grouped)
    del queries[5]
    with pytest.raises(ConfigError, match=naming("layer 5 queries")):
        reference_layers.select_layers(queries, keys, lengths, grouped)


# The honest exception: chunks near the cut


@pytest.mark.parametrize(
    ("means", "budget", "near"),
    [
        ([4.0, 3.0, 2.0, 1.0], 5, []),
        ([4.0, 3.0, 3.0 - 1e-6, 1.0], 5, [1, 2]),  # 1 is split, 2 is right behind it
        ([4.0, 3.0, 3.0 - 1e-6, 1.0], 6, [1, 2]),  # the cut runs between 1 and 2
        ([4.0, 3.0, 3.0 - 1e-3, 1.0], 6, []),
        ([3.0, 3.0, 2.0, 1.0], 6, []),  # both equal chunks are taken whole
        ([4.0, 3.0, 2.0, 2.0], 6, []),  # both equal chunks are left out
        ([2.0, np.nan, np.nan, 1.0], 5, []),  # NaN ties fall by position, exactly
        ([4.0, 3.0, 2.0, 1.0], 10, []),  # nothing is cut
    ],
)
def test_chunks_near_cut(means: list[float], budget: int, near: list[int]) -> None:
    found = reference.chunks_near_cut(np.array(means), np.array([3, 3, 3, 1]), budget)
    assert found.tolist() == near


def test_tokens_near_the_cut_are_those_of_its_chunks() -> None:
    scores = np.array([0, 4, 4, 4, 3, 3, 3, 3, 3, 3, 1, 0, 0], dtype=np.float32)
    assert np.flatnonzero(reference.near_cut(scores, 13, 8, TINY)).tolist() == [4, 5, 6, 7, 8, 9]
    assert not reference.near_cut(scores, 13, 6, TINY).any()
    assert not reference.near_cut(scores, 13, 13, TINY).any()


def test_logits_are_near_relative_to_the_largest_score() -> None:
    scores = np.array([0, 800, 800, 800, 0.001, 0, 0, 0, 0, 0, -900, 0, 0], dtype=np.float32)
    assert not reference.near_cut(scores, 13, 8, TINY).any()
    assert reference.near_cut(scores, 13, 8, TINY.with_score("logits")).sum() == 6


def test_a_different_choice_is_counted_near_the_cut_and_refused_elsewhere() -> None:
    wanted, other = np.array([0, 1, 2, 3, 4, 11, 12]), np.array([0, 1, 2, 3, 7, 11, 12])
    close = np.array([0, 4, 4, 4, 3, 3, 3, 3, 3, 3, 1, 0, 0], dtype=np.float32)
    apart = np.array([0, 4, 4, 4, 3, 3, 3, 2, 2, 2, 1, 0, 0], dtype=np.float32)
    assert properties.differs_near_cut(wanted, wanted, apart, 13, TINY, None) == 0
    assert properties.differs_near_cut(other, wanted, close, 13, TINY, None) == 1
    with pytest.raises(AssertionError, match=r"\[4 7\]"):
        properties.differs_near_cut(other, wanted, apart, 13, TINY, None)


# Section 8: every property, on the shared table and on drawn cases


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("check", (*properties.PROPERTIES, *CHOICE_PROPERTIES), ids=lambda check: check.__name__)
def test_property_on_the_case_table(check: properties.Check, case: OpCase) -> None:
    assert check(reference.select_batch, case) == 0


@pytest.mark.parametrize("check", (*properties.PROPERTIES, *CHOICE_PROPERTIES), ids=lambda check: check.__name__)
def test_property_on_drawn_cases(check: properties.Check) -> None:
    @drawn
    @given(op_cases())
    def holds(case: OpCase) -> None:
        assert check(reference.select_batch, case) == 0

    holds()


@drawn
@given(op_cases())
def test_compaction_on_drawn_cases(case: OpCase) -> None:
    properties.check_compaction(reference.select_batch, reference.compact_batch, case)


def test_budget_of_a_row_whose_product_exceeds_32_bits() -> None:
    assert LONG_CASE.lengths[0] * LONG_CASE.settings.keep_per_10k > 2**31
    assert properties.check_exact_budget(reference.select_batch, LONG_CASE) == 0


# The checks themselves: a broken implementation must not pass


def _broken(change: Callable[[Any, dict[str, Any]], tuple[Any, Any, Any]]) -> properties.Select:
    def select(query: Any, key: Any, lengths: Any, used: ChunkKVSettings, **optional: Any) -> Any:
        call = {"query": query, "key": key, "lengths": lengths, "settings": used, **optional}
        return change(reference.select_batch(**call), call)

    return select


def _drop_one(chosen: Any, call: dict[str, Any]) -> Any:
    indices, lengths = chosen.kept_indices.copy(), chosen.kept_lengths - 1
    for row, count in enumerate(lengths):
        indices[row, count:] = -1
    return indices[:, : lengths.max()], lengths, chosen.token_scores


def _budget_dependent(chosen: Any, call: dict[str, Any]) -> Any:
    shuffled = {**call, "key": call["key"] * (1 + int(chosen.kept_lengths.max()) % 3)}
    return reference.select_batch(**shuffled)


def _reads_padding(chosen: Any, call: dict[str, Any]) -> Any:
    whole = np.full_like(call["lengths"], call["key"].shape[2])
    scores = reference.select_batch(**{**call, "lengths": whole}).token_scores
    return chosen.kept_indices, chosen.kept_lengths, scores


def _row_dependent(chosen: Any, call: dict[str, Any]) -> Any:
    scores = chosen.token_scores * (1 + np.arange(len(chosen.token_scores), dtype=np.float32))[:, None]
    return chosen.kept_indices, chosen.kept_lengths, scores


def _prefers_late(chosen: Any, call: dict[str, Any]) -> Any:
    indices = chosen.kept_indices.copy()
    for row, count in enumerate(chosen.kept_lengths):
        length, used = int(call["lengths"][row]), call["settings"]
        late = np.concatenate([np.arange(used.sinks), np.arange(length - int(count) + used.sinks, length)])
        indices[row, :count] = late if count < length else np.arange(length)
    return indices, chosen.kept_lengths, chosen.token_scores


def _alone_differs(chosen: Any, call: dict[str, Any]) -> Any:
    return chosen if len(call["lengths"]) > 1 else _prefers_late(chosen, call)


def _wrong_score(chosen: Any, call: dict[str, Any]) -> Any:
    return chosen.kept_indices, chosen.kept_lengths, chosen.token_scores * np.float32(1.0001)


def _keeps_nan(chosen: Any, call: dict[str, Any]) -> Any:
    return reference.select_batch(**{**call, "key": np.nan_to_num(call["key"], nan=1e9)})


class _Forgetful:
    """An implementation whose second run differs in the last bit of one score."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, query: Any, key: Any, lengths: Any, used: ChunkKVSettings, **optional: Any) -> Any:
        self.runs += 1
        chosen = reference.select_batch(query, key, lengths, used, **optional)
        chosen.token_scores[0, 0] = np.nextafter(chosen.token_scores[0, 0], np.float32(self.runs % 2))
        return chosen


@pytest.mark.parametrize(
    ("select", "check"),
    [
        (_broken(_drop_one), properties.check_exact_budget),
        (_broken(_drop_one), properties.check_keep_everything),
        (_broken(_prefers_late), properties.check_chunks),
        (_broken(_prefers_late), properties.check_equal_scores),
        (_broken(_prefers_late), properties.check_single_token_chunks),
        (_broken(_prefers_late), properties.check_matches_reference),
        (_broken(_wrong_score), properties.check_matches_reference),
        (_broken(_budget_dependent), properties.check_growing_budget),
        (_broken(_reads_padding), properties.check_padding_contents),
        (_broken(_reads_padding), properties.check_matches_reference),
        (_broken(_row_dependent), properties.check_permuted_batch),
        (_broken(_alone_differs), properties.check_row_alone),
        (_broken(_keeps_nan), properties.check_nan_ranks_lowest),
        (_Forgetful(), properties.check_two_runs),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_a_broken_implementation_is_caught(select: properties.Select, check: properties.Check) -> None:
    with np.errstate(all="ignore"), pytest.raises(AssertionError):
        for case in CASES:
            check(select, case)


def test_a_lossy_compaction_is_caught() -> None:
    def lossy(x: Any, indices: Any) -> Any:
        return reference.compact_batch((x.astype(np.float64) * (1 + 1e-7)).astype(x.dtype), indices)

    with np.errstate(all="ignore"), pytest.raises(AssertionError):
        properties.check_compaction(reference.select_batch, lossy, named("plain"))
