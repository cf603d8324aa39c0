"""One table of op inputs that the tests of every implementation share; support/op_strategies.py draws more."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from chunkkv.limits import KERNEL_CHOICES
from chunkkv.settings import ChunkKVSettings

STORAGE_TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class OpInputs:
    """Arrays of one call: query [B,Hq,W,D], key [B,Hkv,S,D], lengths [B], and the optional inputs of select_batch."""

    query: NDArray[Any]
    key: NDArray[Any]
    lengths: NDArray[np.int32]
    keep_per_10k: NDArray[np.int32] | None = None
    budget_tokens: NDArray[np.int32] | None = None
    is_delimiter: NDArray[np.bool_] | None = None
    window: NDArray[np.int32] | None = None
    value: NDArray[Any] | None = None
    scores: NDArray[np.float32] | None = None

    def optional(self) -> dict[str, Any]:
        """Return the keyword arguments of select_batch; those of some settings only where they are present."""
        special = {"window": self.window, "value": self.value, "scores": self.scores}
        return {
            "keep_per_10k": self.keep_per_10k,
            "budget_tokens": self.budget_tokens,
            "is_delimiter": self.is_delimiter,
            **{name: array for name, array in special.items() if array is not None},
        }

    def take_rows(self, rows: list[int]) -> OpInputs:
        """Return the inputs of the given rows, in the given order."""

        def take(values: Any) -> Any:
            return None if values is None else values[rows]

        optional = {name: take(values) for name, values in self.optional().items()}
        return OpInputs(take(self.query), take(self.key), take(self.lengths), **optional)


@dataclass(frozen=True)
class OpCase:
    """A call described by numbers; its arrays follow from them, so a failing case can be read and repeated.

    `contrast` scales the logits, `delimiter_rate` is the share of delimiter tokens, `extra_padding` what S exceeds
    the longest row by. keep_per_10k, budget_tokens and window hold one value per row, or None to use the settings.
    """

    name: str
    settings: ChunkKVSettings
    lengths: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    keep_per_10k: tuple[int, ...] | None = None
    budget_tokens: tuple[int, ...] | None = None
    extra_padding: int = 0
    delimiter_rate: float = 0.2
    contrast: float = 2.0
    seed: int = field(default=0)
    window: tuple[int, ...] | None = None

    @property
    def choices(self) -> int:
        """How many choices of tokens a row makes."""
        return self.kv_heads if self.settings.heads == "each" else 1

    @property
    def choice_lengths(self) -> tuple[int, ...]:
        """The length of the row of every choice."""
        return tuple(length for length in self.lengths for _ in range(self.choices))

    def inputs(self, storage: str = "float32") -> OpInputs:
        """Return the arrays, with query and key rounded to the storage type."""
        rng = np.random.default_rng([self.seed, zlib.crc32(self.name.encode())])
        batch, padded = len(self.lengths), max(self.lengths) + self.extra_padding
        dtype = STORAGE_TYPES[storage]
        query = rng.normal(size=(batch, self.heads, self.settings.window, self.head_dim)) * self.contrast
        key = rng.normal(size=(batch, self.kv_heads, padded, self.head_dim))
        flags = rng.random((batch, padded)) < self.delimiter_rate
        value = rng.normal(size=key.shape) * rng.gamma(2.0, size=(*key.shape[:3], 1))
        given_shape = (batch, self.kv_heads, padded) if self.settings.heads == "each" else (batch, padded)
        scores = rng.normal(size=given_shape).astype(np.float32)
        return OpInputs(
            query=query.astype(dtype),
            key=key.astype(dtype),
            lengths=np.array(self.lengths, dtype=np.int32),
            keep_per_10k=None if self.keep_per_10k is None else np.array(self.keep_per_10k, dtype=np.int32),
            budget_tokens=None if self.budget_tokens is None else np.array(self.budget_tokens, dtype=np.int32),
            is_delimiter=flags if self.settings.boundaries == "delimiter" else None,
            window=None if self.window is None else np.array(self.window, dtype=np.int32),
            value=value.astype(dtype) if self.settings.value_norm == "on" else None,
            scores=scores if self.settings.score == "given" else None,
        )

    def with_settings(self, **changes: Any) -> OpCase:
        """Return the case with other settings; those that act on attention weights go where the score has none."""
        if changes.get("score", "softmax") != "softmax":
            changes = {"window_reduce": "mean", "head_reduce": "mean", "value_norm": "off", **changes}
        return replace(self, settings=replace(self.settings, **changes))


def _settings(window: int, chunk_size: int, sinks: int, **others: Any) -> ChunkKVSettings:
    """Return small settings; heads are averaged unless a case says otherwise, for which the kernels have own code."""
    others = {"min_tokens": window + chunk_size + sinks, "head_reduce": "mean", **others}
    return ChunkKVSettings(**{"window": window, "chunk_size": chunk_size, "sinks": sinks, "pooling": 1, **others})


_PLAIN = _settings(4, 3, 2, keep_per_10k=4_000)
_DELIMITER = replace(_PLAIN, boundaries="delimiter")

CASES: tuple[OpCase, ...] = (
    OpCase("plain", _PLAIN, (50,)),
    OpCase("smallest settings", _settings(1, 1, 0, keep_per_10k=3_000), (3, 2, 17), 1, 1, 2),
    OpCase("one token prompt", _PLAIN, (1,)),
    OpCase("around the window and min_tokens", _PLAIN, (3, 4, 5, 9, 10, 12)),
    OpCase("min_tokens above the ratio", replace(_PLAIN, min_tokens=20, keep_per_10k=1_000), (20, 21, 60)),
    OpCase("no sinks", _settings(4, 5, 0), (41, 30)),
    OpCase("many sinks", _settings(2, 4, 11, keep_per_10k=5_000), (45, 44, 43, 42)),
    OpCase("heads one to one", _PLAIN, (40, 37), 3, 3),
    OpCase("one KV head", _PLAIN, (40, 39), 8, 1),
    OpCase("seven query heads per KV head", _PLAIN, (33, 29), 14, 2, 16),
    OpCase("ragged batch with padding", _PLAIN, (64, 7, 31, 12), extra_padding=9),
    OpCase("whole chunks only", _settings(4, 5, 1, budget_tokens=20), (55, 65)),
    OpCase("short last chunk", _settings(4, 5, 1), (56, 57, 58, 59)),
    OpCase("chunk longer than the rest", _settings(3, 40, 1, min_tokens=44), (46, 90)),
    OpCase("keep everything", replace(_PLAIN, keep_per_10k=10_000), (50, 23)),
    OpCase("smallest ratio", replace(_PLAIN, keep_per_10k=1), (300, 9)),
    OpCase("pooling 3", replace(_PLAIN, pooling=3), (48, 11)),
    OpCase("pooling 5 wider than what is ranked", replace(_PLAIN, pooling=5, min_tokens=9), (10, 44)),
    OpCase("pooling without sinks", _settings(5, 4, 0, pooling=5), (39, 28)),
    OpCase("logits", replace(_PLAIN, score="logits"), (50, 22)),
    OpCase("logits pooled by delimiter", replace(_DELIMITER, score="logits", pooling=3), (50, 22)),
    OpCase("delimiter", _DELIMITER, (60, 47, 13)),
    OpCase("delimiter everywhere", _DELIMITER, (40, 12), delimiter_rate=1.0),
    OpCase("delimiter nowhere", _DELIMITER, (40, 12), delimiter_rate=0.0),
    OpCase("delimiter with long chunks", _settings(4, 16, 3, boundaries="delimiter"), (90, 77), extra_padding=5),
    OpCase("budget of the settings", replace(_PLAIN, budget_tokens=17), (50, 17, 16, 9)),
    OpCase("ratio per row", _PLAIN, (50, 50, 50), keep_per_10k=(1_000, 5_000, 10_000)),
    OpCase("budget per row", _PLAIN, (50, 50, 50), budget_tokens=(13, 0, 49)),
    OpCase(
        "ratio and budget per row",
        replace(_DELIMITER, budget_tokens=12),
        (50, 44, 38),
        keep_per_10k=(9_000, 2_500, 6_000),
        budget_tokens=(0, 21, 0),
    ),
    OpCase("flat attention", _PLAIN, (52, 40), contrast=0.05),
    OpCase("peaked attention", _PLAIN, (52, 40), contrast=12.0),
    OpCase("head size 128", _PLAIN, (70, 41), 8, 2, 128),
    OpCase("product settings", ChunkKVSettings(keep_per_10k=2_000), (500, 321), 8, 2, 64),
    OpCase("SnapKV settings", _settings(64, 20, 0, pooling=5, keep_per_10k=4_000), (300, 217), 8, 2, 16),
    OpCase("window per row", _PLAIN, (50, 41, 33, 9), window=(1, 4, 3, 2)),
    OpCase("window per row, logits", replace(_PLAIN, score="logits"), (50, 41), window=(1, 3)),
    OpCase("largest query", replace(_PLAIN, window_reduce="max", pooling=3), (50, 41)),
    OpCase("largest query of a window per row", replace(_PLAIN, window_reduce="max"), (50, 41), window=(2, 3)),
    OpCase("largest head", replace(_DELIMITER, head_reduce="max"), (50, 41), window=(4, 2)),
    OpCase("largest head and query", replace(_PLAIN, window_reduce="max", head_reduce="max"), (50, 12), 6, 2),
    OpCase("value norm", replace(_PLAIN, value_norm="on"), (50, 41), extra_padding=4),
    OpCase("value norm of the largest head", replace(_PLAIN, value_norm="on", head_reduce="max"), (50, 41), 6, 3),
    OpCase("each head", replace(_PLAIN, heads="each"), (50, 41, 7), extra_padding=3),
    OpCase("each head by delimiter", replace(_DELIMITER, heads="each", pooling=3), (50, 12, 29), 6, 3),
    OpCase("each head, logits", replace(_PLAIN, heads="each", score="logits"), (50, 41)),
    OpCase(
        "each head with everything",
        replace(_DELIMITER, heads="each", window_reduce="max", head_reduce="max", value_norm="on", pooling=3),
        (50, 41),
        window=(3, 4),
        budget_tokens=(17, 0),
    ),
    OpCase("given scores", replace(_PLAIN, score="given", pooling=3), (50, 41, 9), extra_padding=2),
    OpCase("given scores of each head", replace(_DELIMITER, score="given", heads="each"), (50, 41), 4, 4),
)

# What the native kernels and the plugins are tested with: the others ask for words that they do not compute.
KERNEL_CASES = tuple(
    case
    for case in CASES
    if case.window is None and all(getattr(case.settings, name) in words for name, words in KERNEL_CHOICES.items())
)
# L * keep_per_10k exceeds 32 bits here; kept out of CASES because not every implementation is built for such a row.
LONG_CASE = OpCase("long row", _settings(1, 10, 0, keep_per_10k=9_900), (220_000,), 1, 1, 2)


def named(name: str) -> OpCase:
    """Return the case of that name."""
    return next(case for case in CASES if case.name == name)
