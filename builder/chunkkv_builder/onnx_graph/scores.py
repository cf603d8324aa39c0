"""Section 2 of docs/method.md in ONNX operators: the score of a token, before and after pooling."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import onnx

from chunkkv.errors import ConfigError
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.onnx_graph.emitter import NodeEmitter

_FLOAT, _INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64


class HeadCounts(NamedTuple):
    """Query heads and KV heads of a body."""

    query: int
    kv: int

    @property
    def group(self) -> int:
        """Query heads of each KV head."""
        return self.query // self.kv


class Attended(NamedTuple):
    """Names of a part's queries as `window_queries` gives them, and of its keys and values [B,Hkv,S,D]."""

    query: str
    key: str
    value: str


class Observed(NamedTuple):
    """Names of which of the W queries score, [B,W] bool, and of how many they are, [B] float32."""

    rows: str
    number: str


def observed_queries(e: NodeEmitter, settings: ChunkKVSettings) -> Observed:
    """Emit what the body's input window [B] int32 means: the last w of the W queries score."""
    first = e.op("Sub", [e.const(settings.window, "int64"), e.op("Cast", ["window"], to=_INT64)])
    place = e.const(np.arange(settings.window)[None], "int64")
    rows = e.op("GreaterOrEqual", [place, e.op("Unsqueeze", [first, e.ints(1)])])
    return Observed(rows, e.op("Cast", ["window"], to=_FLOAT))


class WindowMask:
    """Hides from each query of the window the tokens that it may not see, whatever stood there.

    Only columns from the shortest row's window on are touched, and written back into the same tensor: engines do that
    in place, while a mask over all columns costs a pass through memory. What no layer changes is emitted once.

    Parameters
    ----------
    e : NodeEmitter
        Gets the nodes.
    settings : ChunkKVSettings
        They name the window.
    length, position : str
        Lengths of the rows [B,1] and positions [1,S], int64.
    """

    def __init__(self, e: NodeEmitter, settings: ChunkKVSettings, length: str, position: str) -> None:
        self._e, self._last = e, e.ints(np.iinfo(np.int64).max)
        first = e.op("Sub", [e.op("ReduceMin", [length], keepdims=0), e.const(settings.window, "int64")])
        self._first = e.op("Reshape", [e.op("Max", [first, e.const(0, "int64")]), e.ints(1)])
        columns = e.op("Slice", [position, self._first, self._last, e.ints(1)])
        window = e.const(np.arange(1 - settings.window, 1, dtype=np.int64).reshape(1, 1, -1, 1), "int64")
        last_seen = e.op("Add", [e.op("Reshape", [length, e.ints(-1, 1, 1, 1)]), window])
        self._visible = e.op("Less", [e.op("Unsqueeze", [columns, e.ints(1, 2)]), last_seen])
        self._places = e.op("Unsqueeze", [e.op("Cast", [columns], to=onnx.TensorProto.INT32), e.ints(1, 2)])
        self._of_heads: dict[int, str] = {}

    def __call__(self, logits: str, heads: int) -> str:
        """Return logits [B,heads,w,S] with -inf where window query i may not see token t."""
        e = self._e
        tail = e.op("Slice", [logits, self._first, self._last, e.ints(3)])
        if heads not in self._of_heads:
            self._of_heads[heads] = e.op("Expand", [self._places, e.op("Shape", [tail])])
        masked = e.op("Where", [self._visible, tail, e.scalar(-np.inf)])
        return e.op("ScatterElements", [logits, self._of_heads[heads], masked], axis=3)


def window_queries(e: NodeEmitter, settings: ChunkKVSettings, query: str, key: str, observed: Observed | None) -> str:
    """Return the queries [B,Hq,W,D] as `raw_scores` takes them, float32; `key` [B,Hkv,S,D] says D.

    Without `observed` all queries score.
    """
    query = e.op("Cast", [query], to=_FLOAT)
    if observed is not None:  # what another query holds is never read, whatever it is
        query = e.op("Where", [e.op("Unsqueeze", [observed.rows, e.ints(1, 3)]), query, e.scalar(0.0)])
    if settings.score == "logits":
        return query
    if settings.score != "softmax":
        raise ConfigError(f"score is {settings.score!r}, which the ONNX functions lack: give softmax, logits or given")
    return e.op("Div", [query, e.op("Sqrt", [e.op("Cast", [e.op("Squeeze", [e.dim(key, 3)])], to=_FLOAT)])])


