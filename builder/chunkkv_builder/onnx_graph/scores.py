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


def raw_scores(
    e: NodeEmitter,
    settings: ChunkKVSettings,
    counts: HeadCounts,
    masked: Callable[[str], str],
    observed: Observed | None,
) -> str:
    """Return what the window's queries give each token: [B,S], or [B,Hkv,S] where each KV head has its own choice.

    Shapes are constants but for B and S, so that an engine sees that logits can be masked in place. A column of the
    product depends on its own key alone: the padding needs no care before it is masked. `masked` emits the mask.
    Without `observed` all queries score.
    """
    grouped = e.ints(0, counts.kv, counts.group * settings.window, 0)
    query, key = (e.op("Cast", [name], to=_FLOAT) for name in ("query", "key"))
    if observed is not None:  # what another query holds is never read, whatever it is
        query = e.op("Where", [e.op("Unsqueeze", [observed.rows, e.ints(1, 3)]), query, e.scalar(0.0)])
    transposed = e.op("Transpose", [key], perm=[0, 1, 3, 2])
    if settings.score == "logits":
        query = e.op("ReduceSum", [e.op("Reshape", [query, grouped]), e.ints(2)], keepdims=1)
        axes = e.ints(2) if settings.heads == "each" else e.ints(1, 2)
        return e.op("ReduceSum", [e.op("MatMul", [query, transposed]), axes], keepdims=0)
    if settings.score != "softmax":
        raise ConfigError(f"score is {settings.score!r}, which the ONNX functions lack: give softmax, logits or given")
    root = e.op("Sqrt", [e.op("Cast", [e.op("Squeeze", [e.dim("key", 3)])], to=_FLOAT)])
    logits = e.op("MatMul", [e.op("Reshape", [e.op("Div", [query, root]), grouped]), transposed])
    logits = e.op("Reshape", [logits, e.ints(0, counts.query, settings.window, 0)])
    return _reduced(e, settings, counts, e.op("Softmax", [masked(logits)], axis=-1), observed)


def _reduced(
    e: NodeEmitter, settings: ChunkKVSettings, counts: HeadCounts, weights: str, observed: Observed | None
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
        value = e.op("Cast", ["value"], to=_FLOAT)
        scores = e.op("Mul", [scores, e.op("ReduceL2", [value, e.ints(3)], keepdims=0)])
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
