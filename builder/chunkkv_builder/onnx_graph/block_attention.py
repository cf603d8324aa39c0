"""Attention of a block of tokens over the cache in small operators, with products of whole numbers for the scores.

ONNX Runtime's own attention multiplies in float32 only, and is the larger part of a long prefill. Here queries and keys
are rounded to 8 bits: keys with a scale for each channel of a head, queries with one for all heads that read the same
keys. A cache of 8 bits holds such keys already. Probabilities meet a float32 cache's values in float32, because most
are far smaller than the largest one. Those over a cache of 8 bits are rounded, too; EightBitBlockAttention says how
what is lost of the small ones is made up for. Scores exist for one query head at a time, so that they stay in the
processor's cache, and are written once: those of later tokens are hidden in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from chunkkv.cache_scales import HIGHEST, LOWEST
from chunkkv_builder.onnx_graph.emitter import NodeEmitter
from chunkkv_builder.onnx_graph.projections import CONTRIB, SMALLEST_SCALE, ZERO_CODE
from chunkkv_builder.onnx_graph.quantize import LARGEST_CODE

_FLOAT, _INT8, _INT64 = TensorProto.FLOAT, TensorProto.INT8, TensorProto.INT64
_END = np.iinfo(np.int64).max  # of a slice: to the last
_HIDDEN = -1e30  # added to the score of a token that comes later
_SINKS = 4  # first tokens, on which attention rests: beside them all other probabilities are small
_NEGLIGIBLE = 1e-25  # a probability too small to change a mean
_LARGEST_PROBABILITY_CODE = 127  # not 255: processors without VNNI add two products in 16 bits


class BlockAttention:
    """Emits the attention of one row's block over one part of a float32 cache, or only stores its keys and values.

    Parameters
    ----------
    e : NodeEmitter
        The graph that gets the nodes.
    query_heads, kv_heads, head_dim : int
        Of the part.
    """

    def __init__(self, e: NodeEmitter, query_heads: int, kv_heads: int, head_dim: int) -> None:
        self._e, self._query_heads, self._kv_heads, self._head_dim = e, query_heads, kv_heads, head_dim

    def emit(self, qkv: tuple[str, str, str], past: list[str], last: str) -> tuple[str, str, str]:
        """Return the attention [1,S,Hq*D] and the caches with the block's keys and values in them.

        `qkv` are [1,S,H*D], heads rotated, and queries with the scale of attention; `past` are the caches [1,Hkv,C,D];
        `last` [1] int32 is the block's last slot.
        """
        e = self._e
        caches = self.store(qkv[1:], past, last)
        query, hidden = self._heads_first(qkv[0], self._query_heads), self._hidden()
        mixed = []
        for head in range(self._kv_heads):
            keys, values = (self._of_head(cache, head) for cache in caches)
            mixed += self._mix(query, keys, values, head, hidden)
        heads = self._restored(e.op("Concat", mixed, axis=0))
        tokens_first = e.op("Transpose", [heads], perm=[1, 0, 2])
        joined = e.op("Reshape", [tokens_first, e.ints(1, -1, self._query_heads * self._head_dim)])
        return joined, caches[0], caches[1]

    def store(self, new: Sequence[str], past: Sequence[str], last: str, present: Sequence[str] = ()) -> list[str]:
        """Return the caches with the block's keys and values, `new` [1,S,Hkv*D] each, in them, and do not attend.

        `past` and `last` are as `emit` takes them; `present` are names for the caches, if they need any.
        """
        e = self._e
        self._total = e.op("Add", [e.op("Cast", [last], to=_INT64), e.ints(1)])
        self._block = e.dim(new[0], 1)
        self._before = e.op("Sub", [self._total, self._block])
        outputs: list[list[str] | None] = [[name] for name in present] if present else [None] * len(past)
        return self._stored([self._heads_first(values, self._kv_heads) for values in new], past, outputs)

    def _stored(self, new: Sequence[str], past: Sequence[str], outputs: Sequence[list[str] | None]) -> list[str]:
        """Return the caches `past` with `new` [1,Hkv,S,D] each in them."""
        places = self._places()
        given = zip(past, new, outputs, strict=True)
        return [self._e.op("ScatterND", [old, places, values], names) for old, values, names in given]

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

    def _hidden(self) -> tuple[str, ...]:
        """Return what `_hide` needs beside scores: places [n] of the hidden ones among S*T, their values, and [S,T]."""
        e = self._e
        zero, one = (e.const(number, "int64") for number in (0, 1))
        tokens = e.op("Range", [zero, e.op("Squeeze", [self._block]), one])
        rows = e.op("Unsqueeze", [tokens, e.ints(1)])
        first = e.op("Add", [e.op("Mul", [rows, self._total]), self._before])
        is_later = e.op("Reshape", [e.op("Less", [rows, tokens]), e.ints(-1)])
        places = e.op("Compress", [e.op("Add", [first, tokens]), is_later])
        values = e.op("Expand", [e.scalar(_HIDDEN), e.op("Shape", [places])])
        return places, values, e.op("Concat", [self._block, self._total], axis=0)

    def _hide(self, scores: str, hidden: Sequence[str]) -> str:
        """Return the scores [S,T] without those of tokens that come later; they are written where they lie."""
        e, size = self._e, f"{self._total}/scores"
        flat = e.op("Reshape", [scores, e.ints(-1)])
        masked = e.op("ScatterElements", [flat, *hidden[:2]], axis=0)
        for name in (flat, masked):
            self._declare(name, size)
        scores = e.op("Reshape", [masked, hidden[2]])
        self._declare(scores, f"{self._block}/tokens", f"{self._total}/slots")
        return scores

    def _declare(self, name: str, *sizes: str) -> None:
        """Name the sizes of a float32 value, so that others of the same sizes may take its memory."""
        self._e.declare(name, "float32", sizes)

    def _of_head(self, cache: str, head: int) -> str:
        """Return what a head of a cache holds, the block included: [T,D]."""
        e = self._e
        ends = e.op("Concat", [e.ints(head + 1), self._total], axis=0)
        return e.op("Squeeze", [e.op("Slice", [cache, e.ints(head, 0), ends, e.ints(1, 2)]), e.ints(0, 1)])

    def _mix(self, query: str, key: str, value: str, head: int, hidden: Sequence[str]) -> list[str]:
        """Return the attention [S,D] of each query head that reads a KV head's keys and values [T,D]."""
        e, group = self._e, self._query_heads // self._kv_heads
        codes, key_scales = self._key_codes(key, head)
        factors = self._factors(value)
        queries = e.op("Slice", [query, e.ints(head * group), e.ints((head + 1) * group), e.ints(1)])
        queries = e.op("Mul", [e.op("Reshape", [queries, e.ints(-1, self._head_dim)]), key_scales])
        scale = self._scale_of(queries, None)
        rounded = e.op("QuantizeLinear", [queries, scale, e.const(ZERO_CODE, "uint8")])
        mixed = []
        for one in self._split(rounded, group):
            scores = self._product(one, scale, codes)
            self._declare(scores, f"{self._block}/tokens", f"{self._total}/slots")
            probabilities = e.op("Softmax", [self._hide(scores, hidden)], axis=-1)
            mixed.append(self._mean(probabilities, factors))
        return mixed

    def _split(self, rows: str, count: int) -> list[str]:
        """Return `count` equal pieces of `rows` [count*S,D], one behind the other."""
        if count == 1:
            return [rows]
        pieces = [f"{rows}/{number}" for number in range(count)]
        self._e.op("Split", [rows], pieces, axis=0, num_outputs=count)
        return pieces

    def _key_codes(self, key: str, head: int) -> tuple[str, str]:
        """Return the keys [T,D] of a head as codes [D,T] of 8 bits, and their scales [D]."""
        e = self._e
        by_channel = e.op("Transpose", [key], perm=[1, 0])
        scales = self._scale_of(by_channel, e.ints(1))
        zeros = e.const(np.zeros(self._head_dim), "int8")
        return e.op("QuantizeLinear", [by_channel, scales, zeros], axis=0), scales

    def _factors(self, value: str) -> Sequence[str]:
        """Return what `_mean` takes of the values [T,D] of a head, as the cache holds them."""
        return [value]

    def _mean(self, probabilities: str, factors: Sequence[str]) -> str:
        """Return the mean [S,D] of a head's values by probabilities [S,T]; what it lacks is the same in every row."""
        return self._e.op("MatMul", [probabilities, *factors])

    def _restored(self, heads: str) -> str:
        """Return the means [Hq*S,D] as [Hq,S,D], with what `_mean` left out."""
        return self._e.op("Reshape", [heads, self._e.ints(self._query_heads, -1, self._head_dim)])

    def _scale_of(self, values: str, axes: str | None) -> str:
        """Return the scales of 8-bit codes of `values`, whose largest magnitudes are taken along `axes` or all."""
        e = self._e
        largest = e.op("ReduceMax", [e.op("Abs", [values]), *([] if axes is None else [axes])], keepdims=0)
        return e.op("Max", [e.op("Mul", [largest, e.scalar(1 / LARGEST_CODE)]), e.scalar(SMALLEST_SCALE)])

    def _product(self, queries: str, scale: str, codes: str) -> str:
        inputs = [queries, codes, scale, self._e.scalar(1.0), self._e.const(ZERO_CODE, "uint8")]
        return self._e.op("MatMulIntegerToFloat", inputs, domain=CONTRIB)