def raw_scores(
    e: NodeEmitter,
    settings: ChunkKVSettings,
    counts: HeadCounts,
    attended: Attended,
    masked: Callable[[str, int], str],
    observed: Observed | None,
) -> str:
    """Return what the window's queries give each token: [B,S], or [B,Hkv,S] where each KV head has its own choice.

    Shapes are constants but for B and S, so that an engine sees that logits can be masked in place. A column of the
    product depends on its own key alone: the padding needs no care before it is masked. `masked` emits the mask of
    logits of a number of heads. Without `observed` all queries score.
    """
    grouped = e.op("Reshape", [attended.query, e.ints(0, counts.kv, counts.group * settings.window, 0)])
    transposed = e.op("Transpose", [e.op("Cast", [attended.key], to=_FLOAT)], perm=[0, 1, 3, 2])
    if settings.score == "logits":
        total = e.op("ReduceSum", [grouped, e.ints(2)], keepdims=1)
        axes = e.ints(2) if settings.heads == "each" else e.ints(1, 2)
        return e.op("ReduceSum", [e.op("MatMul", [total, transposed]), axes], keepdims=0)
    logits = e.op("MatMul", [grouped, transposed])
    logits = e.op("Reshape", [logits, e.ints(0, counts.query, settings.window, 0)])
    weights = e.op("Softmax", [masked(logits, counts.query)], axis=-1)
    return _reduced(e, settings, counts, weights, attended.value, observed)


def _reduced(
    e: NodeEmitter, settings: ChunkKVSettings, counts: HeadCounts, weights: str, value: str, observed: Observed | None
) -> str:
    """Return scores [B,S] or [B,Hkv,S] from attention weights [B,Hq,W,S].

    All query heads of a KV head share its values, so their scores are reduced before the values' norm multiplies them.
    """
    if settings.window_reduce == "max":
        if observed is not None:
            rows = e.op("Unsqueeze", [e.op("Cast", [observed.rows], to=_FLOAT), e.ints(1, 3)])
            weights = e.op("Mul", [weights, rows])
        of_head = e.op("ReduceMax", [weights, e.ints(2)], keepdims=1)
        scores = _of_groups(e, settings, counts, of_head)
    elif settings.head_reduce == "max":
        scores = _of_groups(e, settings, counts, _mean_of_queries(e, settings, weights, 1, 2, observed))
    elif settings.heads == "shared" and settings.value_norm == "off":
        shape = e.op("Concat", [e.ints(0, counts.query * settings.window), e.dim(weights, 3)], axis=0)
        rows = e.op("Reshape", [weights, shape])
        return e.op("Squeeze", [_mean_of_queries(e, settings, rows, counts.query, 1, observed), e.ints(1)])
    else:
        rows = e.op("Reshape", [weights, e.ints(0, counts.kv, counts.group * settings.window, 0)])
        scores = e.op("Squeeze", [_mean_of_queries(e, settings, rows, counts.group, 2, observed), e.ints(2)])
    if settings.value_norm == "on":
        norms = e.op("ReduceL2", [e.op("Cast", [value], to=_FLOAT), e.ints(3)], keepdims=0)
        scores = e.op("Mul", [scores, norms])
    if settings.heads == "each":
        return scores
    return e.op("ReduceMax" if settings.head_reduce == "max" else "ReduceMean", [scores, e.ints(1)], keepdims=0)


def _of_groups(e: NodeEmitter, settings: ChunkKVSettings, counts: HeadCounts, of_head: str) -> str:
    """Return [B,Hkv,S] from scores of the query heads [B,Hq,1,S]."""
    rows = e.op("Reshape", [of_head, e.ints(0, counts.kv, counts.group, 0)])
    return e.op("ReduceMax" if settings.head_reduce == "max" else "ReduceMean", [rows, e.ints(2)], keepdims=0)


def _mean_of_queries(
    e: NodeEmitter, settings: ChunkKVSettings, weights: str, heads: int, axis: int, observed: Observed | None
) -> str:
    """Return the mean over the queries that score: axis `axis` of weights, heads * W long, becomes 1 long.

    A product with ones is several times faster than ReduceMean.
    """
    rows = heads * settings.window
    if observed is None:
        total = e.op("MatMul", [e.const(np.ones((1, rows)), "float32"), weights])
        return e.op("Div", [total, e.scalar(float(rows))])
    inner = list(range(1, axis + 1))
    ones = e.op("Tile", [e.op("Cast", [observed.rows], to=_FLOAT), e.ints(1, heads)])
    total = e.op("MatMul", [e.op("Unsqueeze", [ones, e.ints(*inner)]), weights])
    count = e.op("Mul", [observed.number, e.scalar(float(heads))])
    return e.op("Div", [total, e.op("Unsqueeze", [count, e.ints(*inner, axis + 1)])])


def pooled(e: NodeEmitter, settings: ChunkKVSettings, raw: str, before_window: str) -> str:
    """a[t] of section 2, [R,S]: the raw scores [R,S], pooled; zero from the window on."""
    scores = e.op("Where", [before_window, raw, e.scalar(0.0)])
    if settings.pooling > 1:
        half = settings.pooling // 2
        rows = e.op("Unsqueeze", [scores, e.ints(1)])
        smooth = e.op("AveragePool", [rows], kernel_shape=[settings.pooling], pads=[half, half], count_include_pad=1)
        # Pooled and unpooled rows have one length, but TensorRT cannot see that from the formula of a pooled length.
        smooth = e.op("Reshape", [smooth, e.op("Shape", [scores])])
        scores = e.op("Where", [before_window, smooth, e.scalar(0.0)])
    return scores
