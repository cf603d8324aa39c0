"""The parameter structs of libchunkkv (plugins/include/chunkkv/params.h), field by field."""

from __future__ import annotations

import ctypes
from ctypes import c_int32 as i32
from ctypes import c_int64 as i64
from ctypes import c_void_p as pointer

from chunkkv.limits import KERNEL_CHOICES

ABI_VERSION = 3
DTYPE_CODES = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3, "float8_e4m3fn": 4}
# The code of a word is its place in the list that the kernels were compiled with.
WORD_CODES = {name: {word: code for code, word in enumerate(words)} for name, words in KERNEL_CHOICES.items()}
HEAD_CLASS_CODES = {"all": 0, "reading": 0, "local": 1}
ROPE_CODES = {"neox": 0, "gptj": 1}
OP_CODES = {"boundaries": 0, "score": 1, "select": 2, "compact": 3, "rope": 4, "prepare": 5}


class Settings(ctypes.Structure):
    """chunkkv_settings."""

    _fields_ = (
        ("window", i32),
        ("sinks", i32),
        ("chunk_size", i32),
        ("boundaries", i32),
        ("pooling", i32),
        ("score", i32),
        ("window_reduce", i32),
        ("head_reduce", i32),
        ("value_norm", i32),
        ("heads", i32),
        ("keep_per_10k", i32),
        ("budget_tokens", i32),
        ("min_tokens", i32),
        ("budget_split", i32),
        ("head_class", i32),
        ("local_policy", i32),
        ("all_heads", i32),
        ("all_reading_heads", i32),
        ("reading_share_per_10k", i32),
        ("reserved", i32),
    )


class Rows(ctypes.Structure):
    """chunkkv_rows."""

    _fields_ = (
        ("lengths", pointer),
        ("keep_per_10k", pointer),
        ("budget_tokens", pointer),
        ("row_starts", pointer),
        ("windows", pointer),
        ("num_tokens", i64),
        ("batch", i32),
        ("max_length", i32),
    )


class Layout(ctypes.Structure):
    """chunkkv_layout."""

    _fields_ = (
        ("block_offsets", pointer),
        ("row_starts", pointer),
        ("stride_row", i64),
        ("stride_head", i64),
        ("stride_token", i64),
        ("stride_block", i64),
        ("extent", i64),
        ("tokens_per_block", i32),
        ("max_blocks", i32),
    )


class Layer(ctypes.Structure):
    """chunkkv_layer."""

    _fields_ = (("key", pointer), ("value", pointer), ("key_out", pointer), ("value_out", pointer))


class BoundariesParams(ctypes.Structure):
    """chunkkv_boundaries_params."""

    _fields_ = (
        ("settings", Settings),
        ("rows", Rows),
        ("token_ids", pointer),
        ("delimiter_bitmap", pointer),
        ("vocab_size", i32),
        ("max_chunks", i32),
        ("chunk_starts", pointer),
        ("num_chunks", pointer),
    )


class ScoreParams(ctypes.Structure):
    """chunkkv_score_params."""

    _fields_ = (
        ("settings", Settings),
        ("rows", Rows),
        ("query_layout", Layout),
        ("key_layout", Layout),
        ("value_layout", Layout),
        ("query", pointer),
        ("key", pointer),
        ("value", pointer),
        ("key_scale", pointer),
        ("value_scale", pointer),
        ("given_scores", pointer),
        ("kv_head_numbers", pointer),
        ("chunk_starts", pointer),
        ("num_chunks", pointer),
        ("chunk_scores", pointer),
        ("token_scores", pointer),
        ("heads", i32),
        ("kv_heads", i32),
        ("all_kv_heads", i32),
        ("head_dim", i32),
        ("query_dtype", i32),
        ("key_dtype", i32),
        ("query_is_window", i32),
        ("max_chunks", i32),
    )


class SelectParams(ctypes.Structure):
    """chunkkv_select_params."""

    _fields_ = (
        ("settings", Settings),
        ("rows", Rows),
        ("chunk_scores", pointer),
        ("chunk_starts", pointer),
        ("num_chunks", pointer),
        ("kept_indices", pointer),
        ("kept_lengths", pointer),
        ("choices", i32),
        ("max_chunks", i32),
        ("max_kept", i32),
        ("reserved", i32),
    )


class CompactParams(ctypes.Structure):
    """chunkkv_compact_params."""

    _fields_ = (
        ("rows", Rows),
        ("layout", Layout),
        ("layout_out", Layout),
        ("kept_indices", pointer),
        ("kept_lengths", pointer),
        ("kv_head_numbers", pointer),
        ("layers", ctypes.POINTER(Layer)),
        ("num_layers", i32),
        ("max_kept", i32),
        ("kv_heads", i32),
        ("all_kv_heads", i32),
        ("choices", i32),
        ("row_bytes", i32),
    )


class RopeParams(ctypes.Structure):
    """chunkkv_rope_params."""

    _fields_ = (
        ("qkv", pointer),
        ("qkv_out", pointer),
        ("positions", pointer),
        ("cos_sin", pointer),
        ("num_tokens", i64),
        ("max_positions", i32),
        ("heads", i32),
        ("kv_heads", i32),
        ("head_dim", i32),
        ("rotary_dim", i32),
        ("style", i32),
        ("dtype", i32),
        ("reserved", i32),
    )


class PrepareParams(ctypes.Structure):
    """chunkkv_prepare_params."""

    _fields_ = (
        ("settings", Settings),
        ("sequence_lengths", pointer),
        ("context_lengths", pointer),
        ("token_ids", pointer),
        ("delimiter_bitmap", pointer),
        ("attention_lengths", pointer),
        ("kept_lengths", pointer),
        ("row_starts", pointer),
        ("positions", pointer),
        ("is_delimiter", pointer),
        ("num_tokens", i64),
        ("batch", i32),
        ("contexts", i32),
        ("max_length", i32),
        ("vocab_size", i32),
    )


PARAMS = (
    BoundariesParams,
    ScoreParams,
    SelectParams,
    CompactParams,
    RopeParams,
    PrepareParams,
)  # in the order of OP_CODES