class EightBitBlockAttention(BlockAttention):
    """Emits the attention of one row's block over one part of a cache of 8 bits.

    The block's own keys and values are read as the cache holds them. Probabilities are rounded to 8 bits with a scale
    for each row, but for those of the first tokens, which are far larger. The product is that with values less their
    center, their mean over all tokens in whole numbers: what probabilities lose that round to zero goes to the center
    then, not to zero.

    Parameters
    ----------
    e, query_heads, kv_heads, head_dim
        As BlockAttention takes them.
    scales : sequence of str
        What the numbers of keys and of values are multiplied with, [1,Hkv,1,D] each.
    """

    def __init__(self, e: NodeEmitter, query_heads: int, kv_heads: int, head_dim: int, scales: Sequence[str]) -> None:
        super().__init__(e, query_heads, kv_heads, head_dim)
        self._scales = scales

    def _stored(self, new: Sequence[str], past: Sequence[str], outputs: Sequence[list[str] | None]) -> list[str]:
        e, stored = self._e, []
        for values, old, scale, names in zip(new, past, self._scales, outputs, strict=True):
            numbers = e.op("Cast", [whole_numbers(e, values, scale)], to=_INT8)
            stored.append(e.op("TensorScatter", [old, numbers, self._before], names, axis=2))
        return stored

    def _hidden(self) -> tuple[str, ...]:
        """Return what `_hide` adds to the block's scores of its own tokens [S,S], and each row's first of them [S]."""
        e = self._e
        filled = e.op("Expand", [e.scalar(_HIDDEN), e.op("Concat", [self._block, self._block], axis=0)])
        added = e.op("Trilu", [filled, e.const(1, "int64")], upper=1)
        self._centers: list[str] = []
        self._slot_0 = e.op("Expand", [e.ints(0), self._block])
        return added, e.op("Expand", [self._before, self._block])

    def _hide(self, scores: str, hidden: Sequence[str]) -> str:
        e, (added, first) = self._e, hidden
        own = e.op("Add", [e.op("Slice", [scores, self._before, e.ints(_END), e.ints(1)]), added])
        masked = e.op("TensorScatter", [scores, own, first], axis=1)
        self._declare(masked, f"{self._block}/tokens", f"{self._total}/slots")
        return masked

    def _key_codes(self, key: str, head: int) -> tuple[str, str]:
        e = self._e
        scales = e.op("Gather", [self._scales[0], e.const(head, "int64")], axis=1)
        return e.op("Transpose", [key], perm=[1, 0]), e.op("Reshape", [scales, e.ints(-1)])

    def _factors(self, value: str) -> Sequence[str]:
        """Return whole numbers [T,D], their centers [D], and float32 numbers of the first tokens less the centers."""
        e = self._e
        ones = e.op("Expand", [e.const(1, "uint8"), e.op("Concat", [e.ints(1), self._total], axis=0)])
        sums = e.op("Cast", [e.op("MatMulInteger", [ones, value])], to=_FLOAT)
        center = e.op("Round", [e.op("Div", [sums, e.op("Cast", [self._total], to=_FLOAT)])])
        self._centers.append(center)
        first = e.op("Cast", [e.op("Slice", [value, e.ints(0), e.ints(_SINKS), e.ints(0)])], to=_FLOAT)
        return [value, e.op("Reshape", [e.op("Cast", [center], to=_INT8), e.ints(-1)]), e.op("Sub", [first, center])]

    def _mean(self, probabilities: str, factors: Sequence[str]) -> str:
        """Return the mean [S,D] of whole numbers less their centers."""
        e, (value, center, of_first) = self._e, factors
        first = e.op("Slice", [probabilities, e.ints(0), e.ints(_SINKS), e.ints(1)])
        # They replace the first probabilities. They are not zero, because a row's scale is made of its largest one and
        # must not be zero. Made of `first`, they come behind its Slice, so they can be written in place.
        negligible = e.op("Clip", [first, *[e.scalar(_NEGLIGIBLE)] * 2])
        others = e.op("TensorScatter", [probabilities, negligible, self._slot_0], axis=1)
        for name in (probabilities, others):
            self._declare(name, f"{self._block}/tokens", f"{self._total}/slots")
        largest = e.op("ReduceMax", [others, e.ints(1)], keepdims=1)
        scale = e.op("Mul", [largest, e.scalar(1 / _LARGEST_PROBABILITY_CODE)])
        codes = e.op("QuantizeLinear", [others, e.op("Squeeze", [scale, e.ints(1)])], axis=0)
        inputs = [codes, value, e.scalar(1.0), e.scalar(1.0), e.const(0, "uint8"), center]
        product = e.op("MatMulIntegerToFloat", inputs, domain=CONTRIB)
        return e.op("Gemm", [first, of_first, e.op("Mul", [product, scale])])

    def _restored(self, heads: str) -> str:
        """Add centers and scale: means are fewer numbers than the values."""
        e, group = self._e, self._query_heads // self._kv_heads
        by_group = e.op("Reshape", [heads, e.ints(self._kv_heads, group, -1, self._head_dim)])
        shape = e.ints(self._kv_heads, 1, 1, self._head_dim)
        centers = e.op("Reshape", [e.op("Concat", self._centers, axis=0), shape])
        scaled = e.op("Mul", [e.op("Add", [by_group, centers]), e.op("Reshape", [self._scales[1], shape])])
        return e.op("Reshape", [scaled, e.ints(self._query_heads, -1, self._head_dim)])


def whole_numbers(e: NodeEmitter, values: str, scale: str) -> str:
    """Return what a cache of 8 bits holds of `values`, as float32."""
    rounded = e.op("Round", [e.op("Div", [values, scale])])
    return e.op("Clip", [rounded, *(e.scalar(limit) for limit in (LOWEST, HIGHEST))])
