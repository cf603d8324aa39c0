"""libchunkkv from Python: the ops of the C ABI on torch, CuPy, NumPy or DLPack arrays and raw pointers.

Letters in shapes: B rows, Hq query heads, Hkv KV heads, D head size, L prompt tokens of a row, S padded length,
W observation window, N kept tokens of a row, T entries of a packed array, P positions of a table. Where heads is
"each", arrays of scores and kept indices have an axis of KV heads more: [B, Hkv, ...], packed [Hkv, T].
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from typing import Any

from chunkkv.cache_layout import ALL_HEADS
from chunkkv.errors import NativeArgumentError, NativeError
from chunkkv.native import score_arguments as scores
from chunkkv.native import structs as abi
from chunkkv.native.arguments import ArgumentReader, settings_struct, stream_pointer, token_shape
from chunkkv.native.arrays import ITEM_BYTES, Array, as_raw
from chunkkv.native.batch import BatchRows, Chunks
from chunkkv.native.kv import KVView
from chunkkv.native.loader import load_library
from chunkkv.settings import ChunkKVSettings

_BAD_ARGUMENT = (1, 2, 3)  # CHUNKKV_INVALID_ARGUMENT, CHUNKKV_UNSUPPORTED, CHUNKKV_WORKSPACE


class NativeLibrary:
    """A loaded libchunkkv; `device` is "cuda" or "emulated". Thread safe.

    Every op writes into arrays that the caller passes, enqueues its work on `stream` and returns at once; keep the
    arrays alive until the stream has finished. Nothing is allocated on the device, so calls can be captured in CUDA
    graphs. `stream` is a cudaStream_t as int, a torch stream or a CuPy stream. None is the current stream of torch or
    CuPy where arrays of theirs are passed, and else the default stream.
    Every op raises NativeArgumentError for an argument that it cannot use and NativeError where CUDA fails.

    Parameters
    ----------
    path : path, default None
        The library. None: what the environment variable CHUNKKV_LIB names, else the one that was built here.
        BackendUnavailableError is raised where there is none, or one of another version of the C ABI.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path, self._lib = load_library(path)
        self.device: str = self._lib.chunkkv_device().decode()
        self._read = ArgumentReader(self.path.name, on_device=self.device == "cuda")

    def params_size(self, op: str) -> int:
        """Return the bytes of an op's parameter struct, as the library was compiled."""
        return int(self._lib.chunkkv_params_size(abi.OP_CODES[op]))

    def why_unsupported(self, op: str, query_dtype: str, kv_dtype: str, head_dim: int, group: int = 1) -> str | None:
        """Return None where `op` has a kernel for these types, D and group = Hq/Hkv, else what is allowed."""
        codes = [abi.DTYPE_CODES.get(dtype, -1) for dtype in (query_dtype, kv_dtype)]
        status = self._lib.chunkkv_supports(abi.OP_CODES[op], *codes, head_dim, group)
        return self._lib.chunkkv_last_error().decode() if status else None

    def kept_tokens(self, settings: ChunkKVSettings, length: int, head_class: str = ALL_HEADS) -> int:
        """Return N(length), the tokens kept of a prompt of `length` tokens by every KV head, or by those of a class."""
        return self._count(self._lib.chunkkv_kept_tokens, settings, length, head_class)

    def max_chunks(self, settings: ChunkKVSettings, length: int) -> int:
        """Return the most chunks that a row of up to `length` tokens can have."""
        return self._count(self._lib.chunkkv_max_chunks, settings, length)

    def boundaries(
        self,
        settings: ChunkKVSettings,
        rows: BatchRows,
        token_ids: Array,
        delimiter_bitmap: Array | None,
        vocab_size: int,
        chunks: Chunks,
        *,
        stream: Any = None,
    ) -> None:
        """Write the delimiter chunks of every row into `chunks`.

        Parameters
        ----------
        token_ids : int32 [B, S] or [T]
            The prompts; or flags, where there is no bitmap: a token that is not 0 is a delimiter.
        delimiter_bitmap : uint32 [ceil(vocab_size / 32)] or None
            Bit id % 32 of word id // 32 is 1 for the token ids that are delimiters.
        vocab_size : int
            Token ids from here on are no delimiters; 0 without a bitmap.
        """
        params = abi.BoundariesParams(settings=settings_struct(settings, rows.head_class), rows=self._read.rows(rows))
        params.token_ids = self._read.array(token_ids, "token_ids", "int32", token_shape(params.rows)).pointer
        params.delimiter_bitmap = self._read.bitmap(delimiter_bitmap, vocab_size)
        params.vocab_size = vocab_size
        if rows.row_starts is not None:
            params.max_chunks = self.max_chunks(settings, rows.max_length)
        else:  # a padded table may be wider than it must be
            params.max_chunks = as_raw(chunks.chunk_starts).shape[-1] - 1
        params.chunk_starts, params.num_chunks = self._read.chunks(chunks, params.rows, params.max_chunks)
        self._call("boundaries", params, stream, (token_ids, chunks.chunk_starts))

    def score_workspace(
        self,
        settings: ChunkKVSettings,
        rows: BatchRows,
        query: Array,
        key: KVView,
        *,
        chunk_scores: Array,
        token_scores: Array | None = None,
        chunks: Chunks | None = None,
        query_row_starts: Array | None = None,
        kv_head_numbers: Array | None = None,
        **scales: Array | None,
    ) -> int:
        """Return the bytes of workspace that score() needs for the same arguments; `scales` are not read."""
        params = scores.attention_params(self._read, settings, rows, query, key, query_row_starts, kv_head_numbers)
        self._set_outputs(params, settings, rows, chunk_scores, token_scores, chunks)
        size = ctypes.c_size_t()
        self._check(self._lib.chunkkv_score_workspace(ctypes.byref(params), ctypes.byref(size)))
        return size.value

    def score(
        self,
        settings: ChunkKVSettings,
        rows: BatchRows,
        query: Array,
        key: KVView,
        *,
        workspace: Array,
        chunk_scores: Array,
        token_scores: Array | None = None,
        chunks: Chunks | None = None,
        key_scale: Array | None = None,
        value_scale: Array | None = None,
        query_row_starts: Array | None = None,
        kv_head_numbers: Array | None = None,
        stream: Any = None,
    ) -> None:
        """Write the mean score of every chunk into chunk_scores.

        Parameters
        ----------
        query : float32, float16 or bfloat16 [B, Hq, W, D], [B, Hq, S, D] or [T, Hq, D]
            Rotated queries of the window, of all tokens, or of all tokens packed (then with query_row_starts).
        key : KVView
            Rotated keys, of the queries' type, int8 or fp8; the V of the view is read where value_norm is "on".
        workspace : uint8 [score_workspace(...)]
            Scratch memory, aligned to 256 bytes.
        chunk_scores : float32 [B, max_chunks] or [T]
            Written: the mean score of each chunk.
        token_scores : float32 [B, S] or [T], default None
            Written if given: the score of each token.
        chunks : Chunks, default None
            The chunks of every row, with delimiter boundaries; None with fixed ones.
        key_scale, value_scale : float32 [1], default None
            What int8 and fp8 keys and values are multiplied by; None: 1.
        query_row_starts : int32 [B], default None
            The first token of each row in packed queries.
        kv_head_numbers : int32 [heads], default None
            The KV heads that are scored, and with them the query heads of their groups. None: all.
        """
        params = scores.attention_params(self._read, settings, rows, query, key, query_row_starts, kv_head_numbers)
        self._set_outputs(params, settings, rows, chunk_scores, token_scores, chunks)
        params.key_scale = self._read.optional(key_scale, "key_scale", "float32", (1,))
        params.value_scale = self._read.optional(value_scale, "value_scale", "float32", (1,))
        space = self._read.array(workspace, "workspace", "uint8", (None,))
        self._score(params, space.pointer, space.shape[0], stream, (query, chunk_scores, *key.arrays))

    def score_given(
        self,
        settings: ChunkKVSettings,
        rows: BatchRows,
        given_scores: Array,
        *,
        chunk_scores: Array,
        token_scores: Array | None = None,
        chunks: Chunks | None = None,
        stream: Any = None,
    ) -> None:
        """Write the means of scores from outside (score "given"), pooled, into chunk_scores.

        Parameters
        ----------
        given_scores : float32 [B, S] or [T]
            The score of each token before pooling; entries of the window and behind it are not read.
        chunk_scores, token_scores, chunks
            As in score().
        """
        params = scores.given_params(self._read, settings, rows, given_scores)
        self._set_outputs(params, settings, rows, chunk_scores, token_scores, chunks)
        self._score(params, None, 0, stream, (given_scores, chunk_scores))

    def select(
        self,
        settings: ChunkKVSettings,
        rows: BatchRows,
        chunk_scores: Array | None,
        kept_indices: Array,
        kept_lengths: Array,
        *,
        chunks: Chunks | None = None,
        stream: Any = None,
    ) -> None:
        """Choose the tokens to keep by the scores of their chunks.

        Parameters
        ----------
        chunk_scores : float32 [B, max_chunks] or [T], or None
            What score() has written. None for heads of the class "local" whose policy is "recent".
        kept_indices : int32 [B, max_kept] or [T]
            Written: the kept positions of each row, ascending, then -1.
        kept_lengths : int32 [B]
            Written: N of each row.
        chunks : Chunks, default None
            The chunks of every row, with delimiter boundaries; None with fixed ones.
        """
        given = None if chunk_scores is None else self._outputs(settings, rows, chunk_scores, None, chunks)
        params = scores.select_params(self._read, settings, rows, given, kept_indices, kept_lengths)
        self._call("select", params, stream, (chunk_scores, kept_indices))

    def compact(
        self,
        rows: BatchRows,
        kept_indices: Array,
        kept_lengths: Array | None,
        layers: Sequence[KVView],
        outputs: Sequence[KVView] | None = None,
        *,
        kv_head_numbers: Array | None = None,
        stream: Any = None,
    ) -> None:
        """Move the kept tokens of all `layers` to slots 0 to N-1, in one launch.

        Parameters
        ----------
        kept_indices : int32 [B, max_kept] or [T], or with an axis of KV heads [B, Hkv, max_kept] or [Hkv, T]
            The kept positions of each row, ascending, of all heads or of each.
        kept_lengths : int32 [B] or None
            N of each row. None, which needs outputs: every slot is written, and where the index of a slot is negative
            it holds the first token of its row.
        layers : sequence of KVView
            Caches of the same shape, strides and block table.
        outputs : sequence of KVView, default None
            Where the kept tokens of each layer go. None: to the first slots of the same cache.
        kv_head_numbers : int32 [heads], default None
            The KV heads that are moved; with outputs, those have as many heads. None: all.
        """
        if not layers or (outputs is not None and len(outputs) != len(layers)):
            raise NativeArgumentError(
                f"{len(layers)} layers and {len(outputs or ())} outputs; pass one output per layer, or None (in place)"
            )
        targets = list(outputs) if outputs is not None else list(layers)
        for caches in (layers, targets):
            if any(cache.geometry != caches[0].geometry for cache in caches):
                raise NativeArgumentError("layers of one call must share shape, strides and block table")
        numbers = None
        if kv_head_numbers is not None:
            numbers = self._read.array(kv_head_numbers, "kv_head_numbers", "int32", (None,))
        kv_heads = layers[0].kv_heads if numbers is None else numbers.shape[0]
        wanted = (kv_heads if outputs is not None else layers[0].kv_heads, *layers[0].geometry[-2:])
        if targets[0].geometry[-3:] != wanted:
            raise NativeArgumentError("layers and outputs differ in heads, head size or bytes of an element")
        params = abi.CompactParams(
            rows=self._read.rows(rows), layout=layers[0].layout, layout_out=targets[0].layout, num_layers=len(layers)
        )
        shared = len(as_raw(kept_indices).shape) == (2 if rows.row_starts is None else 1)
        params.kept_indices, params.max_kept = self._read.per_row(
            kept_indices, "kept_indices", "int32", params.rows, rows.max_length, None if shared else kv_heads
        )
        params.kept_lengths = self._read.optional(kept_lengths, "kept_lengths", "int32", (params.rows.batch,))
        params.layers = self._read.layers(layers, targets, in_place=outputs is None)
        params.kv_heads, params.row_bytes = kv_heads, layers[0].head_dim * ITEM_BYTES[layers[0].dtype]
        params.choices, params.all_kv_heads = 1 if shared else kv_heads, layers[0].kv_heads
        params.kv_head_numbers = None if numbers is None else numbers.pointer
        self._call("compact", params, stream, (kept_indices, *layers[0].arrays))

    def rope(
        self,
        qkv: Array,
        qkv_out: Array,
        positions: Array,
        cos_sin: Array,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        style: str = "neox",
        stream: Any = None,
    ) -> None:
        """Rotate the Q and K of packed QKV by the positions of its tokens.

        Parameters
        ----------
        qkv, qkv_out : float32, float16 or bfloat16 [T, (Hq + 2 Hkv) D]
            Read and written; may be the same array.
        positions : int32 [T]
            Logical position of each token.
        cos_sin : float32 [P, rotary_dim / 2, 2]
            Cosine and sine of every position, as in TensorRT-LLM's table.
        heads, kv_heads, head_dim : int
            Hq, Hkv and D.
        style : {"neox", "gptj"}, default "neox"
            Which elements form a pair: i and i + rotary_dim / 2, or 2i and 2i + 1.
        """
        source = self._read.array(qkv, "qkv", None, (None, (heads + 2 * kv_heads) * head_dim))
        table = self._read.array(cos_sin, "cos_sin", "float32", (None, None, 2))
        if style not in abi.ROPE_CODES:
            raise NativeArgumentError(f"style is {style!r}; allowed are {', '.join(abi.ROPE_CODES)}")
        params = abi.RopeParams(heads=heads, kv_heads=kv_heads, head_dim=head_dim, style=abi.ROPE_CODES[style])
        params.qkv, params.num_tokens = source.pointer, source.shape[0]
        params.dtype = abi.DTYPE_CODES.get(source.dtype, -1)
        params.qkv_out = self._read.array(qkv_out, "qkv_out", source.dtype, source.shape).pointer
        params.positions = self._read.array(positions, "positions", "int32", (source.shape[0],)).pointer
        params.cos_sin, params.max_positions, params.rotary_dim = table.pointer, table.shape[0], 2 * table.shape[1]
        self._call("rope", params, stream, (qkv, qkv_out))

    def prepare(
        self,
        settings: ChunkKVSettings,
        sequence_lengths: Array,
        context_lengths: Array,
        *,
        contexts: int,
        max_length: int,
        attention_lengths: Array,
        kept_lengths: Array,
        row_starts: Array,
        positions: Array,
        token_ids: Array | None = None,
        delimiter_bitmap: Array | None = None,
        vocab_size: int = 0,
        is_delimiter: Array | None = None,
        stream: Any = None,
    ) -> None:
        """Write what all layers need to know of a packed batch: `contexts` whole prompts, then rows of one token.

        Parameters
        ----------
        sequence_lengths : int32 [B]
            Tokens that each row has seen, those of this batch included.
        context_lengths : int32 [B]
            Prompt tokens of each row, at most max_length.
        attention_lengths, kept_lengths, row_starts : int32 [B]
            Written: cache slots that attention reads, N, and the first token of each row in the batch.
        positions : int32 [T]
            Written: the logical position of each token.
        token_ids, delimiter_bitmap, vocab_size : default None, None and 0
            As in boundaries(), for delimiter boundaries; token_ids is int32 [T].
        is_delimiter : int32 [T], default None
            Written with delimiter boundaries: 1 for delimiters, else 0.
        """
        read = self._read
        params = abi.PrepareParams(settings=settings_struct(settings), contexts=contexts, max_length=max_length)
        sequences = read.array(sequence_lengths, "sequence_lengths", "int32", (None,))
        tokens = read.array(positions, "positions", "int32", (None,))
        params.sequence_lengths, params.batch = sequences.pointer, sequences.shape[0]
        params.positions, params.num_tokens, params.vocab_size = tokens.pointer, tokens.shape[0], vocab_size
        params.context_lengths = read.array(context_lengths, "context_lengths", "int32", sequences.shape).pointer
        params.attention_lengths = read.array(attention_lengths, "attention_lengths", "int32", sequences.shape).pointer
        params.kept_lengths = read.array(kept_lengths, "kept_lengths", "int32", sequences.shape).pointer
        params.row_starts = read.array(row_starts, "row_starts", "int32", sequences.shape).pointer
        params.token_ids = read.optional(token_ids, "token_ids", "int32", tokens.shape)
        params.is_delimiter = read.optional(is_delimiter, "is_delimiter", "int32", tokens.shape)
        params.delimiter_bitmap = read.bitmap(delimiter_bitmap, vocab_size)
        self._call("prepare", params, stream, (sequence_lengths, positions))

    def _outputs(
        self,
        settings: ChunkKVSettings,
        rows: BatchRows,
        chunk_scores: Array,
        token_scores: Array | None,
        chunks: Chunks | None,
    ) -> scores.ScoreOutputs:
        return scores.ScoreOutputs(chunk_scores, token_scores, chunks, self.max_chunks(settings, rows.max_length))

    def _set_outputs(self, params: abi.ScoreParams, settings: ChunkKVSettings, rows: BatchRows, *outputs: Any) -> None:
        scores.set_outputs(self._read, params, settings, self._outputs(settings, rows, *outputs))

    def _score(
        self, params: abi.ScoreParams, workspace: int | None, size: int, stream: Any, arrays: tuple[Any, ...]
    ) -> None:
        address, length = ctypes.c_void_p(workspace), ctypes.c_size_t(size)
        self._check(self._lib.chunkkv_score(ctypes.byref(params), address, length, stream_pointer(stream, arrays)))

    def _count(
        self, function: Callable[..., int], settings: ChunkKVSettings, length: int, head_class: str = ALL_HEADS
    ) -> int:
        count = function(ctypes.byref(settings_struct(settings, head_class)), ctypes.c_int64(length))
        if count < 0:
            raise NativeArgumentError(self._lib.chunkkv_last_error().decode())
        return int(count)

    def _call(self, op: str, params: ctypes.Structure, stream: Any, arrays: tuple[Any, ...]) -> None:
        self._check(getattr(self._lib, f"chunkkv_{op}")(ctypes.byref(params), stream_pointer(stream, arrays)))

    def _check(self, status: int) -> None:
        if status:
            kind = NativeArgumentError if status in _BAD_ARGUMENT else NativeError
            raise kind(self._lib.chunkkv_last_error().decode())
