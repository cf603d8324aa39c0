"""Packed batches over paged pools as TensorRT-LLM lays them out, and what the ChunkKV plugins must make of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkkv import reference
from chunkkv.settings import ChunkKVSettings
from native.memory import Memory, numpy_dtype
from native.plugin_op import PluginNode

# Scores that ranks add up make a mean.
SETTINGS = ChunkKVSettings(window=4, chunk_size=3, sinks=2, min_tokens=9, keep_per_10k=4_000, head_reduce="mean")
MAX_LENGTH = 64
UNUSED = 2**30  # what no plugin may read in a block table


def setting_fields(settings: ChunkKVSettings, **others: Any) -> dict[str, Any]:
    """Return the fields that all packed plugins but rope have."""
    names = ("window", "sinks", "chunk_size", "boundaries", "pooling", "score", "keep_per_10k", "budget_tokens")
    own = {name: getattr(settings, name) for name in (*names, "min_tokens")} | {"max_length": MAX_LENGTH}
    reductions = {name: getattr(settings, name) for name in ("window_reduce", "head_reduce", "value_norm")}
    return own | reductions | others


@dataclass
class PackedBatch:
    """Context rows of `prompts` tokens, then one generation row per (prompt, tokens seen); heads of one rank."""

    prompts: tuple[int, ...] = (50, 7, 33)
    generations: tuple[tuple[int, int], ...] = ((40, 45), (9, 10))
    settings: ChunkKVSettings = SETTINGS
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    qkv_type: str = "float32"
    seed: int = 0
    qkv: NDArray[Any] = field(init=False)
    is_delimiter: NDArray[np.int32] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng([self.seed, 5])
        width = (self.heads + 2 * self.kv_heads) * self.head_size
        self.qkv = rng.normal(size=(self.tokens, width)).astype(numpy_dtype(self.qkv_type))
        self.is_delimiter = (rng.random(self.tokens) < 0.2).astype(np.int32)

    @property
    def contexts(self) -> int:
        return len(self.prompts)

    @property
    def rows(self) -> int:
        return len(self.prompts) + len(self.generations)

    @property
    def tokens(self) -> int:
        return sum(self.prompts) + len(self.generations)

    @property
    def context_lengths(self) -> NDArray[np.int32]:
        return np.array([*self.prompts, *(prompt for prompt, _ in self.generations)], np.int32)

    @property
    def sequence_length(self) -> NDArray[np.int32]:
        return np.array([*self.prompts, *(seen for _, seen in self.generations)], np.int32)

    @property
    def host_request_types(self) -> NDArray[np.int32]:
        return np.array([0] * self.contexts + [1] * len(self.generations), np.int32)

    @property
    def kept_lengths(self) -> NDArray[np.int32]:
        return np.array([self.settings.kept_tokens(int(length)) for length in self.context_lengths], np.int32)

    @property
    def row_starts(self) -> NDArray[np.int32]:
        sizes = [*self.prompts, *[1] * len(self.generations)]
        return np.cumsum([0, *sizes])[: self.rows].astype(np.int32)

    @property
    def compresses(self) -> bool:
        return bool((self.kept_lengths < self.context_lengths)[: self.contexts].any())

    def parts(self, row: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return queries [Hq,L,D] and keys [Hkv,L,D] of a context row."""
        start, length = self.row_starts[row], self.prompts[row]
        heads = self.qkv[start : start + length].reshape(length, -1, self.head_size).swapaxes(0, 1)
        return heads[: self.heads], heads[self.heads : self.heads + self.kv_heads]

    def token_scores(self, row: int) -> NDArray[np.float32]:
        query, key = self.parts(row)
        window, rule = self.settings.window, self.settings.head_reduce
        options = window, self.settings.pooling, self.settings.score
        return reference.token_scores(query[:, -window:], key, *options, head_reduce=rule)

    def flags(self, row: int) -> NDArray[np.bool_]:
        start = self.row_starts[row]
        return self.is_delimiter[start : start + self.prompts[row]] != 0

    def kept(self, row: int) -> NDArray[np.int32]:
        """Return the tokens that a context row keeps, ascending."""
        length, kept = self.prompts[row], int(self.kept_lengths[row])
        scores = self.token_scores(row) if length >= self.settings.window else np.zeros(length, np.float32)
        return reference.select_tokens(scores, length, kept, self.settings, self.flags(row))

    def chunk_scores(self) -> NDArray[np.float64]:
        """Return [T] of the score plugin: zero but for the chunks of compressed rows."""
        packed = np.zeros(self.tokens)
        for row, length in enumerate(self.prompts):
            if self.kept_lengths[row] < length:
                starts = reference.chunk_starts(length, self.settings, self.flags(row))
                means = reference.chunk_scores(self.token_scores(row), starts, length - self.settings.window)
                packed[self.row_starts[row] :][: len(means)] = means
        return packed

    def indices(self) -> NDArray[np.int32]:
        """Return kept_indices [T], -1 where a plugin may write anything."""
        packed = np.full(self.tokens, -1, np.int32)
        for row in range(self.contexts):
            kept = self.kept(row)
            packed[self.row_starts[row] :][: len(kept)] = kept
        return packed

    def delimiter_input(self) -> list[NDArray[np.int32]]:
        return [self.is_delimiter] if self.settings.boundaries == "delimiter" else []

    def head_fields(self) -> dict[str, int]:
        return {"num_heads": self.heads, "num_kv_heads": self.kv_heads, "head_size": self.head_size}

    def score_fields(self) -> dict[str, Any]:
        return setting_fields(self.settings) | self.head_fields()

    def score_inputs(self) -> list[NDArray[Any]]:
        host = [self.host_request_types, self.context_lengths]
        return [self.qkv, self.context_lengths, self.row_starts, *host, *self.delimiter_input()]


