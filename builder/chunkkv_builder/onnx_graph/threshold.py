"""Sections 3 and 4 of docs/method.md without sorting, in operators that TensorRT's parser takes.

TensorRT takes no ScatterElements with a reduction, computes in no 64-bit floats, and its TopK returns at most 3,840
elements. None of them is needed: one threshold per row says which tokens stay. All tokens whose chunk scores above it
stay, and of the tokens at it the first ones, until N tokens are reached. The tokens of a chunk are neighbours, so this
is the rule of section 4: whole chunks best first, equal scores by lower position, and of the chunk that does not fit
its first tokens.

The threshold is found by a radix search: 256 candidates at a time, first its power of two, then the 24 bits of its
significand, eight at a time. Every candidate is an exact float32, so the search is exact.

TensorRT turns one ONNX node into up to thirty layers, most of them about shapes, and its build time grows with their
number: there is a body for every layer that chooses tokens. So there are few and wide rounds, and neighbours are read
by Gather, which makes a tenth of the layers of Pad and Slice.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx

from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.onnx_graph.emitter import NodeEmitter

_FLOAT, _INT32, _INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32, onnx.TensorProto.INT64
_SIGNIFICAND_BITS, _BITS_PER_ROUND = 24, 8
_CANDIDATES = 2**_BITS_PER_ROUND
# The powers of two of normal float32 numbers. GPUs may take smaller numbers for zero; the search does so too.
_EXPONENTS = np.arange(-126, 128)
_LARGEST = float(np.finfo(np.float32).max)
NEVER_NEGATIVE = ("softmax",)  # values of `score` whose scores are at least 0; any other may have either sign


class Row(NamedTuple):
    """Names of what is known of every row.

    Its length [B,1] and positions [1,S] int64, whether a token stands before the observation window [B,S] bool, and
    N [B,1] int64.
    """

    length: str
    position: str
    before_window: str
    kept: str


def masked(e: NodeEmitter, settings: ChunkKVSettings, logits: str, length: str, position: str) -> str:
    """Return logits [B,Hq,w,S] with -inf where window query i may not see token t, whatever stood there."""
    window = e.const(np.arange(1 - settings.window, 1, dtype=np.int64).reshape(1, 1, -1, 1), "int64")
    last_seen = e.op("Add", [e.op("Reshape", [length, e.ints(-1, 1, 1, 1)]), window])
    visible = e.op("Less", [e.op("Unsqueeze", [position, e.ints(1, 2)]), last_seen])
    return e.op("Where", [visible, logits, e.scalar(-np.inf)])


def kept_indices(e: NodeEmitter, settings: ChunkKVSettings, row: Row, scores: str, start: str) -> str:
    """Return the tokens that stay in ascending order, [B,S] int32, -1 behind them.

    `scores` [B,S] float32 are token scores, `start` [1,S] or [B,S] int64 the position where each token's chunk starts.
    """
    start = e.op("Expand", [start, e.op("Shape", [scores])])
    after_sinks = e.op("GreaterOrEqual", [row.position, e.const(settings.sinks, "int64")])
    ranked = e.op("And", [after_sinks, row.before_window])
    start = e.op("Where", [ranked, start, e.const(0, "int64")])  # outside the ranking nothing is read back
    mean = _from_zero(e, settings, _chunk_means(e, row, scores, start, ranked, settings.chunk_size), ranked)
    untouched = e.op("Equal", [row.kept, row.length])
    is_token = e.op("Less", [row.position, row.length])
    always = e.op("And", [is_token, e.op("Or", [e.op("Not", [ranked]), untouched])])
    ranked = e.op("And", [ranked, e.op("Not", [untouched])])
    stays = _stays(e, mean, always, ranked, row.kept)
    return _ascending_positions(e, stays, row.position)


def segment_starts(e: NodeEmitter, starts: str, position: str) -> str:
    """Return for every token the position where its segment starts, [B,S] int64, from marks [B,S] bool.

    The first token must be marked.
    """
    number = e.op("Sub", [_running_count(e, starts), e.const(1, "int64")])
    table = e.op("Cast", [_ascending_positions(e, starts, position)], to=_INT64)
    return e.op("GatherElements", [table, number], axis=1)


def _running_count(e: NodeEmitter, marks: str) -> str:
    """Return how many of the tokens up to and with each one are marked, [B,S] int64."""
    return e.op("CumSum", [e.op("Cast", [marks], to=_INT64), e.const(1, "int64")])


def _chunk_means(e: NodeEmitter, row: Row, scores: str, start: str, ranked: str, chunk_size: int) -> str:
    """Return per token [B,S] float32 the mean score of its chunk; meaningless where not ranked.

    The average is taken of each score's distance to the chunk's first score. Equal scores then give that very score,
    whatever the chunk's size: in sums of the scores themselves they would differ by rounding.
    """
    zero, one = e.scalar(0.0), e.scalar(1.0)
    first = e.op("GatherElements", [scores, start], axis=1)
    is_finite = e.op("LessOrEqual", [e.op("Abs", [first]), e.scalar(_LARGEST)])  # false for NaN
    base = e.op("Where", [is_finite, first, zero])
    total = e.op("Where", [ranked, e.op("Sub", [scores, base]), zero])
    count = e.op("Where", [ranked, one, zero])
    sums = e.op("Concat", [e.op("Unsqueeze", [part, e.ints(0)]) for part in (total, count)], axis=0)  # [2,B,S]
    last = e.op("Sub", [e.dim(scores, 1), e.ints(1)])  # stands in the window, so it adds nothing to any sum
    position = e.op("Squeeze", [row.position, e.ints(0)])
    step = 1
    while step < chunk_size:  # after each round a token holds the sums of the next 2 * step tokens of its chunk
        later = e.op("Min", [e.op("Add", [position, e.ints(step)]), last])
        follows = e.op("And", [e.op("Equal", [start, e.op("Gather", [start, later], axis=1)]), ranked])
        sums = e.op("Add", [sums, e.op("Where", [follows, e.op("Gather", [sums, later], axis=2), zero])])
        step *= 2
    total, count = (e.op("Gather", [sums, e.const(place, "int64")], axis=0) for place in (0, 1))
    mean = e.op("Add", [base, e.op("Div", [total, e.op("Max", [count, one])])])
    return e.op("GatherElements", [mean, start], axis=1)


def _from_zero(e: NodeEmitter, settings: ChunkKVSettings, mean: str, ranked: str) -> str:
    """Return means [B,S] that are at least 0, in the same order, NaN as the lowest.

    Means of attention weights are; means of scores that may be negative are counted from the lowest of their row.
    """
    is_never_negative = settings.score in NEVER_NEGATIVE
    lowest = e.scalar(0.0 if is_never_negative else -_LARGEST)
    bounded = e.op("Min", [e.op("Max", [mean, e.scalar(-_LARGEST)]), e.scalar(_LARGEST)])
    mean = e.op("Where", [e.op("IsNaN", [mean]), lowest, bounded])
    if is_never_negative:
        return mean
    smallest = e.op("ReduceMin", [e.op("Where", [ranked, mean, e.scalar(np.inf)]), e.ints(1)], keepdims=1)
    return e.op("Min", [e.op("Sub", [mean, smallest]), e.scalar(_LARGEST)])


def _stays(e: NodeEmitter, value: str, always: str, ranked: str, kept: str) -> str:
    """Return which tokens stay, [B,S] bool: all of `always`, and the best of `ranked` until `kept` [B,1] are reached.

    `value` [B,S] float32 is at least 0.
    """
    sure = e.op("ReduceSum", [e.op("Cast", [always], to=_INT64), e.ints(1)], keepdims=1)
    room = e.op("Sub", [kept, sure])  # [B,1]
    value = e.op("Where", [ranked, value, e.scalar(-1.0)])
    threshold = _threshold(e, value, room)
    above = e.op("Greater", [value, threshold])
    at = e.op("And", [e.op("Equal", [value, threshold]), ranked])
    taken = e.op("ReduceSum", [e.op("Cast", [above], to=_INT64), e.ints(1)], keepdims=1)
    first = e.op("LessOrEqual", [_running_count(e, at), e.op("Sub", [room, taken])])
    return e.op("Or", [always, e.op("Or", [above, e.op("And", [at, first])])])


def _threshold(e: NodeEmitter, value: str, room: str) -> str:
    """Return the largest float32 [B,1] that at least `room` [B,1] of the values [B,S] reach; 0 where none is."""
    column = e.op("Unsqueeze", [value, e.ints(2)])
    powers = np.concatenate([[0.0], 2.0 ** _EXPONENTS.astype(np.float64)])
    low = _largest_reached(e, e.const(powers[None], "float32"), column, room)
    step, steps = low, e.const(np.arange(_CANDIDATES)[None], "float32")
    for _ in range(_SIGNIFICAND_BITS // _BITS_PER_ROUND):
        step = e.op("Mul", [step, e.scalar(1.0 / _CANDIDATES)])
        low = _largest_reached(e, e.op("Add", [low, e.op("Mul", [step, steps])]), column, room)
    return low


def _largest_reached(e: NodeEmitter, candidates: str, column: str, room: str) -> str:
    """Return the largest of the candidates [B,256] that at least `room` [B,1] of the values [B,S,1] reach, else 0."""
    reached = e.op("GreaterOrEqual", [column, e.op("Unsqueeze", [candidates, e.ints(1)])])
    count = e.op("ReduceSum", [e.op("Cast", [reached], to=_INT32), e.ints(1)], keepdims=0)
    enough = e.op("GreaterOrEqual", [e.op("Cast", [count], to=_INT64), room])
    return e.op("ReduceMax", [e.op("Where", [enough, candidates, e.scalar(0.0)]), e.ints(1)], keepdims=1)


def _ascending_positions(e: NodeEmitter, marks: str, position: str) -> str:
    """Return the positions [1,S] int64 that are marked [B,S] bool, ascending, as [B,S] int32 with -1 behind them."""
    one = e.ints(1)
    count = _running_count(e, marks)
    from_end = e.op("Sub", [e.op("Sub", [e.dim(marks, 1), one]), e.op("Sub", [position, count])])
    # Marked tokens fill the row from its start, the others from its end: every place is written once.
    place = e.op("Where", [marks, e.op("Sub", [count, one]), from_end])
    source = e.op("Where", [marks, e.op("Cast", [position], to=_INT32), e.const(-1, "int32")])
    return e.op("ScatterElements", [source, place, source], axis=1)
