"""ChunkKV as ONNX model-local functions made of standard operators only.

`chunkkv::ChunkKVSelect` is sections 1 to 4 of docs/method.md, `chunkkv::ChunkKVCompact` is section 5.
An engine that registers an operator or plugin of the same name takes that one; every other engine inlines these bodies.
The settings are constants of the body and are repeated as attributes on the nodes, where plugins read them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper

from chunkkv.cache_layout import ALL_HEADS
from chunkkv.errors import ConfigError
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.onnx_graph import threshold
from chunkkv_builder.onnx_graph.budgets import kept_tokens
from chunkkv_builder.onnx_graph.emitter import NodeEmitter

DOMAIN = "chunkkv"
DOMAIN_VERSION = 1
SELECT = "ChunkKVSelect"
COMPACT = "ChunkKVCompact"
PLUGIN_VERSION = "1"
PLUGIN_NAMESPACE = "chunkkv"


def plugin_attributes() -> dict[str, Any]:
    """Return the attributes by which TensorRT's parser finds the plugin of a ChunkKV node."""
    return {"plugin_version": PLUGIN_VERSION, "plugin_namespace": PLUGIN_NAMESPACE}


def select_attributes(settings: ChunkKVSettings) -> dict[str, Any]:
    """Return the attributes of a ChunkKVSelect node that a plugin takes: its settings, and the plugin's own name."""
    return {
        "window": settings.window,
        "chunk_size": settings.chunk_size,
        "sinks": settings.sinks,
        "boundaries": settings.boundaries,
        "pooling": settings.pooling,
        "score": settings.score,
        "min_tokens": settings.min_tokens,
        **plugin_attributes(),
    }


def select_inputs(settings: ChunkKVSettings) -> list[str]:
    """Return the inputs of ChunkKVSelect; the delimiter flags exist only where boundaries need them.

    query [B,Hq,w,D], key [B,Hkv,S,D], lengths [B], keep_per_10k [B], budget_tokens [B] int32 (0 = ratio mode),
    is_delimiter [B,S] int32 (0 or 1: TensorRT takes no bool into a plugin). query and key have the cache's type.
    """
    names = ["query", "key", "lengths", "keep_per_10k", "budget_tokens"]
    return names + (["is_delimiter"] if settings.boundaries == "delimiter" else [])


def select_function(
    settings: ChunkKVSettings,
    heads: int,
    kv_heads: int,
    opset: int,
    *,
    sorting: bool = True,
    head_class: str = ALL_HEADS,
    name: str = SELECT,
) -> onnx.FunctionProto:
    """Return ChunkKVSelect for `settings` and Hq, Hkv heads.

    Outputs kept_indices [B,max N] int32 (-1 pads), kept_lengths [B] int32, token_scores [B,S] float32.

    Parameters
    ----------
    sorting : bool, default True
        True ranks tokens with TopK and sums chunks with ScatterElements in float64, which is fastest on ONNX Runtime.
        False searches a threshold instead (threshold.py): only operators that TensorRT takes, and kept_indices is
        [B,S]. Both keep the same tokens.
    head_class : {"all", "reading", "local"}, default "all"
        Which class of heads chooses; it decides how many tokens stay.
    name : str, default SELECT
        Name of the function; a graph that chooses for several classes or numbers of heads needs several.
    """
    e = _function_emitter(name)
    length = e.op("Unsqueeze", [e.op("Cast", ["lengths"], to=onnx.TensorProto.INT64), e.ints(1)])
    position = _positions(e, e.op("Squeeze", [e.dim("key", 2)]))
    ranked_end = e.op("Sub", [length, e.const(settings.window, "int64")])
    before_window = e.op("Less", [position, ranked_end])
    mask = _masked if sorting else threshold.masked
    raw_scores = _raw_scores(e, settings, (heads, kv_heads), lambda logits: mask(e, settings, logits, length, position))
    scores = _pooled_scores(e, settings, raw_scores, before_window)
    e.op("Identity", [scores], ["token_scores"])
    kept = kept_tokens(e, settings, length, head_class)
    e.op("Cast", [e.op("Squeeze", [kept, e.ints(1)])], ["kept_lengths"], to=onnx.TensorProto.INT32)
    if sorting:
        rank_value = _rank_values(e, settings, scores, length, position, before_window, kept)
        _ascending_top(e, rank_value, kept)
    else:
        start = _chunk_starts(e, settings, position, threshold.segment_starts)
        threshold.write_kept_indices(e, settings, threshold.Row(length, position, before_window, kept), scores, start)
    return helper.make_function(
        DOMAIN,
        name,
        select_inputs(settings),
        ["kept_indices", "kept_lengths", "token_scores"],
        e.nodes,
        [helper.make_opsetid("", opset)],
    )


