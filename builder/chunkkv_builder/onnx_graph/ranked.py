"""One ranking over all layers (docs/method.md, section 4) in ONNX operators: lengths are data.

What is ranked is a part of the cache: a layer, or a KV head where each chooses for itself.
"""

from __future__ import annotations

import numpy as np
import onnx

from chunkkv_builder.onnx_graph.emitter import NodeEmitter

_INT32, _INT64 = onnx.TensorProto.INT32, onnx.TensorProto.INT64


def with_floor(e: NodeEmitter, rank_values: str, least: str) -> str:
    """Return rank values [B,S] float64 with +inf for the `least` [B,1] int64 best tokens of each row."""
    most = e.op("Reshape", [e.op("ReduceMax", [least], keepdims=0), e.ints(1)])
    return e.op("Where", [_best(e, rank_values, most, least), e.scalar(np.inf, "float64"), rank_values])


def _best(e: NodeEmitter, values: str, most: str, count: str) -> str:
    """Return which of the values [B,K] are the `count` [B,1] best of their row, [B,K] bool; `most` [1] is the largest.

    Equal values go by lower position, as TopK gives them.
    """
    outputs = [f"{values}_best", f"{values}_places"]
    e.op("TopK", [values, most], outputs, axis=1, largest=1, sorted=1)
    rank = e.op("Range", [e.const(0, "int64"), e.op("Squeeze", [most]), e.const(1, "int64")])
    taken = e.op("Cast", [e.op("Less", [e.op("Unsqueeze", [rank, e.ints(0)]), count])], to=_INT32)
    blank = e.op("Expand", [e.const(0, "int32"), e.op("Shape", [values])])
    return e.op("Cast", [e.op("ScatterElements", [blank, outputs[1], taken], axis=1)], to=onnx.TensorProto.BOOL)


def rank_parts(e: NodeEmitter, rank_values: list[str], kept: str, heads: int = 1) -> tuple[list[str], str]:
    """Return the kept indices of every part, [B,max N] int32 with -1 behind a row's own, and lengths [parts,B] int32.

    `rank_values` are those of ChunkKVScore, [B,S] float64 per part, and `kept` [B,1] int64 is N(L), the mean over the
    parts. A layer has `heads` parts, which stand one after the other.
    """
    parts = len(rank_values)
    columns = [e.op("Unsqueeze", [values, e.ints(1)]) for values in rank_values]
    stacked = e.op("Concat", columns, axis=1)  # [B,parts,S]
    total = e.op("Mul", [kept, e.const(parts, "int64")])
    stays = _best_of_all(e, stacked, total, heads)
    lengths = e.op("ReduceSum", [e.op("Cast", [stays], to=_INT32), e.ints(2)], keepdims=0)  # [B,parts]
    tokens = e.dim(stacked, 2)
    position = e.op("Range", [e.const(0, "int64"), e.op("Squeeze", [tokens]), e.const(1, "int64")])
    missing = e.const(np.iinfo(np.int32).max, "int32")
    marked = e.op("Where", [stays, e.op("Cast", [position], to=_INT32), missing])
    longest = e.op("Reshape", [e.op("Cast", [e.op("ReduceMax", [lengths], keepdims=0)], to=_INT64), e.ints(1)])
    e.op("TopK", [marked, longest], ["ranked_positions", "ranked_places"], axis=2, largest=0, sorted=1)
    is_padding = e.op("Equal", ["ranked_positions", missing])
    indices = e.op("Where", [is_padding, e.const(-1, "int32"), "ranked_positions"])  # [B,parts,max N]
    of_parts = [e.op("Gather", [indices, e.const(part, "int64")], axis=1) for part in range(parts)]
    return of_parts, e.op("Transpose", [lengths], perm=[1, 0])


def _best_of_all(e: NodeEmitter, values: str, count: str, heads: int) -> str:
    """Return which of the values [B,parts,S] are the `count` [B,1] best of their row, [B,parts,S] bool.

    Equal values go by lower layer, then by lower position, then by lower head: heads that score alike keep the same.
    """
    most = e.op("Reshape", [e.op("ReduceMax", [count], keepdims=0), e.ints(1)])
    if heads == 1:
        flat = e.op("Reshape", [values, e.ints(0, -1)])
        return e.op("Reshape", [_best(e, flat, most, count), e.op("Shape", [values])])
    by_head = e.op("Concat", [e.dim(values, 0), e.ints(-1, heads), e.dim(values, 2)], axis=0)
    turned = e.op("Transpose", [e.op("Reshape", [values, by_head])], perm=[0, 1, 3, 2])  # [B,layers,S,H]
    best = _best(e, e.op("Reshape", [turned, e.ints(0, -1)]), most, count)
    back = e.op("Transpose", [e.op("Reshape", [best, e.op("Shape", [turned])])], perm=[0, 1, 3, 2])
    return e.op("Reshape", [back, e.op("Shape", [values])])
