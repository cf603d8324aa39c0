"""The sizes that the GPU benchmarks run: Llama-3-8B, and a tiny stand-in for the dry run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chunkkv.settings import ChunkKVSettings

CHUNK_SIZE, SINKS, POOLING = 10, 4, 5


@dataclass(frozen=True)
class Shapes:
    """A model's sizes, and the lengths, windows, batches and keep ratios (per 10,000) that are measured."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    lengths: tuple[int, ...]
    windows: tuple[int, ...]
    batches: tuple[int, ...]
    keeps: tuple[int, ...]
    decode: tuple[tuple[int, int], ...]  # (batch, length)
    page: int
    dtype: str = "bfloat16"

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def row_bytes(self) -> int:
        """Bytes of K (or of V) of one token in one layer, all heads."""
        return self.kv_heads * self.head_dim * 2

    def settings(self, window: int, keep: int, **others: Any) -> ChunkKVSettings:
        """Return the settings of one measurement; `others` are settings that differ from version 1 of the method."""
        values = {"chunk_size": CHUNK_SIZE, "boundaries": "fixed", "head_reduce": "mean", **others}
        least = window + SINKS + values["chunk_size"]
        return ChunkKVSettings(
            window=window, sinks=SINKS, pooling=POOLING, keep_per_10k=keep, min_tokens=least, **values
        )


LLAMA_3_8B = Shapes(
    heads=32,
    kv_heads=8,
    head_dim=128,
    hidden=4096,
    intermediate=14336,
    layers=32,
    vocabulary=128256,
    lengths=(8192, 32768, 131072),
    windows=(16, 32, 64),
    batches=(1, 16),
    keeps=(1000, 3000),
    decode=((1, 32768), (16, 8192), (16, 32768)),
    page=64,
)
TINY = Shapes(
    heads=4,
    kv_heads=2,
    head_dim=64,
    hidden=128,
    intermediate=256,
    layers=4,
    vocabulary=512,
    lengths=(200, 450),
    windows=(8,),
    batches=(1, 2),
    keeps=(1000, 3000),
    decode=((1, 128), (2, 64)),
    page=16,
)
