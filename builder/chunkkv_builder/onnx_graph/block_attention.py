"""Attention of a block of tokens over the cache in small operators, with products of whole numbers for the scores.

ONNX Runtime's own attention multiplies in float32 only, and is the larger part of a long prefill. Here queries and keys
are rounded to 8 bits: keys with a scale for each channel of a head, queries with one for all heads that read the same
keys. Probabilities and values stay float32, because most probabilities are far smaller than the largest one. Scores
exist for one query head at a time, so that they stay in the processor's cache.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from chunkkv_builder.onnx_graph.emitter import NodeEmitter
from chunkkv_builder.onnx_graph.projections import CONTRIB, SMALLEST_SCALE, ZERO_CODE
from chunkkv_builder.onnx_graph.quantize import LARGEST_CODE

_INT64 = TensorProto.INT64
_END = np.iinfo(np.int64).max  # of a slice: to the last
_HIDDEN = -1e30  # added to the score of a token that comes later


class BlockAttention:
    """Emits the attention of one row's block over one part of the cache.

    Parameters
    ----------
    e : NodeEmitter
        The graph that gets the nodes.
    query_heads, kv_heads, head_dim : int
        Of the part.
    scale : float
        Of the scores.
    """

    def __init__(self, e: NodeEmitter, query_heads: int, kv_heads: int, head_dim: int, scale: float) -> None:
        self._e, self._query_heads, self._kv_heads, self._head_dim = e, query_heads, kv_heads, head_dim
        self._scale = scale

    def emit(self, qkv: tuple[str, str, str], past: list[str], last: str) -> tuple[str, str, str]:
        """Return the attention [1,S,Hq*D] and the caches with the block's keys and values in them.

        `qkv` are [1,S,H*D], heads rotated; `past` are the caches [1,Hkv,C,D]; `last` [1] int32 is the block's last
        slot.
        """
        e = self._e
        self._total = e.op("Add", [e.op("Cast", [last], to=_INT64), e.ints(1)])
        self._block = e.dim(qkv[0], 1)
        self._before = e.op("Sub", [self._total, self._block])
        query, key, value = (
            self._heads_first(of, count)
            for of, count in zip(qkv, (self._query_heads, self._kv_heads, self._kv_heads), strict=True)
        )
        places = self._places()
        caches = [e.op("ScatterND", [old, places, new]) for old, new in zip(past, (key, value), strict=True)]
        hidden = self._hidden()
        mixed = []
        for head in range(self._kv_heads):
            keys, values = (self._of_head(cache, head) for cache in caches)
            mixed += self._mix(query, keys, values, head, hidden)
        tokens_first = e.op("Transpose", [e.op("Concat", mixed, axis=0)], perm=[1, 0, 2])
        joined = e.op("Reshape", [tokens_first, e.ints(1, -1, self._query_heads * self._head_dim)])
        return joined, caches[0], caches[1]

    def _heads_first(self, value: str, heads: int) -> str:
        """[1,S,H*D] to [1,H,S,D]."""
        shaped = self._e.op("Reshape", [value, self._e.ints(1, -1, heads, self._head_dim)])
        return self._e.op("Transpose", [shaped], perm=[0, 2, 1, 3])

    def _places(self) -> str:
        """Return the places [1,Hkv,S,3] of the block's tokens in a cache: row, head, slot."""
        e, heads = self._e, self._kv_heads
        slots = e.op("Range", [e.op("Squeeze", [self._before]), e.op("Squeeze", [self._total]), e.const(1, "int64")])
        shape = e.op("Concat", [e.ints(1, heads), self._block, e.ints(1)], axis=0)
        columns = [
            e.const(np.zeros((1, 1, 1, 1)), "int64"),
            e.const(np.arange(heads).reshape(1, heads, 1, 1), "int64"),
            e.op("Reshape", [slots, e.ints(1, 1, -1, 1)]),
        ]
        return e.op("Concat", [e.op("Expand", [column, shape]) for column in columns], axis=3)

    def _hidden(self) -> str:
        """Return what is added to the block's scores of its own tokens [S,S]."""
        e = self._e
        filled = e.op("Expand", [e.scalar(_HIDDEN), e.op("Concat", [self._block, self._block], axis=0)])
        return e.op("Trilu", [filled, e.const(1, "int64")], upper=1)

    def _of_head(self, cache: str, head: int) -> str:
        """Return what a head of a cache holds, the block included: [T,D]."""
        e = self._e
        ends = e.op("Concat", [e.ints(head + 1), self._total], axis=0)
        return e.op("Squeeze", [e.op("Slice", [cache, e.ints(head, 0), ends, e.ints(1, 2)]), e.ints(0, 1)])

    def _mix(self, query: str, key: str, value: str, head: int, hidden: str) -> list[str]:
        """Return the attention [1,S,D] of each query head that reads a KV head's keys and values [T,D]."""
        e, group = self._e, self._query_heads // self._kv_heads
        by_channel = e.op("Transpose", [key], perm=[1, 0])
        key_scales = self._scale_of(by_channel, e.ints(1))
        zeros = e.const(np.zeros(self._head_dim), "int8")
        codes = e.op("QuantizeLinear", [by_channel, key_scales, zeros], axis=0)
        before = e.op("Slice", [codes, e.ints(0), self._before, e.ints(1)])
        own = e.op("Slice", [codes, self._before, e.ints(_END), e.ints(1)])
        queries = e.op("Slice", [query, e.ints(head * group), e.ints((head + 1) * group), e.ints(1)])
        queries = e.op("Mul", [queries, key_scales])
        scale = self._scale_of(queries, None)
        rounded = e.op("QuantizeLinear", [queries, scale, e.const(ZERO_CODE, "uint8")])
        scale = e.op("Mul", [scale, e.scalar(self._scale)])
        mixed = []
        for number in range(group):
            one = e.op("Gather", [rounded, e.const(number, "int64")], axis=1)
            one = e.op("Squeeze", [one, e.ints(0)])
            scores = [self._product(one, scale, before), e.op("Add", [self._product(one, scale, own), hidden])]
            probabilities = e.op("Softmax", [e.op("Concat", scores, axis=1)], axis=-1)
            mixed.append(e.op("Unsqueeze", [e.op("MatMul", [probabilities, value]), e.ints(0)]))
        return mixed

    def _scale_of(self, values: str, axes: str | None) -> str:
        """Return the scales of 8-bit codes of `values`, whose largest magnitudes are taken along `axes` or all."""
        e = self._e
        largest = e.op("ReduceMax", [e.op("Abs", [values]), *([] if axes is None else [axes])], keepdims=0)
        return e.op("Max", [e.op("Mul", [largest, e.scalar(1 / LARGEST_CODE)]), e.scalar(SMALLEST_SCALE)])

    def _product(self, queries: str, scale: str, codes: str) -> str:
        inputs = [queries, codes, scale, self._e.scalar(1.0), self._e.const(ZERO_CODE, "uint8")]
        return self._e.op("MatMulIntegerToFloat", inputs, domain=CONTRIB)
