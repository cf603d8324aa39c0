"""What is measured on the real model, by the name that the page uses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from benchmarks.real.choices import Rule, select

KEEPS = (5_000, 3_000, 2_000, 1_000)
SMALL_KEEPS = (500, 300)  # with a table of their own
LAYERS = 30
SINKS = 4
LEAST = 64  # min_tokens of the settings
FULL = "full cache"
DEFAULT = Rule()
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
RANKED = "ChunkKV, reread, one ranking of all layers"
RANKED_HEADS = "ChunkKV, reread, one ranking of all heads"
RANKED_TOKENS = "ChunkKV, reread, one ranking of all heads, single tokens"
RECIPE = "ChunkKV, reading heads, reread chunks elsewhere"  # examples/smollm2/recipe.json
STATIC = "ChunkKV, reading heads, recent tokens elsewhere"  # examples/smollm2/recipe-static.json
RECIPE_10 = "ChunkKV, reading heads, the recipe for 10 %"  # examples/smollm2/recipe-10.json
STREAMING, RANDOM = "StreamingLLM", "random chunks"
READING_24 = "ChunkKV, 24 reading heads"  # examples/smollm2/recipe-in-prompt.json
OWN = (*RULES, STREAMING, RANDOM)
PRESSES = (  # names of benchmarks.real.peers, which needs torch
    "kvpress SnapKV",
    "kvpress SnapKV, window 16",
    "kvpress ExpectedAttention",
    "kvpress KeyDiff",
    "kvpress TOVA",
    "kvpress AdaKV",
    "kvpress AdaKV, window 16",
    "kvpress ChunkKV",
    "kvpress KVzip",
)
OPENVINO_FULL = "OpenVINO GenAI, no eviction"
OPENVINO = {  # by name, how many of the last queries choose
    "OpenVINO GenAI, 8 queries": 8,
    "OpenVINO GenAI, 16 queries": 16,
}
GREEDY = "greedy"  # the mode of what is generated instead of fed
OPENVINO_FILE = "outcomes-openvino.jsonl"
BUILT = (RECIPE, STATIC, RECIPE_10, RANKED, RANKED_HEADS, RANKED_TOKENS)  # engines of their own, for later questions
ENGINES = (*BUILT, READING_24)
ONLY_AFTER = ("kvpress KVzip", *BUILT)  # they read the text for questions that come later
MEAN, FIXED_10 = "ChunkKV, mean over heads", "ChunkKV, fixed chunks of 10"
METHODS = ("ChunkKV", MEAN, FIXED_10, "SnapKV, heads sharing", STREAMING, RANDOM)
VARIANTS = tuple(name for name in RULES if name not in METHODS)
ONLY_IN = (*VARIANTS, MEAN, FIXED_10, READING_24)


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
