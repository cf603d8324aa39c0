"""One layer's compression on a device, ready to be timed: score, select, compact over the caches of a pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.gpu.device import Device
from chunkkv import reference
from chunkkv.native import BatchRows, Chunks, KVView, NativeLibrary, contiguous_kv, paged_kv
from chunkkv.settings import ChunkKVSettings


@dataclass(frozen=True)
class Variant:
    """What is unlike plain bfloat16 keys, equal lengths, fixed chunks and shared choices."""

    name: str
    key: str = "bfloat16"  # or int8, fp8
    paged: bool = False
    heads: tuple[int, int, int] | None = None  # Hq, Hkv, D
    lengths: tuple[int, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()
    delimiter_rate: float = 0.0


class Compression:
    """Buffers for rows of one length, or of the lengths of a variant; all of them belong to this object."""

    def __init__(
        self,
        device: Device,
        library: NativeLibrary,
        settings: ChunkKVSettings,
        batch: int,
        length: int,
        variant: Variant | None = None,
    ):
        self.device, self.library, self.settings = device, library, settings
        self.length, self.kept = length, settings.kept_tokens(length)
        lengths = list(variant.lengths) if variant and variant.lengths else [length] * batch
        self.rows = BatchRows(device.int32(lengths), length)
        shapes = device.shapes
        heads, kv_heads, head_dim = (variant and variant.heads) or (shapes.heads, shapes.kv_heads, shapes.head_dim)
        each = (kv_heads,) if settings.heads == "each" else ()
        self.query = device.random(batch, heads, settings.window, head_dim, seed=1)
        self.max_chunks = library.max_chunks(settings, length)
        self.chunk_scores = device.empty(batch, *each, self.max_chunks, dtype="float32")
        self.indices = device.empty(batch, *each, self.kept, dtype="int32")
        self.lengths = device.empty(batch, dtype="int32")
        self.space: Any = None
        self.chunks: Chunks | None = None
        if settings.boundaries == "delimiter":
            flags = np.random.default_rng(0).random((batch, length)) < (variant.delimiter_rate if variant else 0.1)
            self.flags = device.int32(flags)
            starts = device.empty(batch, self.max_chunks + 1, dtype="int32")
            self.chunks = Chunks(starts, device.empty(batch, dtype="int32"))
            self.boundaries()

    def boundaries(self) -> None:
        """Find the chunks of every row."""
        assert self.chunks is not None
        options = {"stream": self.device.stream}
        self.library.boundaries(self.settings, self.rows, self.flags, None, 0, self.chunks, **options)

    def score(self, cache: KVView) -> None:
        """Score the chunks of one layer."""
        options = {"chunk_scores": self.chunk_scores, "chunks": self.chunks}
        if self.space is None:
            size = self.library.score_workspace(self.settings, self.rows, self.query, cache, **options)
            self.space = self.device.workspace(size)
        arguments = (self.settings, self.rows, self.query, cache)
        self.library.score(*arguments, workspace=self.space, stream=self.device.stream, **options)

    def select(self) -> None:
        """Choose the kept tokens from the scores."""
        outputs = (self.chunk_scores, self.indices, self.lengths)
        options = {"chunks": self.chunks, "stream": self.device.stream}
        self.library.select(self.settings, self.rows, *outputs, **options)

    def compact(self, layers: list[KVView], outputs: list[KVView] | None = None) -> None:
        """Move the kept rows of the layers, in place where no outputs are given."""
        chosen = (self.rows, self.indices, self.lengths)
        self.library.compact(*chosen, layers, outputs, stream=self.device.stream)

    def check(self, key: Any, cache: KVView) -> int:
        """Compare the choice of row 0, key [Hkv, L, D], with the reference; return tokens that differ near the cut."""
        self.score(cache)
        self.select()
        self.device.wait()
        query, keys = self.device.host(self.query[0]), self.device.host(key)
        options = self.settings.window, self.settings.pooling
        scores = reference.token_scores(query, keys, *options, head_reduce=self.settings.head_reduce)
        expected = reference.select_tokens(scores, self.length, self.kept, self.settings)
        chosen = self.device.host(self.indices)[0]
        differing = np.setxor1d(chosen, expected)
        near = reference.near_cut(scores, self.length, self.kept, self.settings)
        assert len(chosen) == len(expected) and near[differing].all(), f"wrong choice at {differing[~near[differing]]}"
        return len(differing)


def caches_of(device: Device, variant: Variant, batch: int, length: int) -> list[KVView]:
    """Return as many caches as do not fit in the second-level cache together."""
    shapes = device.shapes
    _, kv_heads, head_dim = variant.heads or (shapes.heads, shapes.kv_heads, shapes.head_dim)
    item = 2 if variant.key == "bfloat16" else 1

    def noise(*shape: int, seed: int = 0) -> Any:
        return device.random(*shape, seed=seed) if item == 2 else device.bytes(*shape, dtype=variant.key, seed=seed)

    count = device.copies(2 * batch * length * kv_heads * head_dim * item)
    if variant.paged:
        return pool(device, batch, length, count)
    shape = (batch, kv_heads, length, head_dim)
    return [contiguous_kv(noise(*shape, seed=2 * i), noise(*shape, seed=2 * i + 1)) for i in range(count)]


def contiguous(device: Device, batch: int, length: int, seed: int = 2) -> tuple[Any, Any, KVView]:
    """Return K, V [B, Hkv, L, D] of noise, and both as a cache."""
    shape = (batch, device.shapes.kv_heads, length, device.shapes.head_dim)
    key, value = device.random(*shape, seed=seed), device.random(*shape, seed=seed + 1)
    return key, value, contiguous_kv(key, value)


def pool(device: Device, batch: int, length: int, layers: int) -> list[KVView]:
    """Return the caches of all layers in one pool of shuffled pages, as TensorRT-LLM lays it out."""
    shapes = device.shapes
    per_row = -(-length // shapes.page)
    blocks = device.random(batch * per_row, layers, 2, shapes.kv_heads, shapes.page, shapes.head_dim)
    order = np.random.default_rng(0).permutation(batch * per_row).reshape(batch, per_row) * layers * 2
    table = device.int32(np.stack([order, order + 1], axis=1))
    return [paged_kv(blocks, table, layer) for layer in range(layers)]
