"""The values that the settings of ChunkKV may have, and the shapes that the native kernels are compiled for.

This is the only place that holds these numbers. The C++ code reads them from plugins/include/chunkkv/limits.h, which
plugins/generate_limits.py writes; run it after each change here. This file imports nothing, so that the generator runs
without any installed package.
"""

from __future__ import annotations

KEEP_SCALE = 10_000  # the keep_per_10k that keeps a whole prompt
INT32_MAX = 2**31 - 1

# Whole numbers: the smallest and the largest value that is allowed.
RANGES: dict[str, tuple[int, int]] = {
    "keep_per_10k": (1, KEEP_SCALE),
    "budget_tokens": (0, INT32_MAX),
    "max_keep_per_10k": (1, KEEP_SCALE),
    "window": (1, 128),
    "chunk_size": (1, 256),
    "sinks": (0, 65_536),
    "pooling": (1, 63),  # odd values only
    "min_tokens": (1, INT32_MAX),  # and at least window + sinks + chunk_size
    "num_kv_heads": (0, 65_536),
    # Products of a length, a ratio and a share stay below 2**63 for every prompt that fits in memory.
    "reading_share_per_10k": (KEEP_SCALE, 1_000_000),
    "local_share_per_10k": (0, KEEP_SCALE),
}

# Words.
CHOICES: dict[str, tuple[str, ...]] = {
    "boundaries": ("fixed", "delimiter"),
    "leader": ("first", "last"),
    "score": ("softmax", "logits", "given"),
    "window_reduce": ("mean", "max"),
    "head_reduce": ("mean", "max"),
    "value_norm": ("off", "on"),
    "heads": ("shared", "each"),
    "budget_split": ("uniform", "classes", "ranked"),
    "local_policy": ("chunks", "recent"),
}

# The words of CHOICES that the native kernels compute. The place of a word in its list is its code in the C ABI.
KERNEL_CHOICES: dict[str, tuple[str, ...]] = {
    "boundaries": ("fixed", "delimiter"),
    "score": ("softmax", "logits", "given"),
    "window_reduce": ("mean", "max"),
    "head_reduce": ("mean", "max"),
    "value_norm": ("off", "on"),
    "heads": ("shared", "each"),
    "budget_split": ("uniform", "classes"),
    "local_policy": ("chunks", "recent"),
}

KERNEL_HEAD_SIZES = (64, 80, 96, 128, 256)  # values of head_dim that the score kernel is compiled for
KERNEL_MAX_GROUP = 16  # the most query heads that may share one KV head in the score kernel
KERNEL_MAX_LENGTH = 1 << 22  # the most tokens of a prompt
