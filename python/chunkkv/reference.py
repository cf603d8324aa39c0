"""The ChunkKV op in readable NumPy: what every other implementation is compared with.

Section numbers are those of docs/method.md, and so are the letters in shapes: B rows of the batch, Hq query heads, Hkv
KV heads, D head size, S padded length, L length of a row, W observation window, w the part of it that scores, s sinks,
N kept tokens, C chunks. This module computes one layer. Section 2 is in chunkkv.reference_scores, and what concerns all
layers together in chunkkv.reference_layers.

Sums run in float64, so a result is at least as exact as the float32 accumulation that the other implementations use.
Token scores are returned as float32, and chunk scores are means of those float32 values.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chunkkv.errors import ConfigError, RequestError
from chunkkv.reference_scores import FloatArray, given_scores, token_scores
from chunkkv.settings import ChunkKVSettings

IntArray = NDArray[np.integer[Any]]
BoolArray = NDArray[np.bool_]

NEAR_CUT = 1e-5  # relative difference of chunk scores that rounding may turn round
PAD_INDEX = -1  # in kept_indices, behind a row's own N


class Selection(NamedTuple):
    """What the op chose for a batch.

    kept_indices int32 [B, max N] holds the kept positions of each row in ascending order, PAD_INDEX behind its own N.
    kept_lengths int32 [B] holds each row's N. token_scores float32 [B,S] is zero in the window and in the padding.
    Where every KV head chooses for itself, indices are [B, Hkv, max N] and scores [B,Hkv,S].
    """

    kept_indices: NDArray[np.int32]
    kept_lengths: NDArray[np.int32]
    token_scores: NDArray[np.float32]


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


def recent_tokens(length: int, kept: int, sinks: int) -> NDArray[np.int32]:
    """Return the positions that stay with policy "recent", int32 [N]: the sinks and the last tokens (section 4).

    `length` is L and `kept` N; at least L keeps every token.
    """
    if kept >= length:
        return np.arange(length, dtype=np.int32)
    return np.concatenate([np.arange(sinks), np.arange(length - kept + sinks, length)]).astype(np.int32)


def compact(x: NDArray[Any], kept_indices: IntArray) -> NDArray[Any]:
    """Return the kept tokens of x [Hkv,L,D] as [Hkv,N,D], bytes unchanged (section 5).

    kept_indices is [N], or [Hkv,N] where each KV head keeps its own.
    """
    return compact_batch(x[None], kept_indices[None])[0]


def compact_batch(x: NDArray[Any], kept_indices: IntArray) -> NDArray[Any]:
    """Return the kept tokens of x [B,Hkv,S,D] as [B,Hkv,max N,D] (section 5).

    kept_indices is [B, max N], or [B, Hkv, max N] where each KV head keeps its own. Slots behind a row's own N repeat
    its first token.
    """
    shared = kept_indices if kept_indices.ndim == 3 else kept_indices[:, None]
    return np.take_along_axis(x, np.maximum(shared, 0)[..., None], axis=2)


def select_batch(
    query: FloatArray | None,
    key: FloatArray,
    lengths: IntArray,
    settings: ChunkKVSettings,
    *,
    window: IntArray | None = None,
    value: FloatArray | None = None,
    scores: FloatArray | None = None,
    head_class: str = "all",
    keep_per_10k: IntArray | None = None,
    budget_tokens: IntArray | None = None,
    is_delimiter: BoolArray | None = None,
) -> Selection:
    """Score and select the tokens of every row of a batch, for one layer or one class of its heads (sections 1 to 4).

    Contents behind a row's length are never read. A row of fewer than W tokens scores zero and is kept whole.

    Raises RequestError for a length outside 0 to S, and ConfigError where shapes and settings do not fit together and
    for a window outside 1 to W.

    Parameters
    ----------
    query : floating [B,Hq,W,D] or None
        Each row's last W queries, rotated. None where nothing is scored, and where `scores` are given.
    key : floating [B,Hkv,S,D]
        Keys, rotated. Query, key and value hold the heads of `head_class` only.
    lengths : integer [B]
        L of each row, 0 to S.
    settings : ChunkKVSettings
        The op's settings.
    window : integer [B], optional
        w of each row, 1 to W; None for W.
    value : floating [B,Hkv,S,D], optional
        Values; needed where settings.value_norm is "on".
    scores : floating [B,S] or [B,Hkv,S], optional
        Scores from outside; needed where settings.score is "given".
    head_class : {"all", "reading", "local"}, default "all"
        Which class of heads it is; "all" where settings.budget_split is "uniform".
    keep_per_10k, budget_tokens : integer [B], optional
        Keep ratio in shares of 10,000 and budget (0 for the ratio) of each row; None for the settings'.
    is_delimiter : bool [B,S], optional
        Which tokens end a clause or a line.
    """
    batch, kv_heads, padded, _ = key.shape
    each = settings.heads == "each"
    indices: list[list[NDArray[np.int32]]] = []
    all_scores = np.zeros((batch, kv_heads, padded) if each else (batch, padded), dtype=np.float32)
    for row in range(batch):
        length = int(lengths[row])
        if not 0 <= length <= padded:
            raise RequestError(f"length of row {row} is {length}; allowed is 0 to {padded}, the size of key")
        arrays = (None if x is None else x[row] for x in (query, value, scores))
        flags = None if is_delimiter is None else is_delimiter[row, :length]
        numbers = (None if x is None else int(x[row]) for x in (keep_per_10k, budget_tokens, window))
        row_scores, chosen = _select_row(settings, head_class, key[row, :, :length], numbers, arrays, flags)
        all_scores[row, ..., :length] = row_scores
        indices.append(chosen)
    kept_indices, kept_lengths = _padded(indices, kv_heads if each else 1)
    return Selection(kept_indices if each else kept_indices[:, 0], kept_lengths, all_scores)


def _select_row(
    settings: ChunkKVSettings,
    head_class: str,
    key: FloatArray,
    numbers: Iterable[int | None],
    arrays: Iterable[FloatArray | None],
    flags: BoolArray | None,
) -> tuple[NDArray[np.float32], list[NDArray[np.int32]]]:
    """Return the token scores of one row and the kept positions of every choice.

    `numbers` are the row's ratio, budget and window, `arrays` its query, value and scores from outside.
    """
    kv_heads, length, _ = key.shape
    each = settings.heads == "each"
    ratio, budget, observed = numbers
    kept = settings.class_lengths(length, ratio, budget)[head_class == "local"]
    if head_class == "local" and settings.local_policy == "recent":
        zeros = np.zeros((kv_heads, length) if each else length, dtype=np.float32)
        return zeros, [recent_tokens(length, kept, settings.sinks)] * (kv_heads if each else 1)
    scores = _row_scores(settings, key, observed, *arrays)
    choices = scores if each else scores[None]
    return scores, [select_tokens(of_choice, length, kept, settings, flags) for of_choice in choices]


def _padded(indices: list[list[NDArray[np.int32]]], choices: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the kept positions of every row and choice as one array [B, choices, max N], and each row's N [B]."""
    kept_lengths = np.array([len(row[0]) for row in indices], dtype=np.int32)
    kept_indices = np.full((len(indices), choices, int(kept_lengths.max(initial=0))), PAD_INDEX, dtype=np.int32)
    for row, of_choices in enumerate(indices):
        kept_indices[row, :, : kept_lengths[row]] = of_choices
    return kept_indices, kept_lengths


