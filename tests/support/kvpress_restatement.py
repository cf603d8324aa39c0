"""NVIDIA kvpress's ChunkKVPress over SnapKVPress, restated in NumPy (float64), with its own budget rule.

It differs from the op: chunks of a fixed grid run from token 0 through the window, the window is kept only because
its tokens score above every other one, the budget counts chunks, and row 0 of a batch decides for all rows. Equal
chunks go to the lower position here; kvpress leaves their order to torch.topk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chunkkv import reference

Floats = NDArray[np.floating[Any]]


class PressSettings(NamedTuple):
    """kvpress's own names: compression_ratio is the share that is removed."""

    compression_ratio: float
    window_size: int = 64
    kernel_size: int = 5
    chunk_length: int = 20


class Recording(NamedTuple):
    """What one run of kvpress was given and did, in float32.

    query [B,Hq,w,D] rotated, key [B,Hkv,T,D], scores [B,Hkv,T] (None where nothing is removed), kept [B,Hkv,N].
    """

    query: NDArray[Any]
    key: NDArray[Any]
    scores: NDArray[np.float32] | None
    kept: NDArray[np.integer[Any]]


def head_scores(query: Floats, key: Floats, press: PressSettings) -> NDArray[np.float64]:
    """Return SnapKV's scores [B,Hkv,T] for query [B,Hq,w,D] (rotated, the last w) and key [B,Hkv,T,D].

    The w last columns hold the largest score of the whole batch plus one.
    """
    batch, _, window, head_dim = query.shape
    kv_heads, length = key.shape[1:3]
    per_kv_head = query.astype(np.float64).reshape(batch, kv_heads, -1, window, head_dim)
    logits = np.einsum("bkgwd,bktd->bkgwt", per_kv_head, key.astype(np.float64)) / np.sqrt(head_dim)
    hidden = np.arange(length)[None, :] > np.arange(length - window, length)[:, None]
    logits[..., hidden] = -np.inf
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    prefix = weights[..., : length - window].mean(axis=3)
    edge = press.kernel_size // 2
    padded = np.pad(prefix, [(0, 0)] * 3 + [(edge, edge)])
    smoothed = np.lib.stride_tricks.sliding_window_view(padded, press.kernel_size, axis=-1).mean(axis=-1)
    scores = smoothed.mean(axis=2)
    return np.pad(scores, [(0, 0), (0, 0), (0, window)], constant_values=scores.max() + 1.0)


def chunk_bounds(length: int, press: PressSettings) -> NDArray[np.int64]:
    """Return the chunk starts of kvpress's grid, which runs from token 0 to the end."""
    return np.arange(0, length, press.chunk_length)


def chunks_kept(length: int, press: PressSettings) -> int:
    """Return kvpress's budget in chunks: truncated floating point, at least one."""
    return max(1, int(len(chunk_bounds(length, press)) * (1 - press.compression_ratio)))


def keep_chunks(token_scores: Floats, press: PressSettings) -> NDArray[np.int64]:
    """Return the tokens kept, ascending [N], when the best chunks of token_scores [T] are taken whole."""
    length = len(token_scores)
    starts = chunk_bounds(length, press)
    best = reference.chunk_order(reference.chunk_scores(token_scores, starts, length))
    number = np.arange(length) // press.chunk_length
    return np.flatnonzero(np.isin(number, best[: chunks_kept(length, press)]))


def keep_tokens(scores: Floats, press: PressSettings) -> NDArray[np.int64]:
    """Return the tokens kept per head, ascending [B,Hkv,N]: kvpress's fallback for prompts below one chunk."""
    count = max(1, int(scores.shape[-1] * (1 - press.compression_ratio)))
    return np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :count], axis=-1)


def kept_indices(query: Floats, key: Floats, press: PressSettings) -> NDArray[np.int64]:
    """Return the token numbers [B,Hkv,N] that stay of key [B,Hkv,T,D], ascending in every head."""
    batch, kv_heads, length, _ = key.shape
    if press.compression_ratio == 0:
        kept = np.arange(length)
    else:
        scores = head_scores(query, key, press)
        if length < press.chunk_length:
            return keep_tokens(scores, press)
        kept = keep_chunks(scores[0].sum(axis=0), press)
    return np.broadcast_to(kept, (batch, kv_heads, len(kept)))


def with_window(token_scores: Floats, window: int) -> NDArray[np.float64]:
    """Return token scores [T] of the op with the window ranked as kvpress ranks it: above everything."""
    scores = token_scores.astype(np.float64)
    scores[len(scores) - window :] = scores.max() + 1.0
    return scores


def budget_is_inside_window(length: int, press: PressSettings) -> bool:
    """Return whether not even all chunks that touch the window are kept: those inside it tie exactly."""
    starts = chunk_bounds(length, press)
    ends = np.append(starts[1:], length)
    return chunks_kept(length, press) < int((ends > length - press.window_size).sum())


def order_is_arbitrary(token_scores: Floats, press: PressSettings) -> bool:
    """Return whether kvpress's choice hangs on torch.topk's order of chunks that tie, exactly or in float32."""
    length = len(token_scores)
    starts = chunk_bounds(length, press)
    means = reference.chunk_scores(token_scores, starts, length)
    ones = np.ones(len(starts), dtype=np.int64)
    return len(reference.chunks_near_cut(means, ones, chunks_kept(length, press))) > 0
