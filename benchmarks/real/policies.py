"""What is measured on the real model, by the name that the page uses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from benchmarks.real.choices import Rule, select

KEEPS = (5_000, 3_000, 2_000, 1_000)
LAYERS = 30
SINKS = 4
LEAST = 64  # min_tokens of the settings
FULL = "full cache"
DEFAULT = Rule(head_reduce="max")
FIXED = replace(DEFAULT, boundaries="fixed", chunk_size=10)


def pairs(leader: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Return groups of two layers led by their first (0) or last (1) layer."""
    return tuple((first + leader, (first, first + 1)) for first in range(0, LAYERS, 2))


RULES: dict[str, Rule] = {
    "ChunkKV": DEFAULT,
    "ChunkKV, window 8": replace(DEFAULT, window=8),
    "ChunkKV, window 32": replace(DEFAULT, window=32),
    "ChunkKV, window 32, the question's in the request": replace(DEFAULT, window=32, request_window=-1),
    "ChunkKV, mean over heads": replace(DEFAULT, head_reduce="mean"),
    "ChunkKV, max over the window, mean over heads": replace(DEFAULT, head_reduce="mean", window_reduce="max"),
    "ChunkKV, value norm": replace(DEFAULT, value_norm=True),
    "ChunkKV, a choice per head": replace(DEFAULT, heads="each"),
    "ChunkKV, no pooling": replace(DEFAULT, pooling=1),
    "ChunkKV, pairs of layers, first leads": replace(DEFAULT, groups=pairs(0)),
    "ChunkKV, pairs of layers, last leads": replace(DEFAULT, groups=pairs(1)),
    "ChunkKV, fixed chunks of 10": FIXED,
    "ChunkKV, fixed chunks of 20": replace(FIXED, chunk_size=20),
    "ChunkKV, fixed chunks of 10, window 32, mean over heads": replace(FIXED, window=32, head_reduce="mean"),
    "SnapKV, heads sharing": replace(FIXED, chunk_size=1, head_reduce="mean"),
}
READING = "ChunkKV, {} reading heads"  # classes: these heads read the whole text, the others sinks and recent tokens
REREAD = "ChunkKV, reread, delimiter chunks per layer"
STREAMING, RANDOM = "StreamingLLM", "random chunks"
OWN = (*RULES, STREAMING, RANDOM)
AFTER_OWN = (
    "ChunkKV",
    "ChunkKV, mean over heads",
    "ChunkKV, a choice per head",
    "ChunkKV, fixed chunks of 10",
    "SnapKV, heads sharing",
    STREAMING,
    RANDOM,
)


@dataclass(frozen=True)
class Classes:
    """Budgets by head class (docs/method.md): which KV heads read, and how the total is shared.

    `reading` is bool [layers,Hkv]. `reading_share` and `per_10k` are in shares of 10,000.
    """

    reading: np.ndarray
    reading_share: int

    def counts(self, length: int, per_10k: int) -> tuple[int, int]:
        """Return how many tokens a reading and a local head keep; in total what all heads would keep at N(L)."""
        heads, reading = self.reading.size, int(self.reading.sum())
        whole = min(length, max(LEAST, length * per_10k // 10_000))
        least = min(length, LEAST)
        wanted = max(LEAST, length * per_10k * self.reading_share // 10**8)
        most = (heads * whole - (heads - reading) * least) // reading
        first = min(length, wanted, most)
        return first, min(length, (heads * whole - reading * first) // (heads - reading))

    def mask(self, length: int, per_10k: int, chosen: np.ndarray) -> np.ndarray:
        """Return what is kept, bool [layers,Hkv,L]: `chosen` [layers,Hkv,N] by reading heads, else recent tokens."""
        _, local = self.counts(length, per_10k)
        mask = np.zeros((*self.reading.shape, length), bool)
        mask[..., :SINKS] = True
        mask[..., length - (local - SINKS) :] = True
        for layer, head in zip(*np.nonzero(self.reading), strict=True):
            mask[layer, head] = False
            mask[layer, head, chosen[layer, head]] = True
        return mask


def streaming(length: int, count: int, shape: tuple[int, int]) -> np.ndarray:
    """Return the sinks and the most recent tokens [layers,Hkv,N]."""
    kept = np.concatenate([np.arange(SINKS), np.arange(length - count + SINKS, length)])
    return np.broadcast_to(kept, (*shape, count))


def random_chunks(length: int, count: int, shape: tuple[int, int], seed: int, window: int = 16) -> np.ndarray:
    """Return chunks of 10 drawn at random in every layer, with sinks and window [layers,Hkv,N]."""
    scores = np.random.default_rng([seed, length]).random((shape[0], 1, length - window), dtype=np.float32)
    starts = np.arange(SINKS, length - window, 10)
    chosen = select(scores, np.append(starts, length - window)[:-1], window, SINKS, count)
    return np.broadcast_to(chosen, (*shape, count))


def layer_budgets(scores: np.ndarray, starts: np.ndarray, window: int, count: int) -> np.ndarray:
    """Return the mask [layers,L] of one ranking of the chunks of all layers, `count` tokens per layer on average.

    `scores` [layers,L-W] are those of the reread prompt; every layer keeps sinks and window.
    """
    layers, end = scores.shape
    sizes = np.diff(np.append(starts, end))
    means = np.add.reduceat(scores.astype(np.float64), starts, axis=1) / sizes
    ranks = np.repeat(means, sizes, axis=1)
    budget = layers * (count - window - SINKS)
    order = np.argsort(-ranks.ravel(), kind="stable")[:budget]
    inner = np.zeros(ranks.size, bool)
    inner[order] = True
    mask = np.ones((layers, end + window), bool)
    mask[:, SINKS:end] = inner.reshape(layers, -1)
    return mask
