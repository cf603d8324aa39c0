"""What every variant of the op keeps, cheaply: the rule of docs/method.md over all layers at once.

Attention of the largest window is computed once per prompt; every variant reduces it. tests/test_real_measurement.py
compares the result with chunkkv.reference.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from benchmarks.real.full_cache import FullCache


@dataclass(frozen=True)
class Rule:
    """One set of settings of the op; names and meanings are those of ChunkKVSettings.

    `request_window` is w of the request, 0 for the whole window. `groups` are (leader, layers); empty: no reuse.
    """

    window: int = 16
    request_window: int = 0
    chunk_size: int = 20
    sinks: int = 4
    boundaries: str = "delimiter"
    pooling: int = 5
    window_reduce: str = "mean"
    head_reduce: str = "max"
    value_norm: bool = False
    heads: str = "shared"
    groups: tuple[tuple[int, tuple[int, ...]], ...] = ()


@dataclass
class Attention:
    """Attention of a prompt's last queries, and what was computed from it.

    `weights` float32 [layers,Hq,W,L] is causal; `is_delimiter` bool [L].
    """

    full: FullCache
    is_delimiter: np.ndarray
    weights: list[np.ndarray] = field(init=False)
    _value_norms: list[np.ndarray] = field(init=False)
    _starts: dict[tuple[str, int, int, int], np.ndarray] = field(default_factory=dict, init=False)
    _reduced: dict[tuple[int, int, str], list[np.ndarray]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.weights = [_weights(query, key) for query, key in zip(self.full.queries, self.full.keys, strict=True)]
        self._value_norms = [np.linalg.norm(value, axis=2) for value in self.full.values]

    def token_scores(self, rule: Rule) -> np.ndarray:
        """Return token scores float32 [layers,choices,L-W]: one choice per layer, or one per KV head."""
        width = rule.request_window or rule.window
        end = len(self.full) - rule.window
        key = (width, end, rule.window_reduce)
        if key not in self._reduced:
            self._reduced[key] = [
                (rows.mean(axis=1) if rule.window_reduce == "mean" else rows.max(axis=1))[:, :end]
                for rows in (weights[:, weights.shape[1] - width :] for weights in self.weights)
            ]
        scores = []
        for reduced, norms in zip(self._reduced[key], self._value_norms, strict=True):
            kv_heads = norms.shape[0]
            by_head = reduced.reshape(kv_heads, -1, end)
            if rule.value_norm:
                by_head = by_head * norms[:, None, :end]
            axes = (0, 1) if rule.heads == "shared" else 1
            pooled = by_head.mean(axis=axes) if rule.head_reduce == "mean" else by_head.max(axis=axes)
            scores.append(pooled.reshape(-1, end))
        return _pooled(np.stack(scores), rule.pooling)

    def starts(self, rule: Rule) -> np.ndarray:
        """Return the first position of every chunk, ascending."""
        end = len(self.full) - rule.window
        key = (rule.boundaries, rule.chunk_size, rule.sinks, end)
        if key not in self._starts:
            if rule.boundaries == "fixed":
                self._starts[key] = np.arange(rule.sinks, end, rule.chunk_size)
            else:
                starts = [rule.sinks]
                for position in range(rule.sinks + 1, end):
                    if self.is_delimiter[position - 1] or position - starts[-1] == rule.chunk_size:
                        starts.append(position)
                self._starts[key] = np.array(starts)
        return self._starts[key]

    def kept(self, rule: Rule, count: int) -> np.ndarray:
        """Return the kept positions int64 [layers,Hkv,N], ascending."""
        chosen = select(self.token_scores(rule), self.starts(rule), rule.window, rule.sinks, count)
        if rule.groups:
            chosen = chosen.copy()
            for leader, layers in rule.groups:
                chosen[list(layers)] = chosen[leader]
        kv_heads = self.full.keys[0].shape[0]
        return np.broadcast_to(chosen, (len(chosen), kv_heads, count))


def select(scores: np.ndarray, starts: np.ndarray, window: int, sinks: int, count: int) -> np.ndarray:
    """Return the `count` kept positions of scores [...,L-W], ascending, [...,count]: whole chunks, best first."""
    end = scores.shape[-1]
    sizes = np.diff(np.append(starts, end))
    means = np.add.reduceat(scores.astype(np.float64), starts, axis=-1) / sizes
    ranks = np.repeat(means, sizes, axis=-1)
    best = sinks + np.argsort(-ranks, axis=-1, kind="stable")[..., : count - window - sinks]
    shape = scores.shape[:-1]
    always = [np.broadcast_to(part, (*shape, len(part))) for part in (np.arange(sinks), np.arange(end, end + window))]
    return np.sort(np.concatenate([always[0], best, always[1]], axis=-1), axis=-1)


def _pooled(scores: np.ndarray, pooling: int) -> np.ndarray:
    if pooling == 1:
        return scores
    half = pooling // 2
    padded = np.pad(scores.astype(np.float64), [(0, 0), (0, 0), (half, half)])
    length = scores.shape[-1]
    total = np.sum([padded[..., shift : shift + length] for shift in range(pooling)], axis=0)
    return (total / pooling).astype(np.float32)


def _weights(query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return the causal attention weights float32 [Hq,W,L] of the last W queries."""
    heads, rows, head_dim = query.shape
    kv_heads, length, _ = key.shape
    grouped = query.reshape(kv_heads, -1, head_dim) / np.float32(np.sqrt(head_dim))
    logits = (grouped @ key.swapaxes(1, 2)).reshape(heads, rows, length)
    own = length - rows + np.arange(rows)
    tail = logits[:, :, length - rows :]
    tail[:, np.arange(rows)[None, :] > (own - (length - rows))[:, None]] = -np.inf
    logits -= logits.max(axis=-1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=-1, keepdims=True)
    return logits
