"""Section 8 of docs/method.md as checks that run on any implementation of the op.

An implementation is a callable `select` with the signature and the result of chunkkv.reference.select_batch. Every
check raises AssertionError where the implementation breaks the property, and returns how many rows it excused because
chunks lay within 1e-5 relative of the cut: callers report that number, it is never hidden. Checks that compare an
implementation with itself excuse nothing. Scores of rows that are left untouched are not looked at.

With heads "each" a row makes a choice for every KV head. The checks then look at every choice as at a row: see `run`.

"Growing the budget only adds tokens" means: for two budgets of one row, N1 <= N2, the tokens kept under N1 are a
subset of those kept under N2. Chunks taken whole stay whole; of the one chunk that was split, the taken prefix grows;
chunks ranked behind it enter only once it is whole. There is no exception.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkkv import reference
from chunkkv.limits import KEEP_SCALE
from chunkkv.settings import ChunkKVSettings
from support.op_cases import OpCase, OpInputs, named

Triple = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]
Select = Callable[..., Triple]
Compact = Callable[[NDArray[Any], NDArray[np.int32]], NDArray[Any]]
Check = Callable[[Select, OpCase], int]

SCORE_TOLERANCE = 1e-5
PADDING_CONTENTS = (np.nan, np.inf, -np.inf, 3.0e38, -3.0e38)


def run(select: Select, inputs: OpInputs, settings: ChunkKVSettings) -> Triple:
    """Call the implementation and check the types and shapes that every result must have.

    Returns indices, lengths and scores of every choice: with heads "each" those of the KV heads of a row one after the
    other, else those of the rows.
    """
    indices, lengths, scores = select(inputs.query, inputs.key, inputs.lengths, settings, **inputs.optional())
    batch, kv_heads, padded, _ = inputs.key.shape
    choices = (batch, kv_heads) if settings.heads == "each" else (batch,)
    assert indices.dtype == np.int32 and lengths.dtype == np.int32 and scores.dtype == np.float32
    assert lengths.shape == (batch,) and scores.shape == (*choices, padded)
    assert indices.shape == (*choices, int(lengths.max()))
    each = len(choices) == 2
    return _flat(indices), np.repeat(lengths, kv_heads) if each else lengths, _flat(scores)


def _flat(array: NDArray[Any]) -> NDArray[Any]:
    return array.reshape(-1, array.shape[-1])


def kept_sets(indices: NDArray[np.int32], lengths: NDArray[np.int32]) -> list[NDArray[np.int32]]:
    """Return each row's kept indices without the padding; what lies behind them must be -1."""
    for row, count in enumerate(lengths):
        assert (indices[row, count:] == reference.PAD_INDEX).all(), f"row {row}: slots behind N are not -1"
    return [indices[row, :count] for row, count in enumerate(lengths)]


def expected_kept(case: OpCase, row: int) -> int:
    """Section 1 in Python integers, written out a second time."""
    length, settings, row = case.choice_lengths[row], case.settings, row // case.choices
    budget = settings.budget_tokens
    if case.keep_per_10k is not None or case.budget_tokens is not None:
        budget = 0 if case.budget_tokens is None else case.budget_tokens[row]
    ratio = settings.keep_per_10k if case.keep_per_10k is None else case.keep_per_10k[row]
    wanted = budget if budget > 0 else length * ratio // KEEP_SCALE
    return min(length, max(settings.min_tokens, wanted))


def check_exact_budget(select: Select, case: OpCase) -> int:
    """Exactly N ascending distinct indices; window and sinks are among them."""
    indices, lengths, _ = run(select, case.inputs(), case.settings)
    for row, kept in enumerate(kept_sets(indices, lengths)):
        length = case.choice_lengths[row]
        assert len(kept) == expected_kept(case, row)
        assert (np.diff(kept) > 0).all()
        assert kept[0] >= 0 and kept[-1] < length
        always = set(range(min(case.settings.sinks, length)))
        always |= set(range(max(0, length - case.settings.window), length))
        assert always <= set(kept.tolist())
    return 0


