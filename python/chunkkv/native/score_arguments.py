"""The parameters of score and select: what users pass, turned into their structs."""

from __future__ import annotations

from dataclasses import dataclass

from chunkkv.errors import NativeArgumentError
from chunkkv.native import structs as abi
from chunkkv.native.arguments import ArgumentReader, choices_of, settings_struct, token_shape
from chunkkv.native.arrays import Array, as_raw
from chunkkv.native.batch import BatchRows, Chunks
from chunkkv.native.kv import KVView, strided_layout
from chunkkv.settings import ChunkKVSettings


@dataclass(frozen=True)
class ScoreOutputs:
    """What score writes, and the table of chunks that it reads; as in NativeLibrary.score."""

    chunk_scores: Array
    token_scores: Array | None
    chunks: Chunks | None
    max_chunks: int  # of a row of max_length tokens


def attention_params(
    read: ArgumentReader,
    settings: ChunkKVSettings,
    rows: BatchRows,
    query: Array,
    key: KVView,
    query_row_starts: Array | None,
    kv_head_numbers: Array | None,
) -> abi.ScoreParams:
    """Return the parameters that say what is scored by attention: queries, keys and values."""
    params = abi.ScoreParams(settings=settings_struct(settings, rows.head_class), rows=read.rows(rows))
    read.check_memory(key.on_device, "key")
    queries = as_raw(query)
    read.check_memory(queries.on_device, "query")
    if len(queries.shape) != (4 if query_row_starts is None else 3) or queries.shape[-1] != key.head_dim:
        raise NativeArgumentError(
            f"query has shape {queries.shape}, keys have head size {key.head_dim}; pass [B, Hq, W, D], "
            "[B, Hq, S, D], or [T, Hq, D] together with query_row_starts"
        )
    if query_row_starts is None:
        params.query_layout = strided_layout(queries, row=0, head=1, token=2, extent=queries.shape[2])
        params.query_is_window = int(queries.shape[2] == settings.window)
    else:
        starts = read.array(query_row_starts, "query_row_starts", "int32", (params.rows.batch,))
        params.query_layout = strided_layout(queries, row=None, head=1, token=0, extent=queries.shape[0])
        params.query_layout.row_starts = starts.pointer
    params.query, params.heads, params.head_dim = queries.pointer, queries.shape[1], key.head_dim
    params.query_dtype = abi.DTYPE_CODES.get(queries.dtype, -1)
    params.key, params.key_layout, params.kv_heads = key.key, key.layout, key.kv_heads
    params.key_dtype = abi.DTYPE_CODES.get(key.dtype, -1)
    if settings.value_norm == "on":
        params.value, params.value_layout = key.value, key.layout
    if kv_head_numbers is not None:
        numbers = read.array(kv_head_numbers, "kv_head_numbers", "int32", (None,))
        params.kv_head_numbers, params.all_kv_heads = numbers.pointer, key.kv_heads
        params.heads = params.heads // key.kv_heads * numbers.shape[0]
        params.kv_heads = numbers.shape[0]
    return params


def given_params(
    read: ArgumentReader, settings: ChunkKVSettings, rows: BatchRows, given_scores: Array
) -> abi.ScoreParams:
    """Return the parameters for scores from outside."""
    params = abi.ScoreParams(settings=settings_struct(settings, rows.head_class), rows=read.rows(rows))
    params.heads = params.kv_heads = _heads_of(given_scores, settings, rows)
    choices = choices_of(settings, params.kv_heads)
    shape = token_shape(params.rows, choices)
    params.given_scores = read.array(given_scores, "given_scores", "float32", shape).pointer
    return params


def set_outputs(
    read: ArgumentReader, params: abi.ScoreParams, settings: ChunkKVSettings, outputs: ScoreOutputs
) -> None:
    """Fill in what score writes."""
    choices = choices_of(settings, params.kv_heads)
    params.chunk_scores, params.max_chunks = read.per_row(
        outputs.chunk_scores, "chunk_scores", "float32", params.rows, outputs.max_chunks, choices
    )
    shape = token_shape(params.rows, choices)
    params.token_scores = read.optional(outputs.token_scores, "token_scores", "float32", shape)
    if outputs.chunks is not None:
        params.chunk_starts, params.num_chunks = read.chunks(outputs.chunks, params.rows, params.max_chunks)


def select_params(
    read: ArgumentReader,
    settings: ChunkKVSettings,
    rows: BatchRows,
    scores: ScoreOutputs | None,
    kept_indices: Array,
    kept_lengths: Array,
) -> abi.SelectParams:
    """Return the parameters of select; `scores` is None where no score decides."""
    params = abi.SelectParams(settings=settings_struct(settings, rows.head_class), rows=read.rows(rows))
    params.choices = _heads_of(kept_indices, settings, rows)
    choices = choices_of(settings, params.choices)
    if scores is not None:
        params.chunk_scores, params.max_chunks = read.per_row(
            scores.chunk_scores, "chunk_scores", "float32", params.rows, scores.max_chunks, choices
        )
        if scores.chunks is not None:
            params.chunk_starts, params.num_chunks = read.chunks(scores.chunks, params.rows, params.max_chunks)
    params.kept_indices, params.max_kept = read.per_row(
        kept_indices, "kept_indices", "int32", params.rows, rows.max_length, choices
    )
    params.kept_lengths = read.array(kept_lengths, "kept_lengths", "int32", (params.rows.batch,)).pointer
    return params


def _heads_of(array: Array, settings: ChunkKVSettings, rows: BatchRows) -> int:
    """Return the axis of KV heads of an array with one entry per choice, 1 where heads share one."""
    if settings.heads == "shared":
        return 1
    shape, axis = as_raw(array).shape, 1 if rows.row_starts is None else 0
    if len(shape) != axis + 2:
        raise NativeArgumentError(
            f"an array of shape {shape} has no axis of KV heads, but heads is 'each'; pass [B, Hkv, ...], or [Hkv, T] "
            "for packed rows"
        )
    return shape[axis]
