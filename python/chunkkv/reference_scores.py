"""Section 2 of docs/method.md in readable NumPy: the score of a token. Letters are those of chunkkv.reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkkv.errors import ConfigError

FloatArray = NDArray[np.floating[Any]]

_REDUCE: dict[str, Callable[..., Any]] = {"mean": np.mean, "max": np.max}


def token_scores(
    query: FloatArray,
    key: FloatArray,
    window: int,
    pooling: int = 1,
    score: str = "softmax",
    *,
    observed: int | None = None,
    value: FloatArray | None = None,
    window_reduce: str = "mean",
    head_reduce: str = "max",
    heads: str = "shared",
) -> NDArray[np.float32]:
    """Return the score of every token of one row, float32 [L], or [Hkv,L] for heads "each" (section 2).

    Entries from L-W on are zero.

    Raises ConfigError where shapes do not fit together, for another `score`, and for `observed` outside 1 to W.

    Parameters
    ----------
    query : floating [Hq,W,D]
        The last W queries, rotated as attention uses them. Hq is a multiple of Hkv.
    key : floating [Hkv,L,D]
        All keys, rotated. L is at least W.
    window : int
        W, which the shape of `query` must show.
    pooling : int, default 1
        Tokens over which scores are averaged, odd; positions outside [0, L-W) count as 0.
    score : {"softmax", "logits"}, default "softmax"
        How a query scores a token: by its attention weight, or by the raw product q·k.
    observed : int, optional
        w, how many of the last queries score, 1 to W; None for all.
    value : floating [Hkv,L,D], optional
        The values, whose length is then a factor of every score (`value_norm`); None for none.
    window_reduce : {"mean", "max"}, default "mean"
        How the weights of the queries become one score of a head. Products q·k are summed.
    head_reduce : {"mean", "max"}, default "max"
        How the scores of the query heads become one. Products q·k are summed.
    heads : {"shared", "each"}, default "shared"
        Whether all query heads score together or those of each KV head for themselves.
    """
    (count, _, head_dim), (kv_heads, length, _) = query.shape, key.shape
    observed = window if observed is None else observed
    _check_call(query, key, window, observed, score)
    ranked, group = length - window, count // kv_heads
    grouped = query[:, window - observed :].astype(np.float64).reshape(kv_heads, group * observed, head_dim)
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are legal contents
        products = (grouped @ key.astype(np.float64).swapaxes(1, 2)).reshape(count, observed, length)
        if score == "logits":
            reduce_window, reduce_heads, weights = np.sum, np.sum, products
        else:
            reduce_window, reduce_heads = _REDUCE[window_reduce], _REDUCE[head_reduce]
            weights = _causal_softmax(products / np.sqrt(head_dim))
        of_head = reduce_window(weights[..., :ranked], axis=1).reshape(kv_heads, group, ranked)
        if value is not None:
            of_head = of_head * np.linalg.norm(value[:, None, :ranked].astype(np.float64), axis=-1)
        choices = of_head if heads == "each" else of_head.reshape(1, count, ranked)
        scores = _pooled(reduce_heads(choices, axis=1), pooling, length)
    return scores if heads == "each" else scores[0]


def given_scores(scores: FloatArray, window: int, pooling: int = 1) -> NDArray[np.float32]:
    """Return scores from outside, [L] or [Hkv,L], as token_scores returns its own: pooled, zero from L-W on."""
    ranked = scores.shape[-1] - window
    with np.errstate(invalid="ignore", over="ignore"):
        return _pooled(scores[..., :ranked].astype(np.float64), pooling, scores.shape[-1])


def _pooled(raw_scores: FloatArray, pooling: int, length: int) -> NDArray[np.float32]:
    """Return scores [..., L] of which [..., L-W] are known: the mean of each with its neighbours, zero behind."""
    ranked = raw_scores.shape[-1]
    scores = np.zeros((*raw_scores.shape[:-1], length), dtype=np.float32)
    padded = np.pad(raw_scores, [(0, 0)] * (raw_scores.ndim - 1) + [(pooling // 2, pooling // 2)])
    scores[..., :ranked] = sum(padded[..., at : at + ranked] for at in range(pooling)) / pooling
    return scores


def _check_call(query: FloatArray, key: FloatArray, window: int, observed: int, score: str) -> None:
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
    if not 1 <= observed <= window:
        raise ConfigError(f"window of the request is {observed}; allowed is 1 to {window}, the window of the settings")
    if score not in ("softmax", "logits"):
        raise ConfigError(f"score is {score!r}; allowed is softmax or logits, or given_scores for scores from outside")


def _causal_softmax(logits: FloatArray) -> FloatArray:
    """Return the softmax over the last axis of [Hq,w,L]; query i of the window sees keys up to its own position."""
    _, rows, length = logits.shape
    own_position = length - rows + np.arange(rows)
    masked = np.where(np.arange(length) <= own_position[:, None], logits, -np.inf)
    weights = np.exp(masked - masked.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)
