"""Sums over chunks, and the entropy gate made of them: chunks that score high by a few tokens give only these at first.

Values of a chunk are kept where the chunk starts, in arrays [B,S] that are meaningless everywhere else.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from chunkkv.reference import ENTROPY_STEPS
from chunkkv.settings import GATE_TOKENS
from chunkkv_builder.onnx_graph.emitter import NodeEmitter

_DOUBLE, _INT64 = onnx.TensorProto.DOUBLE, onnx.TensorProto.INT64


class ChunkSums:
    """Emits sums over chunks from token scores [B,S], each token's chunk start [B,S] int64 and whether it is ranked.

    Sums of float32 scores are exact in float64, so equal scores give equal means whatever the chunk's size.
    """

    def __init__(self, e: NodeEmitter, scores: str, start: str, ranked: str) -> None:
        self._e, self.start, self.ranked = e, start, ranked
        self._zero = e.scalar(0.0, "float64")
        blank = helper.make_tensor("zero", _DOUBLE, [1], [0.0])
        self._blank = e.op("ConstantOfShape", [e.op("Shape", [scores])], value=blank)
        self.exact = e.op("Where", [ranked, e.op("Cast", [scores], to=_DOUBLE), self._zero])
        self.total = self.sum(self.exact)
        self.count = self.sum(e.op("Cast", [ranked], to=_DOUBLE))
        self.mean = e.op("Div", [self.total, e.op("Max", [self.count, e.scalar(1.0, "float64")])])

    def sum(self, values: str) -> str:
        """Return per chunk the sum of its tokens' values [B,S] float64, which are zero where not ranked."""
        return self._e.op("ScatterElements", [self._blank, self.start, values], axis=1, reduction="add")


def gated_tokens(e: NodeEmitter, chunks: ChunkSums) -> str:
    """Return which tokens [B,S] a gated chunk gives last: all but its best."""
    is_chunk = e.op("Greater", [chunks.count, e.scalar(0.0, "float64")])
    lowest = e.scalar(-np.inf, "float64")
    mean = e.op("Where", [e.op("IsNaN", [chunks.mean]), lowest, chunks.mean])
    entropy = _entropies(e, chunks)
    high = e.op("GreaterOrEqual", [mean, _lower_median(e, mean, is_chunk)])
    uneven = e.op("Less", [entropy, _lower_median(e, entropy, is_chunk)])
    gated = e.op("And", [e.op("And", [high, uneven]), is_chunk])
    of_token = e.op("GatherElements", [e.op("Cast", [gated], to=_INT64), chunks.start], axis=1)
    late = e.op("GreaterOrEqual", [_rank_in_chunk(e, chunks), e.const(GATE_TOKENS, "int64")])
    return e.op("And", [e.op("Cast", [of_token], to=onnx.TensorProto.BOOL), e.op("And", [late, chunks.ranked])])


def _entropies(e: NodeEmitter, chunks: ChunkSums) -> str:
    zero, one = e.scalar(0.0, "float64"), e.scalar(1.0, "float64")
    positive = e.op("Greater", [chunks.exact, zero])
    inner = e.op("Mul", [chunks.exact, e.op("Log", [e.op("Where", [positive, chunks.exact, one])])])
    inner = chunks.sum(e.op("Where", [positive, inner, zero]))
    has_attention = e.op("Greater", [chunks.total, zero])
    total = e.op("Where", [has_attention, chunks.total, one])
    several = e.op("Greater", [chunks.count, one])
    equal_shares = e.op("Log", [e.op("Where", [several, chunks.count, e.scalar(2.0, "float64")])])
    entropy = e.op("Div", [e.op("Sub", [e.op("Log", [total]), e.op("Div", [inner, total])]), equal_shares])
    finite = e.op("Less", [e.op("Abs", [e.op("Sub", [entropy, entropy])]), one])  # inf - inf and NaN are not
    known = e.op("And", [e.op("And", [several, has_attention]), finite])
    steps = e.scalar(float(ENTROPY_STEPS), "float64")
    rounded = e.op("Div", [e.op("Round", [e.op("Mul", [e.op("Where", [known, entropy, one]), steps])]), steps])
    return e.op("Where", [known, rounded, one])


def _lower_median(e: NodeEmitter, values: str, is_chunk: str) -> str:
    """Return [B,1]: of n values at chunk starts the one that (n-1)//2 others precede in ascending order."""
    size = e.dim(values, 1)
    present = e.op("Where", [is_chunk, values, e.scalar(np.inf, "float64")])
    ascending = e.op("TopK", [present, size], [f"{values}_ascending", f"{values}_places"], axis=1, largest=0, sorted=1)
    count = e.op("ReduceSum", [e.op("Cast", [is_chunk], to=_INT64), e.ints(1)], keepdims=1)
    middle = e.op("Div", [e.op("Sub", [count, e.const(1, "int64")]), e.const(2, "int64")])
    return e.op("GatherElements", [ascending, e.op("Max", [middle, e.const(0, "int64")])], axis=1)


def _rank_in_chunk(e: NodeEmitter, chunks: ChunkSums) -> str:
    """Return per token [B,S] int64 how many tokens of its chunk come before it in descending score.

    Two stable sorts, by score and then by chunk, put every chunk's tokens in a row; unranked tokens go to the end.
    """
    size = e.dim(chunks.exact, 1)
    scores = e.op("Where", [e.op("IsNaN", [chunks.exact]), e.scalar(-np.inf, "float64"), chunks.exact])
    e.op("TopK", [scores, size], ["scores_down", "by_score"], axis=1, largest=1, sorted=1)
    last = e.const(np.iinfo(np.int64).max, "int64")
    chunk = e.op("Where", [chunks.ranked, chunks.start, last])
    chunk = e.op("GatherElements", [chunk, "by_score"], axis=1)
    e.op("TopK", [chunk, size], ["chunks_up", "by_chunk"], axis=1, largest=0, sorted=1)
    token = e.op("GatherElements", ["by_score", "by_chunk"], axis=1)
    place = e.op("CumSum", [e.op("Cast", [chunks.ranked], to=_INT64), e.const(1, "int64")], exclusive=1)
    in_row = e.op("Range", [e.const(0, "int64"), e.op("Squeeze", [size]), e.const(1, "int64")])
    in_row = e.op("Expand", [e.op("Unsqueeze", [in_row, e.ints(0)]), e.op("Shape", [token])])
    first = e.op("GatherElements", [place, chunks.start], axis=1)
    first = e.op("GatherElements", [first, token], axis=1)
    rank = e.op("Sub", [in_row, first])
    zeros = helper.make_tensor("zero", _INT64, [1], [0])
    blank = e.op("ConstantOfShape", [e.op("Shape", [token])], value=zeros)
    return e.op("ScatterElements", [blank, token, rank], axis=1)