def check_chunks(select: Select, case: OpCase) -> int:
    """Of every chunk the first tokens stay, at most one chunk is split, and no better chunk was passed over."""
    inputs = case.inputs()
    indices, lengths, scores = run(select, inputs, case.settings)
    for row, kept in enumerate(kept_sets(indices, lengths)):
        length = case.choice_lengths[row]
        if len(kept) == length:
            continue
        end = length - case.settings.window
        starts = reference.chunk_starts(length, case.settings, _flags(inputs, case, row))
        sizes = reference.chunk_sizes(starts, end)
        means = reference.chunk_scores(scores[row], starts, end)
        taken = np.array([np.isin(np.arange(a, a + n), kept).sum() for a, n in zip(starts, sizes, strict=True)])
        for start, count in zip(starts, taken, strict=True):
            assert np.isin(np.arange(start, start + count), kept).all(), "a chunk was not taken from its front"
        split = (taken > 0) & (taken < sizes)
        assert split.sum() <= 1
        slack = SCORE_TOLERANCE * float(np.abs(scores[row]).max())
        worst_whole = means[taken == sizes].min(initial=np.inf)
        best_split, best_out = means[split].max(initial=-np.inf), means[taken == 0].max(initial=-np.inf)
        assert worst_whole >= max(best_split, best_out) - slack
        assert not split.any() or best_split >= best_out - slack
    return 0


def check_matches_reference(select: Select, case: OpCase) -> int:
    """Token scores agree closely with the reference's, kept indices exactly outside chunks near the cut."""
    return matches_reference(select, case.inputs(), case)


def matches_reference(select: Select, inputs: OpInputs, case: OpCase) -> int:
    indices, lengths, scores = run(select, inputs, case.settings)
    wanted_indices, wanted_lengths, wanted_scores = run(reference.select_batch, inputs, case.settings)
    assert (lengths == wanted_lengths).all()
    wanted = kept_sets(wanted_indices, wanted_lengths)
    excused = 0
    for row, kept in enumerate(kept_sets(indices, lengths)):
        length = case.choice_lengths[row]
        if len(kept) == length:
            assert (kept == wanted[row]).all()
            continue
        assert_scores_close(scores[row], wanted_scores[row], case.settings.score)
        excused += differs_near_cut(
            kept, wanted[row], wanted_scores[row], length, case.settings, _flags(inputs, case, row)
        )
    return excused


def assert_scores_close(given: NDArray[np.float32], expected: NDArray[np.float32], score: str) -> None:
    """Compare token scores: relative per token for softmax, relative to the largest for sums of both signs."""
    largest = float(np.abs(expected).max())
    absolute = SCORE_TOLERANCE * largest if score != "softmax" else 1e-3 * SCORE_TOLERANCE * largest
    np.testing.assert_allclose(given, expected, rtol=SCORE_TOLERANCE, atol=absolute)


def differs_near_cut(
    kept: NDArray[np.int32],
    wanted: NDArray[np.int32],
    scores: NDArray[np.float32],
    length: int,
    settings: ChunkKVSettings,
    flags: NDArray[np.bool_] | None,
) -> int:
    """Return 0 where both choices are equal, 1 where they differ only in chunks near the cut; else fail."""
    if np.array_equal(kept, wanted):
        return 0
    near = reference.near_cut(scores[:length], length, len(wanted), settings, flags)
    differing = np.setxor1d(kept, wanted)
    assert near[differing].all(), f"tokens {differing[~near[differing]]} differ and are not near the cut"
    return 1