@dataclass
class Pools:
    """Paged pools [blocks, layers, K and V, Hkv, tokens_per_block, D bytes] of scattered blocks."""

    batch: PackedBatch
    memory: Memory
    pool_of_layer: tuple[int, ...] = (0, 0, 0)
    tokens_per_block: int = 8
    kv_type: str = "float16"
    mapping_rank: int = 2
    kept_back: list[NDArray[np.uint8]] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng([self.batch.seed, 9])
        lengths = self.batch.sequence_length
        counts = [-(-int(length) // self.tokens_per_block) for length in lengths]
        pools, width = max(self.pool_of_layer) + 1, max(counts, default=0) + 2
        self.places = [self.pool_of_layer[:layer].count(pool) for layer, pool in enumerate(self.pool_of_layer)]
        self.offsets = np.full((pools, len(counts), 2, width), UNUSED, np.int32)
        self.kept_back, self.raw = [], []
        for pool in range(pools):
            layers = self.pool_of_layer.count(pool)
            blocks = sum(counts) + 5
            free = rng.permutation(blocks)
            for row, count in enumerate(counts):
                mine, free = free[:count], free[count:]
                self.offsets[pool, row, 0, :count] = mine * layers * 2
                self.offsets[pool, row, 1, :count] = mine * layers * 2 + 1
            shape = (blocks, layers, 2, self.batch.kv_heads, self.tokens_per_block, self.row_bytes)
            content = rng.integers(0, 256, shape, np.uint8)
            self.kept_back.append(content)
            self.raw.append(self.memory.put(content))

    @property
    def row_bytes(self) -> int:
        return self.batch.head_size * numpy_dtype(self.kv_type).itemsize

    @property
    def pointers(self) -> NDArray[np.int64]:
        return np.array([[raw.pointer, 0] for raw in self.raw], np.int64)

    @property
    def mapping(self) -> NDArray[np.int32]:
        if self.mapping_rank == 1:
            return np.array(self.pool_of_layer, np.int32)
        return np.array([self.pool_of_layer, self.places], np.int32).T

    def contents(self) -> list[NDArray[np.uint8]]:
        return [self.memory.get(raw) for raw in self.raw]

    def fields(self, role: str, layers: list[int]) -> dict[str, Any]:
        """Return the fields of a compress node for these layers."""
        own = {"role": role, "layers": layers, "mapping_rank": self.mapping_rank, "order_only": 0}
        own |= {"tokens_per_block": self.tokens_per_block, "kv_bytes": numpy_dtype(self.kv_type).itemsize}
        if self.mapping_rank == 1:
            own["layer_in_pool"] = [self.places[layer] for layer in layers]
        return setting_fields(self.batch.settings) | self.batch.head_fields() | own

    def inputs(self, role: str, context: NDArray[Any], source: NDArray[Any]) -> list[NDArray[Any]]:
        """Return the inputs of a compress node."""
        batch = self.batch
        rows = [batch.kept_lengths, batch.row_starts, batch.context_lengths]
        host = [batch.host_request_types, batch.context_lengths]
        paged = [self.offsets, self.pointers, self.mapping]
        return [context, source, *rows, *host, *paged, *(batch.delimiter_input() if role != "follower" else [])]

    def context(self, dtype: str = "float32") -> NDArray[Any]:
        """Return an attention output of arbitrary bits."""
        rng = np.random.default_rng([self.batch.seed, 4])
        size = self.batch.heads * self.batch.head_size * numpy_dtype(dtype).itemsize
        return rng.integers(0, 256, (self.batch.tokens, size), np.uint8).view(numpy_dtype(dtype))

    def expected(self, layers: list[int]) -> list[NDArray[np.uint8]]:
        """Return all pools after compacting `layers`: the kept tokens in front, all else as it was."""
        pools = [content.copy() for content in self.kept_back]
        for row, length in enumerate(self.batch.prompts):
            kept = self.batch.kept(row)
            if len(kept) == length:
                continue
            for layer in layers:
                for kv in (0, 1):
                    before = self._tokens(self.kept_back, layer, row, kv)[:, :length]
                    after = self._tokens(pools, layer, row, kv)
                    after[:, : len(kept)] = reference.compact(before, kept)
                    self._store(pools, layer, row, kv, after)
        return pools

    def _blocks(self, layer: int, row: int, kv: int) -> tuple[int, int, NDArray[np.int32]]:
        pool = self.pool_of_layer[layer]
        offsets = self.offsets[pool, row, kv]
        return pool, self.places[layer], offsets[offsets != UNUSED] // (self.pool_of_layer.count(pool) * 2)

    def _tokens(self, pools: list[NDArray[np.uint8]], layer: int, row: int, kv: int) -> NDArray[np.uint8]:
        pool, place, blocks = self._blocks(layer, row, kv)
        found = pools[pool][blocks, place, kv]
        return found.swapaxes(0, 1).reshape(self.batch.kv_heads, -1, self.row_bytes)

    def _store(self, pools: list[NDArray[np.uint8]], layer: int, row: int, kv: int, tokens: NDArray[np.uint8]) -> None:
        pool, place, blocks = self._blocks(layer, row, kv)
        split = tokens.reshape(self.batch.kv_heads, len(blocks), self.tokens_per_block, self.row_bytes)
        pools[pool][blocks, place, kv] = split.swapaxes(0, 1)

    def compress(
        self, role: str, layers: list[int], source: NDArray[Any], context: NDArray[Any] | None = None
    ) -> list[NDArray[Any]]:
        """Run a compress node on these pools."""
        given = self.context() if context is None else context
        node = PluginNode("ChunkKVCompress", self.fields(role, layers), memory=self.memory)
        return node.run(self.inputs(role, given, source))
