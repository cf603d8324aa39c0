"""The ChunkKV op in readable NumPy: what every other implementation is compared with.

Section numbers are those of docs/method.md, and so are the letters in shapes: B rows of the batch, Hq query heads, Hkv
KV heads, D head size, S padded length, L length of a row, w observation window, s sinks, N kept tokens, C chunks.

Sums run in float64, so a result is at least as exact as the float32 accumulation that the other implementations use.
Token scores are returned as float32, and chunk scores are means of those float32 values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chunkkv.errors import ConfigError, RequestError
from chunkkv.settings import ChunkKVSettings

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.integer[Any]]
BoolArray = NDArray[np.bool_]

NEAR_CUT = 1e-5  # relative difference of chunk scores that rounding may turn round
PAD_INDEX = -1  # in kept_indices, behind a row's own N


class Selection(NamedTuple):
    """What the op chose for a batch.

    kept_indices int32 [B, max N] holds the kept positions of each row in ascending order, PAD_INDEX behind its own N.
    kept_lengths int32 [B] holds each row's N. token_scores float32 [B,S] is zero in the window and in the padding.
    """

    kept_indices: NDArray[np.int32]
    kept_lengths: NDArray[np.int32]
    token_scores: NDArray[np.float32]


def token_scores(
    query: FloatArray, key: FloatArray, window: int, pooling: int = 1, score: str = "softmax"
) -> NDArray[np.float32]:
    """Return the score of every token of one row, float32 [L] (section 2); entries from L-w on are zero.

    Parameters
    ----------
    query : floating [Hq,w,D]
        The last w queries, rotated as attention uses them. Hq is a multiple of Hkv.
    key : floating [Hkv,L,D]
        All keys, rotated. L is at least w.
    window : int
        w, which the shape of `query` must show.
    pooling : int, default 1
        Neighbouring tokens over which scores are averaged, odd; positions outside [0, L-w) count as 0.
    score : {"softmax", "logits"}, default "softmax"
        How the window's queries score a token: mean attention weight, or sum of the raw products q·k.

    Raises
    ------
    ConfigError
        Where the shapes do not fit together, or for another `score`.
    """
    heads, rows, head_dim = query.shape
    kv_heads, length, _ = key.shape
    _check_shapes(query, key, window)
    grouped = query.astype(np.float64).reshape(kv_heads, heads // kv_heads * rows, head_dim)
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are legal contents
        logits = (grouped @ key.astype(np.float64).swapaxes(1, 2)).reshape(heads, rows, length)
        ranked = length - window
        if score == "logits":
            raw_scores = logits.sum(axis=(0, 1))[:ranked]
        elif score == "softmax":
            raw_scores = _causal_softmax(logits / np.sqrt(head_dim)).mean(axis=(0, 1))[:ranked]
        else:
            raise ConfigError(f"score is {score!r}; allowed is softmax or logits")
        if pooling > 1 and ranked > 0:
            raw_scores = np.convolve(np.pad(raw_scores, pooling // 2), np.ones(pooling), mode="valid") / pooling
        scores = np.zeros(length, dtype=np.float32)
        scores[:ranked] = raw_scores
    return scores


def _check_shapes(query: FloatArray, key: FloatArray, window: int) -> None:
    heads, rows, head_dim = query.shape
    kv_heads, length, key_dim = key.shape
    if heads % kv_heads:
        raise ConfigError(f"query has {heads} heads, key has {kv_heads}: Hq must be a multiple of Hkv")
    if head_dim != key_dim:
        raise ConfigError(f"query has head size {head_dim}, key has {key_dim}: both must be the same")
    if rows != window:
        raise ConfigError(f"query holds {rows} rows, window is {window}: give the last {window} queries")
    if length < window:
        raise ConfigError(f"key holds {length} tokens, window is {window}: such a row is kept whole, unscored")


def _causal_softmax(logits: FloatArray) -> FloatArray:
    """Return the softmax over the last axis of [Hq,w,L]; query i of the window sees keys up to its own position."""
    _, rows, length = logits.shape
    own_position = length - rows + np.arange(rows)
    masked = np.where(np.arange(length) <= own_position[:, None], logits, -np.inf)
    weights = np.exp(masked - masked.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def chunk_starts(length: int, settings: ChunkKVSettings, is_delimiter: BoolArray | None = None) -> NDArray[np.int64]:
    """Return the first position of every chunk of [s, L-w), int64 [C], ascending (section 3).

    `is_delimiter` bool [L] says which tokens end a clause or a line. It is read where settings.boundaries is
    "delimiter"; raises ConfigError where it is missing then.
    """
    end = length - settings.window
    if settings.boundaries == "fixed":
        return np.arange(settings.sinks, max(end, settings.sinks), settings.chunk_size, dtype=np.int64)
    if is_delimiter is None:
        raise ConfigError("boundaries is 'delimiter', is_delimiter is None: pass one flag per prompt token")
    starts: list[int] = []
    for position in range(settings.sinks, end):
        if not starts or is_delimiter[position - 1] or position - starts[-1] == settings.chunk_size:
            starts.append(position)
    return np.asarray(starts, dtype=np.int64)


def chunk_scores(scores: FloatArray, starts: IntArray, end: int) -> NDArray[np.float64]:
    """Return the mean score of every chunk, float64 [C], from token scores [L] (section 3).

    `starts` [C] are the chunks' first positions; chunk i ends before starts[i+1], the last one before `end`.
    """
    if len(starts) == 0:
        return np.zeros(0)
    with np.errstate(invalid="ignore"):
        totals = np.add.reduceat(scores[:end].astype(np.float64), starts)
    return totals / chunk_sizes(starts, end)


def chunk_sizes(starts: IntArray, end: int) -> NDArray[np.int64]:
    """Return the number of tokens of every chunk, int64 [C]; `starts` [C] and `end` as in chunk_scores."""
    return np.diff(np.append(starts, end)).astype(np.int64)


def chunk_order(means: FloatArray) -> NDArray[np.int64]:
    """Return chunk numbers int64 [C], best first, from chunk scores [C] (section 4).

    Descending score; equal scores by lower position; NaN last.
    """
    return np.argsort(-means, kind="stable")  # NaN sorts last, equal scores stay in position order


def select_tokens(
    scores: FloatArray,
    length: int,
    kept: int,
    settings: ChunkKVSettings,
    is_delimiter: BoolArray | None = None,
) -> NDArray[np.int32]:
    """Return the positions that stay, int32 [N], ascending (section 4).

    Parameters
    ----------
    scores : floating [L]
        Token scores of one row.
    length : int
        L.
    kept : int
        N; at least L keeps every token, less must be at least w + s.
    settings : ChunkKVSettings
        Window, sinks and chunks.
    is_delimiter : bool [L], optional
        Needed where settings.boundaries is "delimiter", or ConfigError is raised.
    """
    if kept >= length:
        return np.arange(length, dtype=np.int32)
    end = length - settings.window
    starts = chunk_starts(length, settings, is_delimiter)
    sizes = chunk_sizes(starts, end)
    stays = np.zeros(length, dtype=bool)
    stays[: settings.sinks] = True
    stays[end:] = True
    # A token ranks by its chunk's score. The sort is stable, so a chunk that does not fit gives its first tokens.
    rank_value = np.repeat(chunk_scores(scores, starts, end), sizes)
    best_first = settings.sinks + np.argsort(-rank_value, kind="stable")  # NaN last
    stays[best_first[: kept - settings.window - settings.sinks]] = True
    return np.flatnonzero(stays).astype(np.int32)


def compact(x: NDArray[Any], kept_indices: IntArray) -> NDArray[Any]:
    """Return the kept tokens of x [Hkv,L,D] as [Hkv,N,D], bytes unchanged (section 5); kept_indices is [N]."""
    return np.ascontiguousarray(x[:, kept_indices, :])


def compact_batch(x: NDArray[Any], kept_indices: IntArray) -> NDArray[Any]:
    """Return the kept tokens of x [B,Hkv,S,D] as [B,Hkv,max N,D] (section 5); kept_indices is [B, max N].

    Slots behind a row's own N repeat its first token.
    """
    rows = np.maximum(kept_indices, 0)[:, None, :, None]
    return np.take_along_axis(x, rows, axis=2)


def select_batch(
    query: FloatArray,
    key: FloatArray,
    lengths: IntArray,
    settings: ChunkKVSettings,
    *,
    keep_per_10k: IntArray | None = None,
    budget_tokens: IntArray | None = None,
    is_delimiter: BoolArray | None = None,
) -> Selection:
    """Score and select the tokens of every row of a batch (sections 1 to 4).

    Contents behind a row's length are never read. A row of fewer than w tokens scores zero and is kept whole.

    Parameters
    ----------
    query : floating [B,Hq,w,D]
        Each row's last w queries, rotated.
    key : floating [B,Hkv,S,D]
        Keys, rotated.
    lengths : integer [B]
        L of each row, 0 to S.
    settings : ChunkKVSettings
        The op's settings.
    keep_per_10k : integer [B], optional
        Keep ratio of each row, in shares of 10,000; None for the settings'.
    budget_tokens : integer [B], optional
        Budget of each row, 0 for its keep ratio; None for the settings'.
    is_delimiter : bool [B,S], optional
        Which tokens end a clause or a line.

    Raises
    ------
    RequestError
        For a length outside 0 to S.
    ConfigError
        Where shapes and settings do not fit together.
    """
    batch, _, padded, _ = key.shape
    rows: list[NDArray[np.int32]] = []
    scores = np.zeros((batch, padded), dtype=np.float32)
    for row in range(batch):
        length = int(lengths[row])
        if not 0 <= length <= padded:
            raise RequestError(f"length of row {row} is {length}; allowed is 0 to {padded}, the size of key")
        ratio = None if keep_per_10k is None else int(keep_per_10k[row])
        budget = None if budget_tokens is None else int(budget_tokens[row])
        if length >= settings.window:
            scores[row, :length] = token_scores(
                query[row], key[row, :, :length], settings.window, settings.pooling, settings.score
            )
        flags = None if is_delimiter is None else is_delimiter[row, :length]
        kept = settings.kept_tokens(length, ratio, budget)
        rows.append(select_tokens(scores[row, :length], length, kept, settings, flags))
    kept_lengths = np.array([len(indices) for indices in rows], dtype=np.int32)
    kept_indices = np.full((batch, int(kept_lengths.max(initial=0))), PAD_INDEX, dtype=np.int32)
    for row, indices in enumerate(rows):
        kept_indices[row, : len(indices)] = indices
    return Selection(kept_indices, kept_lengths, scores)


def select_layers(
    queries: Mapping[int, FloatArray],
    keys: Sequence[FloatArray],
    lengths: IntArray,
    settings: ChunkKVSettings,
    *,
    keep_per_10k: IntArray | None = None,
    budget_tokens: IntArray | None = None,
    is_delimiter: BoolArray | None = None,
) -> list[Selection]:
    """Return one Selection per layer; the layers of a group share their leader's (section 6).

    `queries` maps each leader to its queries [B,Hq,w,D]; `keys` holds [B,Hkv,S,D] for every layer; the rest is as in
    select_batch. Raises ConfigError unless settings.layer_groups lists every layer once, in order, and every leader
    has its queries.
    """
    listed = [layer for group in settings.layer_groups for layer in group]
    if listed != list(range(len(keys))):
        raise ConfigError(
            f"layer_groups is {settings.layer_groups} for {len(keys)} layers; list every layer once, in order"
        )
    chosen: list[Selection] = []
    for group in settings.layer_groups:
        leader = settings.leader_of(group)
        if leader not in queries:
            raise ConfigError(f"queries of layer {leader} are missing; it leads the group {group}")
        selection = select_batch(
            queries[leader],
            keys[leader],
            lengths,
            settings,
            keep_per_10k=keep_per_10k,
            budget_tokens=budget_tokens,
            is_delimiter=is_delimiter,
        )
        chosen.extend([selection] * len(group))
    return chosen


def chunks_near_cut(
    means: FloatArray,
    sizes: IntArray,
    budget: int,
    *,
    tolerance: float = NEAR_CUT,
    magnitude: float | None = None,
) -> NDArray[np.int64]:
    """Return the chunks that rounding may put on either side of the cut, int64, ascending; none where it is clear.

    `means` [C] and `sizes` [C] are the chunks' scores and lengths; `budget` is N - w - s. The cut is the best chunk
    that is not taken whole. A chunk is near it where their scores differ by at most tolerance * magnitude; `magnitude`
    is by default the absolute score of the cut.
    """
    order = chunk_order(means)
    whole = int(np.searchsorted(np.cumsum(sizes[order]), budget, side="right"))
    if whole >= len(order):
        return np.zeros(0, dtype=np.int64)
    cut = float(means[order[whole]])
    reach = tolerance * (abs(cut) if magnitude is None else magnitude)
    with np.errstate(invalid="ignore"):
        near = np.abs(means - cut) <= reach
    above, below = order[:whole], order[whole + 1 :]
    is_split = budget > int(sizes[above].sum())
    is_open = near[above].any() or (is_split and near[below].any())
    return np.flatnonzero(near) if is_open else np.zeros(0, dtype=np.int64)


def near_cut(
    scores: FloatArray,
    length: int,
    kept: int,
    settings: ChunkKVSettings,
    is_delimiter: BoolArray | None = None,
    *,
    tolerance: float = NEAR_CUT,
) -> BoolArray:
    """Return which tokens of a row, bool [L], lie in a chunk that rounding may put on either side of the cut.

    It tells an error of another implementation from a legal difference in rounding. Parameters as in select_tokens;
    `tolerance` as in chunks_near_cut. With score "logits" the tolerance is relative to the largest token score: terms
    of both signs cancel, so the rounding error of a sum is not bounded by the sum itself.
    """
    near = np.zeros(length, dtype=bool)
    if kept >= length:
        return near
    end = length - settings.window
    starts = chunk_starts(length, settings, is_delimiter)
    sizes = chunk_sizes(starts, end)
    magnitude = None
    if settings.score == "logits":
        finite = np.abs(scores[:end][np.isfinite(scores[:end])])
        magnitude = float(finite.max(initial=0.0))
    means = chunk_scores(scores, starts, end)
    budget = kept - settings.window - settings.sinks
    for chunk in chunks_near_cut(means, sizes, budget, tolerance=tolerance, magnitude=magnitude):
        near[starts[chunk] : starts[chunk] + sizes[chunk]] = True
    return near