def _flags(inputs: OpInputs, case: OpCase, row: int) -> NDArray[np.bool_] | None:
    """Return the flags of the row of a choice."""
    return None if inputs.is_delimiter is None else inputs.is_delimiter[row // case.choices, : case.choice_lengths[row]]


def check_keep_everything(select: Select, case: OpCase) -> int:
    """keep_ratio 1 keeps every token of every row, by the settings or by the request."""
    everything = replace(case.inputs(), keep_per_10k=None, budget_tokens=None)
    settings = replace(case.settings, keep_per_10k=KEEP_SCALE, budget_tokens=0)
    asked = replace(everything, keep_per_10k=np.full(len(case.lengths), KEEP_SCALE, dtype=np.int32))
    for inputs, used in ((everything, settings), (asked, case.settings)):
        indices, lengths, _ = run(select, inputs, used)
        assert (lengths == case.choice_lengths).all()
        for row, kept in enumerate(kept_sets(indices, lengths)):
            assert (kept == np.arange(case.choice_lengths[row])).all()
    return 0


def check_two_runs(select: Select, case: OpCase) -> int:
    """Two runs give the same bits."""
    assert_same_bits(run(select, case.inputs(), case.settings), run(select, case.inputs(), case.settings))
    return 0


def assert_same_bits(first: Triple, second: Triple) -> None:
    for one, other in zip(first, second, strict=True):
        assert one.tobytes() == other.tobytes()


def check_permuted_batch(select: Select, case: OpCase) -> int:
    """Permuting the rows permutes the result, bit for bit."""
    turned = [*range(1, len(case.lengths)), 0]
    for rows in (turned, turned[::-1]):
        indices, lengths, scores = run(select, case.inputs(), case.settings)
        permuted = run(select, case.inputs().take_rows(rows), case.settings)
        order = [row * case.choices + choice for row in rows for choice in range(case.choices)]
        assert_same_bits((indices[order], lengths[order], scores[order]), permuted)
    return 0


def check_padding_contents(select: Select, case: OpCase) -> int:
    """What stands behind a row's length never changes a bit of the result."""
    case = replace(case, extra_padding=case.extra_padding + 3)
    plain = run(select, case.inputs(), case.settings)
    for content in PADDING_CONTENTS:
        inputs = case.inputs()
        for row, length in enumerate(case.lengths):
            for array in (inputs.key, inputs.value, inputs.scores):
                if array is not None:
                    np.moveaxis(array, min(2, array.ndim - 1), 0)[length:, row] = content
            if inputs.is_delimiter is not None:
                inputs.is_delimiter[row, length:] ^= True
        assert_same_bits(plain, run(select, inputs, case.settings))
    return 0


def check_row_alone(select: Select, case: OpCase) -> int:
    """A row chooses in a padded batch what it chooses alone, outside chunks near the cut."""
    inputs = case.inputs()
    indices, lengths, scores = run(select, inputs, case.settings)
    excused = 0
    for place, length in enumerate(case.lengths):
        alone = inputs.take_rows([place])
        flags = None if alone.is_delimiter is None else alone.is_delimiter[:, :length]
        value = None if alone.value is None else alone.value[:, :, :length]
        given = None if alone.scores is None else alone.scores[..., :length]
        alone = replace(alone, key=alone.key[:, :, :length], is_delimiter=flags, value=value, scores=given)
        own_indices, own_lengths, _ = run(select, alone, case.settings)
        for choice, kept in enumerate(own_indices):
            row = place * case.choices + choice
            assert own_lengths[choice] == lengths[row]
            excused += differs_near_cut(
                indices[row, : lengths[row]], kept, scores[row], length, case.settings, _flags(inputs, case, row)
            )
    return excused


def check_equal_scores(select: Select, case: OpCase) -> int:
    """Where all scores are equal the lowest chunks stay.

    Zero queries make every raw logit exactly zero, whatever the chunk sizes. Zero keys make every softmax score
    equal; there only chunks of one size have means that are equal to the last bit.
    """
    zero_query = case.with_settings(score="logits")
    inputs = zero_query.inputs()
    _assert_lowest_stay(select, replace(inputs, query=np.zeros_like(inputs.query)), zero_query)
    equal_keys = case.with_settings(score="softmax", pooling=1, boundaries="fixed", value_norm="off")
    fixed, chunk = case.settings.window + case.settings.sinks, case.settings.chunk_size
    even = tuple(length - (length - fixed) % chunk if length > fixed else length for length in case.lengths)
    equal_keys = replace(equal_keys, lengths=even)
    inputs = equal_keys.inputs()
    _assert_lowest_stay(select, replace(inputs, key=np.zeros_like(inputs.key)), equal_keys)
    return 0


def _assert_lowest_stay(select: Select, inputs: OpInputs, case: OpCase) -> None:
    indices, lengths, _ = run(select, inputs, case.settings)
    for row, kept in enumerate(kept_sets(indices, lengths)):
        length = case.choice_lengths[row]
        window = min(case.settings.window, length)
        front = np.arange(len(kept) - window)
        assert (kept == np.concatenate([front, np.arange(length - window, length)])).all()


def check_growing_budget(select: Select, case: OpCase) -> int:
    """A larger budget keeps everything a smaller one kept (the exact form stands at the top of this module)."""
    inputs = replace(case.inputs(), keep_per_10k=None)
    longest, least = max(case.lengths), case.settings.min_tokens
    previous: list[set[int]] = [set() for _ in case.choice_lengths]
    steps = sorted({least, least + 1, least + case.settings.chunk_size, (least + longest) // 2, longest})
    for budget in (step for step in steps if step >= least):
        budgets = np.full(len(case.lengths), budget, dtype=np.int32)
        indices, lengths, _ = run(select, replace(inputs, budget_tokens=budgets), case.settings)
        current = [set(kept.tolist()) for kept in kept_sets(indices, lengths)]
        assert all(small <= large for small, large in zip(previous, current, strict=True))
        previous = current
    return 0


def check_single_token_chunks(select: Select, case: OpCase) -> int:
    """Chunk size 1 is token-level selection: the best tokens by their own score, shared by all heads."""
    case = case.with_settings(chunk_size=1)
    indices, lengths, scores = run(select, case.inputs(), case.settings)
    for row, kept in enumerate(kept_sets(indices, lengths)):
        length, sinks = case.choice_lengths[row], case.settings.sinks
        if len(kept) == length:
            continue
        end = length - case.settings.window
        count = len(kept) - case.settings.window - sinks
        best = sinks + np.argsort(-scores[row, sinks:end], kind="stable")[:count]
        assert (kept == np.sort(np.concatenate([np.arange(sinks), best, np.arange(end, length)]))).all()
    return 0


def check_nan_ranks_lowest(select: Select, case: OpCase) -> int:
    """A chunk that holds a NaN score stays only after every other ranked chunk."""
    case = case.with_settings(score="logits", pooling=1)
    settings = case.settings
    row_inputs = case.inputs()
    for row, length in enumerate(case.lengths):
        row_inputs.key[row, :, min(settings.sinks, length - 1)] = np.nan
    indices, lengths, _ = run(select, row_inputs, settings)
    for row, kept in enumerate(kept_sets(indices, lengths)):
        length = case.choice_lengths[row]
        if len(kept) == length:
            continue
        starts = reference.chunk_starts(length, settings, _flags(row_inputs, case, row))
        end = length - settings.window
        first = int(reference.chunk_sizes(starts, end)[0])
        others = np.arange(settings.sinks + first, end)
        front = np.isin(np.arange(settings.sinks, settings.sinks + first), kept)
        assert not front.any() or np.isin(others, kept).all()
    return 0


def check_compaction(select: Select, compact: Compact, case: OpCase, storage: str = "float32") -> int:
    """Compaction copies the kept rows bit for bit; with keep_ratio 1 that is the whole row."""
    rng = np.random.default_rng(case.seed)
    inputs = case.inputs()
    shape = (len(case.lengths), case.kv_heads, inputs.key.shape[2], case.head_dim)
    element = case.inputs(storage).key.dtype
    raw = rng.integers(0, 256, size=(*shape[:-1], shape[-1] * element.itemsize), dtype=np.uint8)
    cache = raw.view(element)  # every bit pattern, NaN payloads included
    everything = replace(
        inputs, keep_per_10k=np.full(len(case.lengths), KEEP_SCALE, dtype=np.int32), budget_tokens=None
    )
    for used in (inputs, everything):
        indices, lengths, _ = run(select, used, case.settings)
        each = case.settings.heads == "each"
        compacted = compact(cache, indices.reshape(*shape[:2], -1) if each else indices)
        assert compacted.shape == (shape[0], shape[1], indices.shape[1], shape[3])
        for row, kept in enumerate(kept_sets(indices, lengths)):
            place, heads = divmod(row, case.choices)
            heads = slice(heads, heads + 1) if each else slice(None)
            assert compacted[place, heads, : len(kept)].tobytes() == cache[place, heads][:, kept].tobytes()
    for row, length in enumerate(case.lengths):
        assert compacted[row, :, :length].tobytes() == cache[row, :, :length].tobytes()
    return 0


def grouped_layers(
    leader: str,
) -> tuple[ChunkKVSettings, dict[int, NDArray[Any]], list[NDArray[Any]], NDArray[np.int32]]:
    """Return settings with three layer groups, and each of six layers' own queries and keys, with the lengths."""
    groups = ((0, 1), (2,), (3, 4, 5))
    settings = replace(named("plain").settings, layer_groups=groups, leader=leader)
    calls = [OpCase(f"layer {layer}", settings, (40, 23)).inputs() for layer in range(6)]
    queries = {layer: call.query for layer, call in enumerate(calls)}
    return settings, queries, [call.key for call in calls], calls[0].lengths


def check_group_members(select_layers: Callable[..., list[Triple]], select: Select, leader: str) -> int:
    """Every member of a layer group takes its leader's indices; groups choose for themselves.

    select_layers has the signature and the result of chunkkv.reference_layers.select_layers; it gets the leaders'
    queries.
    """
    settings, queries, keys, lengths = grouped_layers(leader)
    leaders = {settings.leader_of(group) for group in settings.layer_groups}
    chosen = select_layers({n: queries[n] for n in leaders}, keys, lengths, settings)
    assert len(chosen) == len(keys)
    for group in settings.layer_groups:
        lead = group[0] if leader == "first" else group[-1]
        own = select(queries[lead], keys[lead], lengths, settings)
        for layer in group:
            assert chosen[layer][0].tobytes() == own[0].tobytes()
            assert chosen[layer][1].tobytes() == own[1].tobytes()
    assert len({chosen[group[0]][0].tobytes() for group in settings.layer_groups}) == len(settings.layer_groups)
    return 0


def check_spread(select: Select, case: OpCase) -> int:
    """One token 30 nats above all others, for every query and head, leaves the agreement with the reference."""
    inputs = case.inputs()
    direction = np.zeros(case.head_dim)
    direction[0] = 1.0
    query = inputs.query.copy()
    query[..., 0] = np.sqrt(case.head_dim)  # a key of 30 in this direction then has a logit of 30
    key = inputs.key.copy()
    key[..., 0] = 0
    key[:, :, min(case.lengths) // 2] = 30 * direction
    return matches_reference(select, replace(inputs, query=query, key=key), case)


PROPERTIES: tuple[Check, ...] = (
    check_spread,
    check_exact_budget,
    check_chunks,
    check_keep_everything,
    check_two_runs,
    check_permuted_batch,
    check_padding_contents,
    check_row_alone,
    check_equal_scores,
    check_growing_budget,
    check_single_token_chunks,
    check_nan_ranks_lowest,
    check_matches_reference,
)
