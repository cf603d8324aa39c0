"""One node of each plugin, as a network has it: fields, inputs and outputs with their types and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

HEADS, KV_HEADS, HEAD_SIZE, WINDOW = 4, 2, 64, 4
QKV_WIDTH = (HEADS + 2 * KV_HEADS) * HEAD_SIZE
POSITIONS, VOCABULARY, LAYERS = 70, 100, 4
# Sizes of the dimensions that are free in a network, at the corners of its profile. B, R rows; S, T, U tokens;
# P pools; M blocks of a row; K slots. R and U are others than B and T wherever it shows.
SIZES = {
    "B": (3, 4, 8),
    "R": (2, 5, 9),
    "S": (5, 40, 64),
    "T": (10, 128, 512),
    "U": (11, 129, 513),
    "P": (1, 1, 2),
    "M": (1, 8, 64),
    "K": (7, 24, 32),
}
_SELECT_SETTINGS = {
    "window": WINDOW,
    "chunk_size": 3,
    "sinks": 2,
    "boundaries": "fixed",
    "pooling": 5,
    "score": "softmax",
    "min_tokens": 9,
}
_PACKED_SETTINGS = {**_SELECT_SETTINGS, "keep_per_10k": 4000, "budget_tokens": 0, "max_length": 64}
_HEADS = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_size": HEAD_SIZE}


class Tensor(NamedTuple):
    """A tensor of a network; a dimension is a size, or a name of SIZES."""

    name: str
    dtype: str
    dims: tuple[int | str, ...]


@dataclass(frozen=True)
class Node:
    """A plugin node with its fields, inputs and outputs."""

    plugin: str
    fields: Mapping[str, Any]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def with_fields(self, **changes: Any) -> Node:
        """Return the node with other fields; None takes a field away."""
        merged = {**self.fields, **changes}
        return replace(self, fields={name: value for name, value in merged.items() if value is not None})

    def with_input(self, name: str, dtype: str | None = None, dims: tuple[int | str, ...] | None = None) -> Node:
        """Return the node with another type or shape of one input."""
        return replace(self, inputs=_changed(self.inputs, name, dtype, dims))

    def with_output(self, name: str, dims: tuple[int | str, ...]) -> Node:
        """Return the node with an output of which another shape is said."""
        return replace(self, outputs=_changed(self.outputs, name, None, dims))


def _changed(
    tensors: tuple[Tensor, ...], name: str, dtype: str | None, dims: tuple[int | str, ...] | None
) -> tuple[Tensor, ...]:
    assert name in [tensor.name for tensor in tensors]
    return tuple(
        Tensor(name, dtype or tensor.dtype, dims or tensor.dims) if tensor.name == name else tensor
        for tensor in tensors
    )


def _rows(*names: str) -> tuple[Tensor, ...]:
    return tuple(Tensor(name, "int32", ("B",)) for name in names)


def _qkv(dtype: str) -> Tensor:
    return Tensor("qkv", dtype, ("T", QKV_WIDTH))


def _flags(delimited: bool, dims: tuple[int | str, ...] = ("T",)) -> tuple[Tensor, ...]:
    return (Tensor("is_delimiter", "int32", dims),) if delimited else ()


def _boundaries(delimited: bool) -> dict[str, str]:
    return {"boundaries": "delimiter" if delimited else "fixed"}


def select(dtype: str = "float16", delimited: bool = False) -> Node:
    """Return ChunkKVSelect."""
    inputs = (
        Tensor("query", dtype, ("B", HEADS, WINDOW, HEAD_SIZE)),
        Tensor("key", dtype, ("B", KV_HEADS, "S", HEAD_SIZE)),
        *_rows("lengths", "keep_per_10k", "budget_tokens"),
        *_flags(delimited, ("B", "S")),
    )
    outputs = (
        Tensor("kept_indices", "int32", ("B", "S")),
        Tensor("kept_lengths", "int32", ("B",)),
        Tensor("token_scores", "float32", ("B", "S")),
    )
    return Node("ChunkKVSelect", {**_SELECT_SETTINGS, **_boundaries(delimited), "max_kept": 0}, inputs, outputs)


def select_each(dtype: str = "float16", given: bool = False) -> Node:
    """Return ChunkKVSelect with every input that version 2 of the method adds, and a choice for each KV head."""
    if given:
        own: dict[str, Any] = {"score": "given"}
        source: tuple[Tensor, ...] = (Tensor("scores", "float32", ("B", KV_HEADS, "S")),)
        more: tuple[Tensor, ...] = ()
    else:
        own = {"request_window": 1, "value_norm": "on", "window_reduce": "max", "head_reduce": "max"}
        source = select(dtype).inputs[:2]
        more = (*_rows("window"), Tensor("value", dtype, ("B", KV_HEADS, "S", HEAD_SIZE)))
    classes = {"head_class": "reading", "all_heads": 8, "all_reading_heads": 2, "reading_share_per_10k": 20_000}
    inputs = (*source, *_rows("lengths", "keep_per_10k", "budget_tokens"), *more)
    outputs = (
        Tensor("kept_indices", "int32", ("B", KV_HEADS, "S")),
        Tensor("kept_lengths", "int32", ("B",)),
        Tensor("token_scores", "float32", ("B", KV_HEADS, "S")),
    )
    return Node("ChunkKVSelect", {**_SELECT_SETTINGS, **own, **classes, "heads": "each"}, inputs, outputs)


def compact(dtype: str = "float16", each: bool = False) -> Node:
    """Return ChunkKVCompact, of indices for all heads or for each."""
    heads = (KV_HEADS,) if each else ()
    inputs = (Tensor("x", dtype, ("B", KV_HEADS, "S", HEAD_SIZE)), Tensor("kept_indices", "int32", ("B", *heads, "K")))
    fields = {"heads": "each"} if each else {}
    return Node("ChunkKVCompact", fields, inputs, (Tensor("y", dtype, ("B", KV_HEADS, "K", HEAD_SIZE)),))


def prepare(dtype: str = "float16", delimited: bool = False) -> Node:
    """Return ChunkKVPrepare."""
    fields: dict[str, Any] = {**_PACKED_SETTINGS, **_boundaries(delimited), "tokens_per_block": 8}
    if delimited:
        fields |= {"vocab_size": VOCABULARY, "delimiter_bitmap": [1, 2, 3, 0]}
    inputs = (
        *_rows("sequence_length", "context_lengths"),
        *_rows("host_request_types", "host_context_lengths", "host_past_key_value_lengths"),
        Tensor("host_kv_cache_block_offsets", "int32", ("P", "B", 2, "M")),
        _qkv(dtype),
        *((Tensor("input_ids", "int32", ("T",)),) if delimited else ()),
    )
    outputs = (
        *_rows("attention_lengths", "kept_lengths", "row_starts"),
        Tensor("positions", "int32", ("T",)),
        *_flags(delimited),
    )
    return Node("ChunkKVPrepare", fields, inputs, outputs)


def rope(dtype: str = "float16") -> Node:
    """Return ChunkKVRope."""
    fields = {**_HEADS, "rotary_dim": HEAD_SIZE, "neox": 1, "max_positions": POSITIONS}
    table = Tensor("rotary_cos_sin", "float32", (1, POSITIONS * HEAD_SIZE))
    inputs = (_qkv(dtype), Tensor("positions", "int32", ("T",)), table)
    return Node("ChunkKVRope", fields, inputs, (Tensor("rotated", dtype, ("T", QKV_WIDTH)),))


def score(dtype: str = "float16", delimited: bool = False) -> Node:
    """Return ChunkKVScore."""
    fields = {**_PACKED_SETTINGS, **_boundaries(delimited), **_HEADS}
    rows = _rows("context_lengths", "row_starts", "host_request_types", "host_context_lengths")
    outputs = (Tensor("chunk_scores", "float32", ("T",)),)
    return Node("ChunkKVScore", fields, (_qkv(dtype), *rows, *_flags(delimited)), outputs)


def compress(
    role: str, dtype: str = "float16", delimited: bool = False, context: str | None = None, mapping_rank: int = 2
) -> Node:
    """Return ChunkKVCompress; `context` is the type of attention's output, which is `dtype` where it is not fp8."""
    fields: dict[str, Any] = {**_PACKED_SETTINGS, **_boundaries(delimited), **_HEADS, "role": role, "layers": [0, 1]}
    fields |= {"tokens_per_block": 8, "kv_bytes": 2, "mapping_rank": mapping_rank}
    if mapping_rank == 1:
        fields["layer_in_pool"] = [0, 1]
    attention = ("T", HEADS * HEAD_SIZE)
    sources = {
        "leader": _qkv(dtype),
        "ranker": Tensor("chunk_scores", "float32", ("T",)),
        "follower": Tensor("kept_indices", "int32", ("T",)),
    }
    selects = role != "follower"
    inputs = (
        Tensor("context", context or dtype, attention),
        sources[role],
        *_rows("kept_lengths", "row_starts", "context_lengths", "host_request_types", "host_context_lengths"),
        Tensor("kv_cache_block_offsets", "int32", ("P", "B", 2, "M")),
        Tensor("host_kv_cache_pool_pointers", "int64", ("P", 2)),
        Tensor("host_kv_cache_pool_mapping", "int32", (LAYERS, 2) if mapping_rank == 2 else (LAYERS,)),
        *_flags(delimited and selects),
    )
    outputs = (
        Tensor("context_out", context or dtype, attention),
        *((Tensor("kept_indices_out", "int32", ("T",)),) if selects else ()),
    )
    return Node("ChunkKVCompress", fields, inputs, outputs)
