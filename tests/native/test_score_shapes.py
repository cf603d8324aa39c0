"""Shapes of real models and of extreme settings, in the arrangements that engines use; and every 8-bit key."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support import op_properties
from support.op_cases import STORAGE_TYPES, OpCase

from chunkkv.errors import NativeError
from chunkkv.native import BatchRows, NativeLibrary
from chunkkv.settings import ChunkKVSettings
from native.memory import Memory
from native.native_op import NativeOp, make_cache


def settings(window: int, chunk_size: int, sinks: int, **others: Any) -> ChunkKVSettings:
    values = {"window": window, "chunk_size": chunk_size, "sinks": sinks, "pooling": 1, **others}
    return ChunkKVSettings(min_tokens=window + chunk_size + sinks, keep_per_10k=4_000, **values)


def shape(
    own: ChunkKVSettings, lengths: tuple[int, ...], heads: tuple[int, int], head_dim: int, **others: Any
) -> OpCase:
    return OpCase("shape", own, lengths, heads=heads[0], kv_heads=heads[1], head_dim=head_dim, **others)


GROUPED = settings(32, 10, 4)
SHAPES: dict[str, tuple[OpCase, dict[str, Any]]] = {
    "28/4 heads, pages of 64": (shape(GROUPED, (200, 131), (28, 4), 128), {"layout": "paged", "block": 64}),
    "14/2 heads, an empty row": (shape(GROUPED, (150, 0, 97), (14, 2), 64), {"layout": "paged", "block": 32}),
    "40/8 heads, pages of 128": (shape(GROUPED, (150,), (40, 8), 128), {"layout": "paged", "block": 128}),
    "16/1 heads, a window of 128": (shape(settings(128, 10, 4), (330,), (16, 1), 64), {}),
    "D 96, a window of 1": (shape(settings(1, 10, 4), (190, 65), (4, 2), 96), {"layout": "tokens first"}),
    "D 256, chunks of 256": (shape(settings(128, 256, 0), (700, 390), (2, 1), 256), {}),
    "D 80, chunks of 1": (shape(settings(33, 1, 3), (161, 98), (4, 2), 80), {"layout": "paged"}),
    "500 sinks, pooling 63": (shape(settings(8, 10, 500, pooling=63), (900, 640), (4, 2), 64), {}),
    "packed, five empty rows": (
        shape(settings(6, 9, 2, boundaries="delimiter"), (0, 150, 0, 0, 97, 0, 0), (4, 2), 64),
        {"layout": "packed", "packed_rows": True},
    ),
    "ratios and budgets of rows": (
        shape(GROUPED, (200, 131, 160), (4, 2), 64, keep_per_10k=(2_000, 9_000, 5_000), budget_tokens=(0, 0, 70)),
        {"layout": "paged"},
    ),
}


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_kept_tokens_are_the_references(library: NativeLibrary, memory: Memory, name: str, storage: str) -> None:
    tried, arrangement = SHAPES[name]
    op = NativeOp(library, memory, chunks_alone=True, **arrangement)
    assert op_properties.matches_reference(op.select, tried.inputs(storage), tried) == 0


@pytest.mark.parametrize("query_type", STORAGE_TYPES)
@pytest.mark.parametrize("key_type", ["int8", "float8_e4m3fn"])
def test_every_byte_is_the_number_that_it_stands_for(
    library: NativeLibrary, memory: Memory, key_type: str, query_type: str
) -> None:
    """A query of one entry picks it out of every key; with powers of two nothing is rounded."""
    numbers = np.arange(256, dtype=np.uint8).view(np.int8 if key_type == "int8" else ml_dtypes.float8_e4m3fn)
    own = settings(1, 4, 0, score="logits")
    key = np.zeros((1, 1, 257, 64), numbers.dtype)
    key[0, 0, :256, 5] = numbers
    query = np.zeros((1, 1, 1, 64), STORAGE_TYPES[query_type])
    query[..., 5] = 1
    rows = BatchRows(memory.put(np.int32([257])), 257)
    cache, queries = make_cache(memory, key, "contiguous"), memory.put(query)
    tokens = memory.empty((1, 257), "float32")
    options = {
        "chunk_scores": memory.empty((1, library.max_chunks(own, 257)), "float32"),
        "token_scores": tokens,
        "key_scale": memory.put(np.float32([0.5])),
    }
    workspace = memory.empty((library.score_workspace(own, rows, queries, cache, **options),), "uint8")
    library.score(own, rows, queries, cache, workspace=workspace, **options)
    np.testing.assert_array_equal(memory.get(tokens)[0, :256], numbers.astype(np.float32) / 2)


@pytest.mark.parametrize("heads", [(17, 1), (71, 1), (48, 1)])
def test_more_than_16_query_heads_of_a_kv_head_are_refused(
    library: NativeLibrary, memory: Memory, heads: tuple[int, int]
) -> None:
    op, tried = NativeOp(library, memory), shape(GROUPED, (90,), heads, 64)
    inputs = tried.inputs("float16")
    with pytest.raises(NativeError, match=f"heads / kv_heads is {heads[0]}; allowed is 1 to 16"):
        op.select(inputs.query, inputs.key, inputs.lengths, tried.settings)
