"""libchunkkv from Python: the ops of the C ABI on torch, CuPy, NumPy or DLPack arrays and raw pointers.

Letters as in docs/method.md. Every op writes into arrays that the caller passes, enqueues on `stream` and returns at
once: keep the arrays alive until the stream is done. Nothing is allocated on the device, so calls can be captured in
CUDA graphs. Every op raises NativeArgumentError for an argument it cannot use and NativeError where CUDA refuses.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from chunkkv.errors import NativeArgumentError, NativeError
from chunkkv.native import structs as abi
from chunkkv.native.arrays import ITEM_BYTES, RawArray, as_raw, expect
from chunkkv.native.kv import KVCache, contiguous_kv, packed_kv, paged_kv, strided_layout
from chunkkv.native.loader import load_library
from chunkkv.settings import ChunkKVSettings

__all__ = ["Chunks", "KVCache", "NativeLibrary", "RawArray", "Rows", "contiguous_kv", "packed_kv", "paged_kv"]

_BAD_ARGUMENT = (1, 2, 3)  # CHUNKKV_INVALID_ARGUMENT, CHUNKKV_UNSUPPORTED, CHUNKKV_WORKSPACE


@dataclass(frozen=True)
class Rows:
    """The rows of a batch: lengths int32 [B], the padded length S, and optional int32 [B] ratios and budgets.

    With row_starts int32 [B], arrays that have entries per row are packed: [T], T = num_tokens, where they are else
    [B, S], [B, max_chunks] or [B, max_kept], and [T + B] where they are else [B, max_chunks + 1].
    """

    lengths: Any
    max_length: int
    keep_per_10k: Any = None
    budget_tokens: Any = None
    row_starts: Any = None
    num_tokens: int = 0


@dataclass(frozen=True)
class Chunks:
    """Delimiter chunks of a batch: chunk_starts int32 [B, max_chunks + 1] or [T + B], and num_chunks int32 [B]."""

    chunk_starts: Any
    num_chunks: Any


class NativeLibrary:
    """A loaded libchunkkv; `device` is "cuda" or "emulated". Thread safe."""

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        """Load `path`, else what CHUNKKV_LIB names, else the built library; raises BackendUnavailableError."""
        self.path, self._lib = load_library(path)
        self.device: str = self._lib.chunkkv_device().decode()

    def params_size(self, op: str) -> int:
        """Return the bytes of an op's parameter struct, as the library was compiled."""
        return int(self._lib.chunkkv_params_size(abi.OP_CODES[op]))

    def why_unsupported(self, op: str, query_dtype: str, kv_dtype: str, head_dim: int, group: int = 1) -> str | None:
        """Return None where `op` has a kernel for these types, D and Hq/Hkv, else what is allowed."""
        codes = [abi.DTYPE_CODES.get(dtype, -1) for dtype in (query_dtype, kv_dtype)]
        status = self._lib.chunkkv_supports(abi.OP_CODES[op], *codes, head_dim, group)
        return self._lib.chunkkv_last_error().decode() if status else None

    def kept_tokens(self, settings: ChunkKVSettings, length: int) -> int:
        """Return N(length)."""
        return self._count(self._lib.chunkkv_kept_tokens, settings, length)

    def max_chunks(self, settings: ChunkKVSettings, length: int) -> int:
        """Return the most chunks that a row of up to `length` tokens can have."""
        return self._count(self._lib.chunkkv_max_chunks, settings, length)

    def boundaries(
        self,
        settings: ChunkKVSettings,
        rows: Rows,
        token_ids: Any,
        delimiter_bitmap: Any,
        vocab_size: int,
        chunks: Chunks,
        *,
        stream: Any = 0,
    ) -> None:
        """Write the delimiter chunks of token_ids int32 [B, S] or [T] into `chunks`.

        delimiter_bitmap uint32 [ceil(vocab_size / 32)]: bit id % 32 of word id // 32 marks a delimiter;
        None with vocab_size 0: token_ids are flags, and what is not 0 is a delimiter.
        """
        p = abi.BoundariesParams(settings=_settings(settings), rows=self._rows(rows), vocab_size=vocab_size)
        p.token_ids = self._array(token_ids, "token_ids", "int32", _per_token(p.rows)).pointer
        words = (vocab_size + 31) // 32
        p.delimiter_bitmap = self._optional(delimiter_bitmap, "delimiter_bitmap", "uint32", (words,))
        widest = self.max_chunks(settings, rows.max_length)
        # A padded table may be wider than it must be.
        p.max_chunks = widest if rows.row_starts is not None else as_raw(chunks.chunk_starts).shape[-1] - 1
        p.chunk_starts, p.num_chunks = self._chunks(chunks, p.rows, p.max_chunks)
        self._call("boundaries", p, _stream(stream))

    def score_workspace(self, settings: ChunkKVSettings, rows: Rows, query: Any, key: KVCache, **options: Any) -> int:
        """Return the bytes of workspace that score() needs for the same arguments."""
        p = self._score_params(settings, rows, query, key, **options)
        size = ctypes.c_size_t()
        self._check(self._lib.chunkkv_score_workspace(ctypes.byref(p), ctypes.byref(size)))
        return size.value

    def score(
        self,
        settings: ChunkKVSettings,
        rows: Rows,
        query: Any,
        key: KVCache,
        *,
        workspace: Any,
        stream: Any = 0,
        **options: Any,
    ) -> None:
        """Write the mean score of every chunk: query [B, Hq, w, D], rotated, or [B, Hq, S, D] or packed [T, Hq, D].

        Options: chunk_scores float32 [B, max_chunks] or [T] (required), token_scores float32 [B, S] or [T], chunks
        (delimiter boundaries), key_scale float32 [1] (int8 and fp8 keys), query_row_starts int32 [B] (packed queries).
        workspace: uint8 [score_workspace(...)], aligned to 256 bytes.
        """
        p = self._score_params(settings, rows, query, key, **options)
        space = self._array(workspace, "workspace", "uint8", (None,))
        call = self._lib.chunkkv_score
        arguments = (ctypes.c_void_p(space.pointer), ctypes.c_size_t(space.shape[0]), _stream(stream))
        self._check(call(ctypes.byref(p), *arguments))

    def select(
        self,
        settings: ChunkKVSettings,
        rows: Rows,
        chunk_scores: Any,
        kept_indices: Any,
        kept_lengths: Any,
        *,
        chunks: Chunks | None = None,
        stream: Any = 0,
    ) -> None:
        """Write the kept positions int32 [B, max_kept] or [T] (ascending, -1 behind N) and N int32 [B] of every row."""
        p = abi.SelectParams(settings=_settings(settings), rows=self._rows(rows))
        widest = self.max_chunks(settings, rows.max_length)
        p.chunk_scores, p.max_chunks = self._per_row(chunk_scores, "chunk_scores", "float32", p.rows, widest)
        p.kept_indices, p.max_kept = self._per_row(kept_indices, "kept_indices", "int32", p.rows, rows.max_length)
        p.kept_lengths = self._array(kept_lengths, "kept_lengths", "int32", (p.rows.batch,)).pointer
        if chunks is not None:
            p.chunk_starts, p.num_chunks = self._chunks(chunks, p.rows, p.max_chunks)
        self._call("select", p, _stream(stream))

    def compact(
        self,
        rows: Rows,
        kept_indices: Any,
        kept_lengths: Any,
        layers: Sequence[KVCache],
        outputs: Sequence[KVCache] | None = None,
        *,
        stream: Any = 0,
    ) -> None:
        """Move the kept rows of all `layers` to slots 0..N-1 in one launch: in place, or into `outputs`.

        kept_indices int32 [B, max_kept] or [T], ascending; kept_lengths int32 [B].
        kept_lengths None, with outputs: every slot is written, negative indices repeat the row's first token.
        """
        if not layers or (outputs is not None and len(outputs) != len(layers)):
            raise NativeArgumentError(
                f"{len(layers)} layers and {len(outputs or ())} outputs; pass one output per layer, or None (in place)"
            )
        targets = list(outputs) if outputs is not None else list(layers)
        for caches in (layers, targets):
            if any(cache.geometry != caches[0].geometry for cache in caches):
                raise NativeArgumentError("layers of one call must share shape, strides and block table")
        if targets[0].geometry[-3:] != layers[0].geometry[-3:]:
            raise NativeArgumentError("layers and outputs differ in heads, head size or bytes of an element")
        p = abi.CompactParams(rows=self._rows(rows), layout=layers[0].layout, layout_out=targets[0].layout)
        p.kept_indices, p.max_kept = self._per_row(kept_indices, "kept_indices", "int32", p.rows, rows.max_length)
        p.kept_lengths = self._optional(kept_lengths, "kept_lengths", "int32", (p.rows.batch,))
        entries = (abi.Layer * len(layers))()
        for entry, cache, target in zip(entries, layers, targets, strict=True):
            self._check_place(cache.on_device, "layers")
            self._check_place(target.on_device, "outputs")
            entry.key, entry.value = cache.key, cache.value
            if outputs is not None:
                entry.key_out, entry.value_out = target.key, target.value
        p.layers, p.num_layers = entries, len(layers)
        p.kv_heads, p.row_bytes = layers[0].kv_heads, layers[0].head_dim * ITEM_BYTES[layers[0].dtype]
        self._call("compact", p, _stream(stream))

    def rope(
        self,
        qkv: Any,
        qkv_out: Any,
        positions: Any,
        cos_sin: Any,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        style: str = "neox",
        stream: Any = 0,
    ) -> None:
        """Rotate Q and K of qkv [T, (Hq + 2 Hkv) D] into qkv_out (may be qkv) by positions int32 [T].

        cos_sin float32 [P, rotary_dim / 2, 2] (TensorRT-LLM's table); style "neox" or "gptj".
        """
        source = self._array(qkv, "qkv", None, (None, (heads + 2 * kv_heads) * head_dim))
        table = self._array(cos_sin, "cos_sin", "float32", (None, None, 2))
        if style not in abi.ROPE_CODES:
            raise NativeArgumentError(f"style is {style!r}; allowed are {', '.join(abi.ROPE_CODES)}")
        p = abi.RopeParams(heads=heads, kv_heads=kv_heads, head_dim=head_dim, style=abi.ROPE_CODES[style])
        p.qkv, p.num_tokens, p.dtype = source.pointer, source.shape[0], abi.DTYPE_CODES.get(source.dtype, -1)
        p.qkv_out = self._array(qkv_out, "qkv_out", source.dtype, source.shape).pointer
        p.positions = self._array(positions, "positions", "int32", (source.shape[0],)).pointer
        p.cos_sin, p.max_positions, p.rotary_dim = table.pointer, table.shape[0], 2 * table.shape[1]
        self._call("rope", p, _stream(stream))

    def prepare(
        self,
        settings: ChunkKVSettings,
        sequence_lengths: Any,
        context_lengths: Any,
        *,
        contexts: int,
        max_length: int,
        attention_lengths: Any,
        kept_lengths: Any,
        row_starts: Any,
        positions: Any,
        token_ids: Any = None,
        delimiter_bitmap: Any = None,
        vocab_size: int = 0,
        is_delimiter: Any = None,
        stream: Any = 0,
    ) -> None:
        """Write what a packed batch of `contexts` prompts, then rows of one generated token needs to know of itself.

        In, int32 [B]: sequence_lengths (logical, this batch's tokens included), context_lengths (L, at most
        max_length). Out: attention_lengths, kept_lengths, row_starts int32 [B] and positions int32 [T].
        With token_ids int32 [T] and delimiter_bitmap uint32 [ceil(vocab_size / 32)]: is_delimiter int32 [T], 0 or 1.
        """
        p = abi.PrepareParams(settings=_settings(settings), contexts=contexts, max_length=max_length)
        sequences = self._array(sequence_lengths, "sequence_lengths", "int32", (None,))
        places = self._array(positions, "positions", "int32", (None,))
        p.sequence_lengths, p.batch = sequences.pointer, sequences.shape[0]
        p.positions, p.num_tokens, p.vocab_size = places.pointer, places.shape[0], vocab_size
        p.context_lengths = self._array(context_lengths, "context_lengths", "int32", sequences.shape).pointer
        p.attention_lengths = self._array(attention_lengths, "attention_lengths", "int32", sequences.shape).pointer
        p.kept_lengths = self._array(kept_lengths, "kept_lengths", "int32", sequences.shape).pointer
        p.row_starts = self._array(row_starts, "row_starts", "int32", sequences.shape).pointer
        p.token_ids = self._optional(token_ids, "token_ids", "int32", places.shape)
        p.is_delimiter = self._optional(is_delimiter, "is_delimiter", "int32", places.shape)
        words = ((vocab_size + 31) // 32,)
        p.delimiter_bitmap = self._optional(delimiter_bitmap, "delimiter_bitmap", "uint32", words)
        self._call("prepare", p, _stream(stream))

    def _score_params(
        self,
        settings: ChunkKVSettings,
        rows: Rows,
        query: Any,
        key: KVCache,
        *,
        chunk_scores: Any,
        token_scores: Any = None,
        chunks: Chunks | None = None,
        key_scale: Any = None,
        query_row_starts: Any = None,
    ) -> abi.ScoreParams:
        p = abi.ScoreParams(settings=_settings(settings), rows=self._rows(rows), key_layout=key.layout, key=key.key)
        batch = p.rows.batch
        self._check_place(key.on_device, "key")
        queries = as_raw(query)
        self._check_place(queries.on_device, "query")
        if len(queries.shape) != (4 if query_row_starts is None else 3) or queries.shape[-1] != key.head_dim:
            raise NativeArgumentError(
                f"query has shape {queries.shape}, keys have head size {key.head_dim}; pass [B, Hq, w, D], "
                "[B, Hq, S, D], or [T, Hq, D] together with query_row_starts"
            )
        if query_row_starts is None:
            p.query_layout = strided_layout(queries, row=0, head=1, token=2, extent=queries.shape[2])
            p.query_is_window = int(queries.shape[2] == settings.window)
        else:
            p.query_layout = strided_layout(queries, row=None, head=1, token=0, extent=queries.shape[0])
            p.query_layout.row_starts = self._array(query_row_starts, "query_row_starts", "int32", (batch,)).pointer
        p.query, p.heads, p.kv_heads, p.head_dim = queries.pointer, queries.shape[1], key.kv_heads, key.head_dim
        p.query_dtype = abi.DTYPE_CODES.get(queries.dtype, -1)
        p.key_dtype = abi.DTYPE_CODES.get(key.dtype, -1)
        widest = self.max_chunks(settings, rows.max_length)
        p.chunk_scores, p.max_chunks = self._per_row(chunk_scores, "chunk_scores", "float32", p.rows, widest)
        p.token_scores = self._optional(token_scores, "token_scores", "float32", _per_token(p.rows))
        p.key_scale = self._optional(key_scale, "key_scale", "float32", (1,))
        if chunks is not None:
            p.chunk_starts, p.num_chunks = self._chunks(chunks, p.rows, p.max_chunks)
        return p

    def _rows(self, rows: Rows) -> abi.Rows:
        lengths = self._array(rows.lengths, "lengths", "int32", (None,))
        batch = lengths.shape[0]
        return abi.Rows(
            lengths=lengths.pointer,
            keep_per_10k=self._optional(rows.keep_per_10k, "keep_per_10k", "int32", (batch,)),
            budget_tokens=self._optional(rows.budget_tokens, "budget_tokens", "int32", (batch,)),
            row_starts=self._optional(rows.row_starts, "row_starts", "int32", (batch,)),
            num_tokens=rows.num_tokens,
            batch=batch,
            max_length=rows.max_length,
        )

    def _per_row(self, array: Any, name: str, dtype: str, rows: abi.Rows, packed_width: int) -> tuple[int, int]:
        """Return the address of an array [B, width] or [T], and the most entries that a row may use of it."""
        if rows.row_starts is not None:
            return self._array(array, name, dtype, (rows.num_tokens,)).pointer, packed_width
        raw = self._array(array, name, dtype, (rows.batch, None))
        return raw.pointer, raw.shape[1]

    def _chunks(self, chunks: Chunks, rows: abi.Rows, max_chunks: int) -> tuple[int, int]:
        """Return the two addresses."""
        padded = rows.row_starts is None
        shape = (rows.batch, max_chunks + 1) if padded else (rows.num_tokens + rows.batch,)
        starts = self._array(chunks.chunk_starts, "chunk_starts", "int32", shape)
        return starts.pointer, self._array(chunks.num_chunks, "num_chunks", "int32", (rows.batch,)).pointer

    def _array(self, array: Any, name: str, dtype: str | None, shape: tuple[int | None, ...]) -> RawArray:
        raw = expect(array, name, dtype, shape)
        self._check_place(raw.on_device, name)
        return raw

    def _optional(self, array: Any, name: str, dtype: str, shape: tuple[int | None, ...]) -> int | None:
        return None if array is None else self._array(array, name, dtype, shape).pointer

    def _check_place(self, on_device: bool | None, name: str) -> None:
        if on_device is not None and on_device != (self.device == "cuda"):
            place, wanted = ("device", "host") if on_device else ("host", "device")
            raise NativeArgumentError(f"{name} is in {place} memory; {self.path.name} works on {wanted} memory")

    def _count(self, function: Any, settings: ChunkKVSettings, length: int) -> int:
        count = function(ctypes.byref(_settings(settings)), ctypes.c_int64(length))
        if count < 0:
            raise NativeArgumentError(self._lib.chunkkv_last_error().decode())
        return int(count)

    def _call(self, op: str, params: ctypes.Structure, stream: ctypes.c_void_p) -> None:
        self._check(getattr(self._lib, f"chunkkv_{op}")(ctypes.byref(params), stream))

    def _check(self, status: int) -> None:
        if status:
            kind = NativeArgumentError if status in _BAD_ARGUMENT else NativeError
            raise kind(self._lib.chunkkv_last_error().decode())


def _settings(settings: ChunkKVSettings) -> abi.Settings:
    if settings.gate != "none":
        raise NativeArgumentError(f"gate is {settings.gate!r}, which the native library does not have; give 'none'")
    return abi.Settings(
        window=settings.window,
        sinks=settings.sinks,
        chunk_size=settings.chunk_size,
        boundaries=abi.BOUNDARIES_CODES[settings.boundaries],
        pooling=settings.pooling,
        score=abi.SCORE_CODES[settings.score],
        keep_per_10k=settings.keep_per_10k,
        budget_tokens=settings.budget_tokens,
        min_tokens=settings.min_tokens,
    )


def _per_token(rows: abi.Rows) -> tuple[int, ...]:
    """Return the shape of an array with one entry per token."""
    return (rows.batch, rows.max_length) if rows.row_starts is None else (rows.num_tokens,)


def _stream(stream: Any) -> ctypes.c_void_p:
    """Return a cudaStream_t from an integer, a torch stream or a CuPy stream; 0 is the default stream."""
    return ctypes.c_void_p(getattr(stream, "cuda_stream", getattr(stream, "ptr", stream)))