def _function_emitter(function: str) -> NodeEmitter:
    """Return an emitter of names that occur in no graph and in no other function.

    ONNX gives every function a scope of its own, but TensorRT's parser takes constants of one name for the same.
    """
    return NodeEmitter(f"{function}/")


def _positions(e: NodeEmitter, count: str) -> str:
    """Return 0 … count-1 as [1, count] int64."""
    steps = e.op("Range", [e.const(0, "int64"), count, e.const(1, "int64")])
    return e.op("Unsqueeze", [steps, e.ints(0)])


def _raw_scores(
    e: NodeEmitter, settings: ChunkKVSettings, counts: tuple[int, int], masked: Callable[[str], str]
) -> str:
    """Return what the window's queries give each token, [B,S]: mean (softmax) or sum (logits) over heads and window.

    Shapes are constants but for B and S, so that an engine sees that logits can be masked in place. A column of the
    product depends on its own key alone: the padding needs no care before it is masked. `masked` emits the mask.
    """
    heads, kv_heads = counts
    grouped = e.ints(0, kv_heads, heads // kv_heads * settings.window, 0)
    query, key = (e.op("Cast", [name], to=onnx.TensorProto.FLOAT) for name in ("query", "key"))
    transposed = e.op("Transpose", [key], perm=[0, 1, 3, 2])
    if settings.score == "logits":
        query = e.op("ReduceSum", [e.op("Reshape", [query, grouped]), e.ints(2)], keepdims=1)
        return e.op("ReduceSum", [e.op("MatMul", [query, transposed]), e.ints(1, 2)], keepdims=0)
    if settings.score != "softmax":
        raise ConfigError(f"score is {settings.score!r}, which the ONNX functions lack: give softmax or logits")
    root = e.op("Sqrt", [e.op("Cast", [e.op("Squeeze", [e.dim("key", 3)])], to=onnx.TensorProto.FLOAT)])
    logits = e.op("MatMul", [e.op("Reshape", [e.op("Div", [query, root]), grouped]), transposed])
    logits = e.op("Reshape", [logits, e.ints(0, heads, settings.window, 0)])
    weights = e.op("Softmax", [masked(logits)], axis=-1)
    return _mean_of_rows(e, weights, heads * settings.window)


def _pooled_scores(e: NodeEmitter, settings: ChunkKVSettings, raw_scores: str, before_window: str) -> str:
    """a[t] of section 2 as [B,S]: the raw scores, pooled; zero from the window on."""
    scores = e.op("Where", [before_window, raw_scores, e.scalar(0.0)])
    if settings.pooling > 1:
        half = settings.pooling // 2
        rows = e.op("Unsqueeze", [scores, e.ints(1)])
        pooled = e.op("AveragePool", [rows], kernel_shape=[settings.pooling], pads=[half, half], count_include_pad=1)
        # Pooled and unpooled rows have one length, but TensorRT cannot see that from the formula of a pooled length.
        pooled = e.op("Reshape", [pooled, e.op("Shape", [scores])])
        scores = e.op("Where", [before_window, pooled, e.scalar(0.0)])
    return scores


def _mean_of_rows(e: NodeEmitter, weights: str, count: int) -> str:
    """Return the mean over axes 1 and 2 of [B,Hq,w,S]: a product with ones, several times faster than ReduceMean."""
    rows = e.op("Reshape", [weights, e.op("Concat", [e.ints(0, count), e.dim("key", 2)], axis=0)])
    total = e.op("MatMul", [e.const(np.ones((1, count)), "float32"), rows])
    return e.op("Div", [e.op("Squeeze", [total, e.ints(1)]), e.scalar(float(count))])


def take_rows(e: NodeEmitter, source: str, index: str) -> str:
    """Return source[b,h,index[b,k]] for source [B,H,S,D] and index [B,K]: one copy of whole rows."""
    batch, heads, size, width = (e.dim(source, axis) for axis in range(4))
    row_count = e.op("Squeeze", [e.op("Mul", [batch, heads])])
    first = e.op("Mul", [_positions(e, row_count), size])
    first = e.op("Reshape", [first, e.op("Concat", [batch, heads, e.ints(1)], axis=0)])
    rows = e.op("Add", [first, e.op("Unsqueeze", [index, e.ints(1)])])
    flat = e.op("Reshape", [source, e.op("Concat", [e.ints(-1), width], axis=0)])
    return e.op("Gather", [flat, rows], axis=0)


def _masked(e: NodeEmitter, settings: ChunkKVSettings, logits: str, length: str, position: str) -> str:
    """Return logits [B,Hq,w,S] with -inf where window query i may not see token t, whatever stood there.

    Only columns from the shortest row's window on are touched, and written back into the same tensor: engines do that
    in place, while a mask over all columns costs a pass through memory.
    """
    last = e.ints(np.iinfo(np.int64).max)
    first = e.op("Sub", [e.op("ReduceMin", [length], keepdims=0), e.const(settings.window, "int64")])
    first = e.op("Reshape", [e.op("Max", [first, e.const(0, "int64")]), e.ints(1)])
    columns = e.op("Slice", [position, first, last, e.ints(1)])
    tail = e.op("Slice", [logits, first, last, e.ints(3)])
    window = e.const(np.arange(1 - settings.window, 1, dtype=np.int64).reshape(1, 1, -1, 1), "int64")
    last_seen = e.op("Add", [e.op("Reshape", [length, e.ints(-1, 1, 1, 1)]), window])
    visible = e.op("Less", [e.op("Unsqueeze", [columns, e.ints(1, 2)]), last_seen])
    masked = e.op("Where", [visible, tail, e.scalar(-np.inf)])
    places = e.op("Unsqueeze", [e.op("Cast", [columns], to=onnx.TensorProto.INT32), e.ints(1, 2)])
    return e.op("ScatterElements", [logits, e.op("Expand", [places, e.op("Shape", [tail])]), masked], axis=3)


def _rank_values(
    e: NodeEmitter,
    settings: ChunkKVSettings,
    scores: str,
    length: str,
    position: str,
    before_window: str,
    kept: str,
) -> str:
    """Return per token [B,S] its chunk's mean score, +inf for tokens that always stay, -inf for padding and NaN."""
    start = _chunk_starts(e, settings, position, _segment_starts)
    after_sinks = e.op("GreaterOrEqual", [position, e.const(settings.sinks, "int64")])
    ranked = e.op("And", [after_sinks, before_window])
    start = e.op("Where", [ranked, start, e.const(0, "int64")])  # outside the ranking nothing is read back
    lowest, largest = e.scalar(-np.inf, "float64"), e.scalar(np.finfo(np.float64).max, "float64")
    mean = e.op("GatherElements", [_chunk_means(e, scores, start, ranked), start], axis=1)
    mean = e.op("Where", [e.op("IsNaN", [mean]), lowest, e.op("Min", [mean, largest])])
    untouched = e.op("Equal", [kept, length])
    always = e.op("Or", [e.op("Not", [ranked]), untouched])
    value = e.op("Where", [always, e.scalar(np.inf, "float64"), mean])
    return e.op("Where", [e.op("Less", [position, length]), value, lowest])


def _chunk_means(e: NodeEmitter, scores: str, start: str, ranked: str) -> str:
    """Return the mean score of every chunk where it starts, [B,S] float64; meaningless everywhere else.

    Sums of float32 scores are exact in float64, so equal scores give equal means whatever the chunk's size.
    """
    zeros = helper.make_tensor("zero", onnx.TensorProto.DOUBLE, [1], [0.0])
    blank = e.op("ConstantOfShape", [e.op("Shape", [scores])], value=zeros)
    wide = e.op("Cast", [scores], to=onnx.TensorProto.DOUBLE)
    exact = e.op("Where", [ranked, wide, e.scalar(0.0, "float64")])
    one_each = e.op("Cast", [ranked], to=onnx.TensorProto.DOUBLE)
    total, count = (
        e.op("ScatterElements", [blank, start, values], axis=1, reduction="add") for values in (exact, one_each)
    )
    return e.op("Div", [total, e.op("Max", [count, e.scalar(1.0, "float64")])])


def _chunk_starts(
    e: NodeEmitter, settings: ChunkKVSettings, position: str, segment_starts: Callable[[NodeEmitter, str, str], str]
) -> str:
    """Return for every token the position where its chunk starts, [1,S] or [B,S] int64 (section 3).

    `segment_starts(e, starts, position)` emits, for marks [B,S] bool of where segments start, each token's own.
    """
    size = e.const(settings.chunk_size, "int64")
    sinks = e.const(settings.sinks, "int64")
    if settings.boundaries == "fixed":
        segment = sinks
    else:
        segment = segment_starts(e, _segment_marks(e, position, sinks), position)
    offset = e.op("Sub", [position, segment])
    inside = e.op("Sub", [offset, e.op("Mod", [offset, size])])
    return e.op("Add", [segment, inside])


def _segment_marks(e: NodeEmitter, position: str, sinks: str) -> str:
    """Return where the ranked tokens start and which tokens follow a delimiter, [B,S] bool; the first token counts."""
    first = e.op("LessOrEqual", [position, sinks])
    flags = e.op("Cast", ["is_delimiter"], to=onnx.TensorProto.INT64)
    before = e.op("Max", [e.op("Sub", [e.op("Squeeze", [position, e.ints(0)]), e.ints(1)]), e.ints(0)])
    return e.op("Or", [e.op("Cast", [e.op("Gather", [flags, before], axis=1)], to=onnx.TensorProto.BOOL), first])


def _segment_starts(e: NodeEmitter, starts: str, position: str) -> str:
    """Return for every token the position where its segment starts, [B,S] int64, from marks [B,S] bool."""
    marks = e.op("Cast", [starts], to=onnx.TensorProto.INT64)
    number = e.op("CumSum", [marks, e.const(1, "int64")])
    number = e.op("Sub", [number, e.const(1, "int64")])  # the first token starts segment 0
    here = e.op("Mul", [position, marks])
    zeros = helper.make_tensor("zero", onnx.TensorProto.INT64, [1], [0])
    blank = e.op("ConstantOfShape", [e.op("Shape", [marks])], value=zeros)
    table = e.op("ScatterElements", [blank, number, here], axis=1, reduction="add")
    return e.op("GatherElements", [table, number], axis=1)


def _ascending_top(e: NodeEmitter, rank_value: str, kept: str) -> None:
    """Write kept_indices: the N best tokens of each row in ascending order, -1 behind them (section 4)."""
    most = e.op("Reshape", [e.op("ReduceMax", [kept], keepdims=0), e.ints(1)])
    e.op("TopK", [rank_value, most], ["top_values", "top_indices"], axis=1, largest=1, sorted=1)
    rank = _positions(e, e.op("Squeeze", [most]))
    missing = e.const(np.iinfo(np.int32).max, "int32")
    index = e.op("Cast", ["top_indices"], to=onnx.TensorProto.INT32)
    index = e.op("Where", [e.op("Less", [rank, kept]), index, missing])
    e.op("TopK", [index, most], ["sorted_indices", "sorted_places"], axis=1, largest=0, sorted=1)
    is_padding = e.op("Equal", ["sorted_indices", missing])
    e.op("Where", [is_padding, e.const(-1, "int32"), "sorted_indices"], ["kept_indices"])


def compact_function(opset: int) -> onnx.FunctionProto:
    """Return ChunkKVCompact: x [B,Hkv,S,D], kept_indices [B,K] int32 -> [B,Hkv,K,D], rows copied bit for bit.

    Where an index is -1 the row's first token is copied: those slots lie behind kept_lengths and are never read.
    """
    e = _function_emitter(COMPACT)
    index = e.op("Cast", ["kept_indices"], to=onnx.TensorProto.INT64)
    rows = take_rows(e, "x", e.op("Max", [index, e.const(0, "int64")]))
    e.op("Identity", [rows], ["y"])
    return helper.make_function(
        DOMAIN, COMPACT, ["x", "kept_indices"], ["y"], e.nodes, [helper.make_opsetid("", opset)]
    )