def _row_scores(
    settings: ChunkKVSettings,
    key: FloatArray,
    observed: int | None,
    query: FloatArray | None,
    value: FloatArray | None,
    scores: FloatArray | None,
) -> NDArray[np.float32]:
    """Return the token scores of one row whose keys are [Hkv,L,D], [L] or [Hkv,L]."""
    kv_heads, length, _ = key.shape
    each, window = settings.heads == "each", settings.window
    if length < window:
        return np.zeros((kv_heads, length) if each else length, dtype=np.float32)
    if settings.score == "given":
        if scores is None or scores.ndim != 1 + each:
            raise ConfigError(
                f"score is 'given' and heads is {settings.heads!r}: pass scores, for each head its own or one for all"
            )
        return given_scores(scores[..., :length], window, settings.pooling)
    if query is None or (value is None and settings.value_norm == "on"):
        raise ConfigError(
            f"score is {settings.score!r} and value_norm {settings.value_norm!r}: pass query, and value for value_norm"
        )
    return token_scores(
        query,
        key,
        window,
        settings.pooling,
        settings.score,
        observed=observed,
        value=value[:, :length] if value is not None and settings.value_norm == "on" else None,
        window_reduce=settings.window_reduce,
        head_reduce=settings.head_reduce,
        heads=settings.heads,
    )


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
    `tolerance` as in chunks_near_cut. With another score than "softmax" the tolerance is relative to the largest token
    score: terms of both signs cancel, so the rounding error of a sum is not bounded by the sum itself.
    """
    near = np.zeros(length, dtype=bool)
    if kept >= length:
        return near
    end = length - settings.window
    starts = chunk_starts(length, settings, is_delimiter)
    sizes = chunk_sizes(starts, end)
    magnitude = None
    if settings.score != "softmax":
        finite = np.abs(scores[:end][np.isfinite(scores[:end])])
        magnitude = float(finite.max(initial=0.0))
    means = chunk_scores(scores, starts, end)
    budget = kept - settings.window - settings.sinks
    for chunk in chunks_near_cut(means, sizes, budget, tolerance=tolerance, magnitude=magnitude):
        near[starts[chunk] : starts[chunk] + sizes[chunk]] = True
    return near
