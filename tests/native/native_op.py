"""The op as boundaries, score and select of libchunkkv, callable like chunkkv.reference.select_batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from chunkkv.native import BatchRows, Chunks, KVView, NativeLibrary, RawArray, contiguous_kv, packed_kv, paged_kv
from chunkkv.settings import ChunkKVSettings
from native.memory import POISON, Memory

LAYOUTS = ("contiguous", "tokens first", "packed", "paged")
TRAILING = 3  # tokens behind the last row of packed arrays, as generation rows are
POOL_LAYERS = 2
KEY_SCALE = 0.03125 * 1.1


def quantize(key: NDArray[Any], storage: str) -> NDArray[Any]:
    """Return keys as int8 or fp8, to be read times KEY_SCALE; NaN becomes 0 in int8."""
    scaled = key.astype(np.float32) / np.float32(KEY_SCALE)
    if storage == "int8":
        return np.nan_to_num(np.clip(np.round(scaled), -127, 127), nan=0.0).astype(np.int8)
    return np.clip(scaled, -448, 448).astype(ml_dtypes.float8_e4m3fn)


def dequantize(key: NDArray[Any]) -> NDArray[np.float32]:
    """Return what quantized keys stand for."""
    return key.astype(np.float32) * np.float32(KEY_SCALE)


def make_cache(
    memory: Memory,
    key: NDArray[Any],
    layout: str,
    block: int = 16,
    seed: int = 0,
    value: NDArray[Any] | None = None,
) -> KVView:
    """Return key [B, Hkv, S, D] as the K of a cache in one of LAYOUTS; everything that holds no key is poison.

    `value` of the same shape is its V; None where nothing reads V.
    """
    batch, heads, tokens, head_dim = key.shape

    def both(place: Callable[[NDArray[Any]], RawArray]) -> tuple[RawArray, RawArray]:
        raw = place(key)
        return raw, raw if value is None else place(value)

    if layout == "contiguous":
        return contiguous_kv(*both(memory.put))
    if layout == "tokens first":

        def tokens_first(x: NDArray[Any]) -> RawArray:
            raw = memory.put(x.transpose(0, 2, 1, 3))
            sizes = np.array(raw.strides)[[0, 2, 1, 3]]
            return RawArray(raw.pointer, raw.dtype, x.shape, tuple(int(size) for size in sizes), raw.on_device)

        return contiguous_kv(*both(tokens_first))
    if layout == "packed":
        packed = both(lambda x: memory.put(x.transpose(0, 2, 1, 3).reshape(batch * tokens, heads, head_dim)))
        return packed_kv(*packed, memory.put(np.arange(batch, dtype=np.int32) * tokens))
    per_row = -(-tokens // block)
    blocks = batch * per_row + 3
    order = np.random.default_rng(seed).permutation(blocks)[: batch * per_row].reshape(batch, per_row)
    pool = np.full((blocks, POOL_LAYERS, 2, heads, block, head_dim * key.itemsize), 0xFF, dtype=np.uint8)
    for kv, content in enumerate((key,) if value is None else (key, value)):
        raw = np.ascontiguousarray(content).view(np.uint8)
        for row in range(batch):
            for number in range(per_row):
                part = raw[row, :, number * block : (number + 1) * block]
                pool[order[row, number], 1, kv, :, : part.shape[1]] = part
    keys_at = (order * POOL_LAYERS * 2).astype(np.int32)
    table = np.stack([keys_at, keys_at + 1], axis=1)
    return paged_kv(memory.put(pool.view(key.dtype)), memory.put(table), layer=1)


@dataclass
class NativeOp:
    """One way to call the library: the types of the cache, its layout, the order of query."""

    library: NativeLibrary
    memory: Memory
    key_storage: str | None = None  # int8 or fp8: keys are quantized on the way in
    layout: str = "contiguous"
    block: int = 16
    chunks_alone: bool = False  # scores without the output of token scores: rows that are kept whole are skipped
    whole_query: bool = False  # hand over queries of all tokens, the last w of which count
    packed_rows: bool = False  # arrays with entries per row are packed

    def rows(
        self,
        lengths: NDArray[np.int32],
        padded: int,
        keep_per_10k: NDArray[np.int32] | None = None,
        budget_tokens: NDArray[np.int32] | None = None,
        window: NDArray[np.int32] | None = None,
        head_class: str = "all",
    ) -> BatchRows:
        """Return the rows on the device; packed ones lie back to back in TRAILING tokens more than they need."""
        ratios, budgets, windows = (
            None if values is None else self.memory.put(values) for values in (keep_per_10k, budget_tokens, window)
        )
        rows = BatchRows(self.memory.put(lengths), padded, ratios, budgets, windows=windows, head_class=head_class)
        if not self.packed_rows:
            return rows
        starts = np.cumsum([0, *lengths[:-1]]).astype(np.int32)
        return replace(rows, row_starts=self.memory.put(starts), num_tokens=int(lengths.sum()) + TRAILING)

    def empty(self, rows: BatchRows, width: int, dtype: str, heads: int | None = None) -> RawArray:
        """Return poisoned memory for an array [B, width] or [T]; with `heads` [B, heads, width] or [heads, T]."""
        own = () if heads is None else (heads,)
        shape = (rows.lengths.shape[0], *own, width) if rows.row_starts is None else (*own, rows.num_tokens)
        return self.memory.empty(shape, dtype)

    def padded(self, array: RawArray, rows: BatchRows, width: int, filler: float) -> NDArray[Any]:
        """Return what an array of `empty` holds with the axes of padded rows; `filler` behind a packed row's own L."""
        content = self.memory.get(array)
        if rows.row_starts is None:
            return content
        if content.ndim == 2:
            return np.stack([self._unpacked(of_head, rows, width, filler) for of_head in content], axis=1)
        return self._unpacked(content, rows, width, filler)

    def _unpacked(self, content: NDArray[Any], rows: BatchRows, width: int, filler: float) -> NDArray[Any]:
        lengths, starts = self.memory.get(rows.lengths), self.memory.get(rows.row_starts)
        table = np.full((len(lengths), width), filler, content.dtype)
        for row, (length, start) in enumerate(zip(lengths, starts, strict=True)):
            own = min(width, length)
            table[row, :own] = content[start : start + own]
        poison = np.full(TRAILING * content.itemsize, POISON, np.uint8)
        assert content[-TRAILING:].tobytes() == poison.tobytes(), "entries behind the last row were written"
        return table

    def score(
        self,
        query: NDArray[Any],
        key: NDArray[Any],
        rows: BatchRows,
        settings: ChunkKVSettings,
        chunks: Chunks | None = None,
        with_tokens: bool = True,
        wild_table: np.random.Generator | None = None,
        value: NDArray[Any] | None = None,
    ) -> tuple[RawArray, RawArray | None]:
        """Return chunk_scores [B, max_chunks] and token_scores [B, S], or both [T], as the library's memory.

        `wild_table` fills the block table of a paged cache with random numbers.
        """
        memory, heads = self.memory, key.shape[1] if settings.heads == "each" else None
        if self.key_storage:
            key = quantize(key, self.key_storage)
            value = None if value is None else quantize(value, self.key_storage)
        cache = make_cache(memory, key, self.layout, self.block, value=value)
        if wild_table is not None:
            table = cache.arrays[1]
            memory.write(table, wild_table.integers(-(2**31), 2**31 - 1, table.shape, np.int32))
        width = max(1, self.library.max_chunks(settings, rows.max_length))
        options: dict[str, Any] = {"chunk_scores": self.empty(rows, width, "float32", heads), "chunks": chunks}
        options["token_scores"] = self.empty(rows, rows.max_length, "float32", heads) if with_tokens else None
        options["key_scale"] = memory.put(np.float32([KEY_SCALE])) if self.key_storage else None
        options["value_scale"] = options["key_scale"]
        queries = memory.put(self._all_queries(query, rows) if self.whole_query else query)
        size = self.library.score_workspace(settings, rows, queries, cache, **options)
        workspace = memory.empty((size,), "uint8")
        self.library.score(settings, rows, queries, cache, workspace=workspace, **options)
        return options["chunk_scores"], options["token_scores"]

    def _all_queries(self, query: NDArray[Any], rows: BatchRows) -> NDArray[Any]:
        batch, heads, window, head_dim = query.shape
        lengths = np.clip(self.memory.get(rows.lengths), window, None)
        whole = np.full((batch, heads, max(rows.max_length, window), head_dim), np.nan, dtype=query.dtype)
        for row in range(batch):
            whole[row, :, lengths[row] - window : lengths[row]] = query[row]
        return whole

    def score_given(
        self, scores: NDArray[Any], rows: BatchRows, settings: ChunkKVSettings, chunks: Chunks | None
    ) -> tuple[RawArray, RawArray]:
        """Return chunk_scores and token_scores of scores from outside, [B, S] or [B, Hkv, S]."""
        heads = scores.shape[1] if scores.ndim == 3 else None
        given = self.memory.put(scores)
        if self.packed_rows:
            lengths = self.memory.get(rows.lengths)
            own = [scores[row, ..., :length] for row, length in enumerate(lengths)]
            trailing = np.full((*scores.shape[1:-1], TRAILING), np.nan, np.float32)
            given = self.memory.put(np.concatenate([*own, trailing], axis=-1))
        width = max(1, self.library.max_chunks(settings, rows.max_length))
        chunk_scores = self.empty(rows, width, "float32", heads)
        token_scores = self.empty(rows, rows.max_length, "float32", heads)
        self.library.score_given(
            settings, rows, given, chunk_scores=chunk_scores, token_scores=token_scores, chunks=chunks
        )
        return chunk_scores, token_scores

    def select(
        self,
        query: NDArray[Any] | None,
        key: NDArray[Any],
        lengths: NDArray[np.int32],
        settings: ChunkKVSettings,
        *,
        window: NDArray[np.int32] | None = None,
        value: NDArray[Any] | None = None,
        scores: NDArray[Any] | None = None,
        head_class: str = "all",
        keep_per_10k: NDArray[np.int32] | None = None,
        budget_tokens: NDArray[np.int32] | None = None,
        is_delimiter: NDArray[np.bool_] | None = None,
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
        """Return kept_indices, kept_lengths and token_scores as chunkkv.reference.select_batch does."""
        rows = self.rows(lengths, key.shape[2], keep_per_10k, budget_tokens, window, head_class)
        heads = key.shape[1] if settings.heads == "each" else None
        chunks = None if is_delimiter is None else self.chunks(is_delimiter, rows, settings)
        chunk_scores = token_scores = None
        if head_class == "local" and settings.local_policy == "recent":
            chunks = None
        elif settings.score == "given":
            assert scores is not None
            chunk_scores, token_scores = self.score_given(scores, rows, settings, chunks)
        else:
            assert query is not None
            chunk_scores, token_scores = self.score(query, key, rows, settings, chunks, value=value)
            if self.chunks_alone:
                chunk_scores, _ = self.score(query, key, rows, settings, chunks, with_tokens=False, value=value)
        wanted = [
            settings.class_lengths(
                int(length),
                None if keep_per_10k is None else int(keep_per_10k[row]),
                None if budget_tokens is None else int(budget_tokens[row]),
            )[head_class == "local"]
            for row, length in enumerate(lengths)
        ]
        # Per-row budgets lie on the device: the host sizes the list by what it knows, here the settings' own N.
        width = max([*wanted, self.library.kept_tokens(settings, key.shape[2], head_class)])
        kept = self.empty(rows, width, "int32", heads)
        counts = self.memory.empty((len(lengths),), "int32")
        self.library.select(settings, rows, chunk_scores, kept, counts, chunks=chunks)
        kept_lengths, indices = self.memory.get(counts), self.padded(kept, rows, width, -1)
        assert (indices[..., max(wanted) :] == -1).all()
        zeros = np.zeros((len(lengths), *(() if heads is None else (heads,)), rows.max_length), np.float32)
        given = zeros if token_scores is None else self.padded(token_scores, rows, rows.max_length, 0.0)
        return indices[..., : max(wanted)], kept_lengths, given

    def chunks(self, is_delimiter: NDArray[np.bool_], rows: BatchRows, settings: ChunkKVSettings) -> Chunks:
        """Return the chunks that the boundaries op finds."""
        batch = is_delimiter.shape[0]
        width = max(1, self.library.max_chunks(settings, rows.max_length))
        ids = is_delimiter.astype(np.int32)  # token 1 is the delimiter
        shape: tuple[int, ...] = (batch, width + 1)
        if rows.row_starts is not None:
            lengths = self.memory.get(rows.lengths)
            own = [ids[row, :length] for row, length in enumerate(lengths)]
            ids = np.concatenate([*own, np.ones(TRAILING, np.int32)])
            shape = (rows.num_tokens + batch,)
        chunks = Chunks(self.memory.empty(shape, "int32"), self.memory.empty((batch,), "int32"))
        bitmap = self.memory.put(np.array([0b10], dtype=np.uint32))
        self.library.boundaries(settings, rows, self.memory.put(ids), bitmap, 2, chunks)
        return chunks
