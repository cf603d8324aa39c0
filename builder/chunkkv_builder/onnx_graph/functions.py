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
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.onnx_graph import ranked, threshold
from chunkkv_builder.onnx_graph import scores as score_bodies
from chunkkv_builder.onnx_graph.budgets import kept_tokens
from chunkkv_builder.onnx_graph.emitter import NodeEmitter

DOMAIN = "chunkkv"
DOMAIN_VERSION = 1
SELECT = "ChunkKVSelect"
COMPACT = "ChunkKVCompact"
SCORE = "ChunkKVScore"
# Settings that a node names only where they are different, and their values in version 1 of the method.
_VERSION_1 = {"window_reduce": "mean", "head_reduce": "mean", "value_norm": "off", "heads": "shared"}
PLUGIN_VERSION = "1"
PLUGIN_NAMESPACE = "chunkkv"


def plugin_attributes() -> dict[str, Any]:
    """Return the attributes by which TensorRT's parser finds the plugin of a ChunkKV node."""
    return {"plugin_version": PLUGIN_VERSION, "plugin_namespace": PLUGIN_NAMESPACE}


def select_name(head_class: str, kv_heads: int) -> str:
    """Return the operator that chooses for `kv_heads` heads of a class; its function has a body of its own."""
    return SELECT if head_class == ALL_HEADS else f"{SELECT}_{head_class}_{kv_heads}"


def is_select(operator: str) -> bool:
    """Return whether an operator chooses tokens; the plugin ChunkKVSelect does what each of them does."""
    return operator.partition("_")[0] == SELECT


def select_attributes(
    settings: ChunkKVSettings, request_window: bool = False, head_class: str = ALL_HEADS
) -> dict[str, Any]:
    """Return the attributes of a ChunkKVSelect node that a plugin takes: its settings, and the plugin's own name.

    Those of _VERSION_1 are left out where they have that value; `request_window` is there where the node has an input
    `window`, and what N of a class of heads follows from where the node chooses for one.
    """
    of_class = {
        "head_class": head_class,
        "all_heads": settings.num_kv_heads * len(settings.reading_heads),
        "all_reading_heads": sum(map(len, settings.reading_heads)),
        "reading_share_per_10k": settings.reading_share_per_10k,
    }
    return {
        "window": settings.window,
        "chunk_size": settings.chunk_size,
        "sinks": settings.sinks,
        "boundaries": settings.boundaries,
        "pooling": settings.pooling,
        "score": settings.score,
        "min_tokens": settings.min_tokens,
        **{name: getattr(settings, name) for name, word in _VERSION_1.items() if getattr(settings, name) != word},
        **({"request_window": 1} if "window" in select_inputs(settings, request_window) else {}),
        **(of_class if head_class != ALL_HEADS else {}),
        **plugin_attributes(),
    }


def compact_attributes(settings: ChunkKVSettings) -> dict[str, Any]:
    """Return the attributes of a ChunkKVCompact node that a plugin takes."""
    return {**({} if settings.heads == "shared" else {"heads": settings.heads}), **plugin_attributes()}


def select_inputs(settings: ChunkKVSettings, request_window: bool = False) -> list[str]:
    """Return the inputs of ChunkKVSelect and ChunkKVScore; some exist only where the settings need them.

    query [B,Hq,W,D] and key [B,Hkv,S,D] in the cache's type, or scores [B,S] float32 ([B,Hkv,S] where each head has its
    own choice) for score "given"; lengths, keep_per_10k, budget_tokens [B] int32 (budget 0 = ratio mode); is_delimiter
    [B,S] int32 (0 or 1: TensorRT takes no bool into a plugin); window [B] int32 with `request_window`; value
    [B,Hkv,S,D]. Without `request_window` all W queries score.
    """
    names = ["scores"] if settings.score == "given" else ["query", "key"]
    names += ["lengths", "keep_per_10k", "budget_tokens"]
    names += ["is_delimiter"] if settings.boundaries == "delimiter" else []
    names += ["window"] if request_window and settings.score != "given" else []
    return names + (["value"] if settings.value_norm == "on" else [])


def select_function(
    settings: ChunkKVSettings,
    heads: int,
    kv_heads: int,
    opset: int,
    *,
    sorting: bool = True,
    request_window: bool = False,
    head_class: str = ALL_HEADS,
    name: str = SELECT,
) -> onnx.FunctionProto:
    """Return ChunkKVSelect for `settings` and Hq, Hkv heads.

    Outputs kept_indices [B,max N] int32 (-1 pads), kept_lengths [B] int32, token_scores [B,S] float32; with heads
    "each" kept_indices [B,Hkv,max N] and token_scores [B,Hkv,S].

    Parameters
    ----------
    sorting : bool, default True
        True ranks tokens with TopK and sums chunks with ScatterElements in float64, which is fastest on ONNX Runtime.
        False searches a threshold instead (threshold.py): only operators that TensorRT takes, and kept_indices is as
        long as S. Both keep the same tokens.
    request_window : bool, default False
        Whether the node has an input `window`: how many of the W queries of each row score.
    head_class : {"all", "reading", "local"}, default "all"
        Which class of heads chooses; it decides how many tokens stay.
    name : str, default SELECT
        Name of the function; a graph that chooses for several classes or numbers of heads needs several.
    """
    e = _function_emitter(name)
    row = _row(e, settings, head_class, sorting)
    scores = _token_scores(e, settings, score_bodies.HeadCounts(heads, kv_heads), row, sorting, request_window)
    e.op("Cast", [e.op("Squeeze", [row.kept, e.ints(1)])], ["kept_lengths"], to=onnx.TensorProto.INT32)
    starts = sorted_starts if sorting else threshold.segment_starts
    start = _chunk_starts(e, settings, row.position, starts)
    if settings.heads == "each":
        each = e.op("Shape", [scores], end=2)
        row, start = _row_per_head(e, row, each), _per_head(e, start, each)
        flat = e.op("Reshape", [scores, e.op("Concat", [e.ints(-1), e.dim(scores, 2)], axis=0)])
    else:
        flat = scores
    flat = score_bodies.pooled(e, settings, flat, row.before_window)
    if sorting:
        kept_indices = _ascending_top(e, _rank_values(e, settings, flat, row, start), row.kept)
    else:
        kept_indices = threshold.kept_indices(e, settings, row, flat, start)
    if settings.heads == "each":
        kept_indices = e.op("Reshape", [kept_indices, e.op("Concat", [each, e.dim(kept_indices, 1)], axis=0)])
        flat = e.op("Reshape", [flat, e.op("Shape", [scores])])
    e.op("Identity", [kept_indices], ["kept_indices"])
    e.op("Identity", [flat], ["token_scores"])
    outputs = ["kept_indices", "kept_lengths", "token_scores"]
    return _function(name, select_inputs(settings, request_window), outputs, e, opset)


def score_function(
    settings: ChunkKVSettings, heads: int, kv_heads: int, opset: int, *, request_window: bool = False
) -> onnx.FunctionProto:
    """Return ChunkKVScore, by which a layer or a KV head takes part in one ranking of all of them (ranked.py).

    Outputs rank_values [B,S] float64 and token_scores [B,S] float32. The inputs are those of ChunkKVSelect.
    """
    e, settings = _function_emitter(SCORE), settings.of_one_part()
    row = _row(e, settings, ALL_HEADS, True)
    raw = _token_scores(e, settings, score_bodies.HeadCounts(heads, kv_heads), row, True, request_window)
    scores = score_bodies.pooled(e, settings, raw, row.before_window)
    start = _chunk_starts(e, settings, row.position, sorted_starts)
    e.op("Identity", [scores], ["token_scores"])
    least = e.op("Min", [row.length, e.const(settings.layer_floor, "int64")])
    values = _rank_values(e, settings, scores, row, start)
    e.op("Identity", [ranked.with_floor(e, values, least)], ["rank_values"])
    return _function(SCORE, select_inputs(settings, request_window), ["rank_values", "token_scores"], e, opset)


def _function(name: str, inputs: list[str], outputs: list[str], e: NodeEmitter, opset: int) -> onnx.FunctionProto:
    return helper.make_function(DOMAIN, name, inputs, outputs, e.nodes, [helper.make_opsetid("", opset)])


def _row(e: NodeEmitter, settings: ChunkKVSettings, head_class: str, sorting: bool) -> threshold.Row:
    """Emit what is known of every row.

    The number of tokens is read from an input that all layers share, where there is one: ONNX Runtime then computes
    positions and chunks once for all layers.
    """
    length = e.op("Unsqueeze", [e.op("Cast", ["lengths"], to=onnx.TensorProto.INT64), e.ints(1)])
    given = settings.score == "given"
    if sorting and settings.boundaries == "delimiter":
        tokens = e.dim("is_delimiter", 1)
    else:
        tokens = e.op("Shape", ["scores"], start=-1) if given else e.dim("key", 2)
    position = positions(e, e.op("Squeeze", [tokens]))
    ranked_end = e.op("Sub", [length, e.const(settings.window, "int64")])
    before_window = e.op("Less", [position, ranked_end])
    return threshold.Row(length, position, before_window, kept_tokens(e, settings, length, head_class))


def _per_head(e: NodeEmitter, values: str, each: str) -> str:
    """Return [B or 1,K] once for each KV head, as [B*Hkv,K]; `each` holds B and Hkv."""
    width = e.dim(values, 1)
    wide = e.op("Expand", [e.op("Unsqueeze", [values, e.ints(1)]), e.op("Concat", [each, width], axis=0)])
    return e.op("Reshape", [wide, e.op("Concat", [e.ints(-1), width], axis=0)])


def _row_per_head(e: NodeEmitter, row: threshold.Row, each: str) -> threshold.Row:
    """Return rows that stand for one KV head each: with heads "each" a head chooses as a row does."""
    length, before_window, kept = (_per_head(e, x, each) for x in (row.length, row.before_window, row.kept))
    return threshold.Row(length, row.position, before_window, kept)


def _token_scores(
    e: NodeEmitter,
    settings: ChunkKVSettings,
    counts: score_bodies.HeadCounts,
    row: threshold.Row,
    sorting: bool,
    request_window: bool,
) -> str:
    """Return the scores before pooling, [B,S] or [B,Hkv,S]."""
    if settings.score == "given":
        return "scores"
    observed = score_bodies.observed_queries(e, settings) if request_window else None
    query = score_bodies.window_queries(e, settings, "query", "key", observed)
    attended = score_bodies.Attended(query, "key", "value")

    def masked(logits: str, heads: int) -> str:
        if sorting:
            return score_bodies.WindowMask(e, settings, row.length, row.position)(logits, heads)
        return threshold.masked(e, settings, logits, row.length, row.position)

    return score_bodies.raw_scores(e, settings, counts, attended, masked, observed)


def _function_emitter(function: str) -> NodeEmitter:
    """Return an emitter of names that occur in no graph and in no other function.

    ONNX gives every function a scope of its own, but TensorRT's parser takes constants of one name for the same.
    """
    return NodeEmitter(f"{function}/")


def positions(e: NodeEmitter, count: str) -> str:
    """Return 0 … count-1 as [1, count] int64."""
    steps = e.op("Range", [e.const(0, "int64"), count, e.const(1, "int64")])
    return e.op("Unsqueeze", [steps, e.ints(0)])


def take_rows(e: NodeEmitter, source: str, index: str) -> str:
    """Return source[b,h,index[b,h,k]] for source [B,H,S,D] and index [B,1 or H,K]: one copy of whole rows."""
    batch, heads, size, width = (e.dim(source, axis) for axis in range(4))
    row_count = e.op("Squeeze", [e.op("Mul", [batch, heads])])
    first = e.op("Mul", [positions(e, row_count), size])
    first = e.op("Reshape", [first, e.op("Concat", [batch, heads, e.ints(1)], axis=0)])
    flat = e.op("Reshape", [source, e.op("Concat", [e.ints(-1), width], axis=0)])
    return e.op("Gather", [flat, e.op("Add", [first, index])], axis=0)


def _rank_values(e: NodeEmitter, settings: ChunkKVSettings, scores: str, row: threshold.Row, start: str) -> str:
    """Return per token [R,S] its chunk's mean score, +inf for tokens that always stay, -inf for padding.

    NaN is the lowest of all means, and above padding: all are finite float64 numbers.
    """
    after_sinks = e.op("GreaterOrEqual", [row.position, e.const(settings.sinks, "int64")])
    ranked_tokens = e.op("And", [after_sinks, row.before_window])
    start = e.op("Where", [ranked_tokens, start, e.const(0, "int64")])  # outside the ranking nothing is read back
    mean = e.op("GatherElements", [_chunk_means(e, scores, start, ranked_tokens), start], axis=1)
    largest = np.finfo(np.float64).max
    bounds = e.scalar(-largest / 2, "float64"), e.scalar(largest, "float64")
    bounded = e.op("Min", [e.op("Max", [mean, bounds[0]]), bounds[1]])
    mean = e.op("Where", [e.op("IsNaN", [mean]), e.scalar(-largest, "float64"), bounded])
    untouched = e.op("Equal", [row.kept, row.length])
    always = e.op("Or", [e.op("Not", [ranked_tokens]), untouched])
    value = e.op("Where", [always, e.scalar(np.inf, "float64"), mean])
    return e.op("Where", [e.op("Less", [row.position, row.length]), value, e.scalar(-np.inf, "float64")])


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


def sorted_starts(e: NodeEmitter, starts: str, position: str) -> str:
    """Return for every token the position where its segment starts, [B,S] int64, from marks [B,S] bool."""
    marks = e.op("Cast", [starts], to=onnx.TensorProto.INT64)
    number = e.op("CumSum", [marks, e.const(1, "int64")])
    number = e.op("Sub", [number, e.const(1, "int64")])  # the first token starts segment 0
    here = e.op("Mul", [position, marks])
    zeros = helper.make_tensor("zero", onnx.TensorProto.INT64, [1], [0])
    blank = e.op("ConstantOfShape", [e.op("Shape", [marks])], value=zeros)
    table = e.op("ScatterElements", [blank, number, here], axis=1, reduction="add")
    return e.op("GatherElements", [table, number], axis=1)


def _ascending_top(e: NodeEmitter, rank_value: str, kept: str) -> str:
    """Return the N best tokens of each row in ascending order, [R,max N] int32, -1 behind them (section 4)."""
    most = e.op("Reshape", [e.op("ReduceMax", [kept], keepdims=0), e.ints(1)])
    e.op("TopK", [rank_value, most], ["top_values", "top_indices"], axis=1, largest=1, sorted=1)
    rank = positions(e, e.op("Squeeze", [most]))
    missing = e.const(np.iinfo(np.int32).max, "int32")
    index = e.op("Cast", ["top_indices"], to=onnx.TensorProto.INT32)
    index = e.op("Where", [e.op("Less", [rank, kept]), index, missing])
    e.op("TopK", [index, most], ["sorted_indices", "sorted_places"], axis=1, largest=0, sorted=1)
    is_padding = e.op("Equal", ["sorted_indices", missing])
    return e.op("Where", [is_padding, e.const(-1, "int32"), "sorted_indices"])


def compact_function(opset: int, heads: str = "shared", sorting: bool = True) -> onnx.FunctionProto:
    """Return ChunkKVCompact: x [B,Hkv,S,D], kept_indices [B,K] int32 -> [B,Hkv,K,D], rows copied bit for bit.

    With `heads` "each" kept_indices is [B,Hkv,K], or [B,1,K] for heads that keep the same. Where an index is -1 the
    row's first token is copied: those slots lie behind kept_lengths and are never read. `sorting` is that of
    select_function: with it, fewer nodes do the same in operators of the engine that takes them.
    """
    e = _function_emitter(COMPACT)
    index = e.op("Max", [e.op("Cast", ["kept_indices"], to=onnx.TensorProto.INT64), e.const(0, "int64")])
    if sorting:
        index = e.op("Unsqueeze", [index, e.ints(1, -1) if heads == "shared" else e.ints(-1)])  # [B,1 or Hkv,K,1]
        of_heads = e.op("Concat", [e.ints(1), e.dim("x", 1), e.ints(1, 1)], axis=0)
        e.op("GatherND", ["x", e.op("Expand", [index, of_heads])], ["y"], batch_dims=2)
    else:
        index = e.op("Unsqueeze", [index, e.ints(1)]) if heads == "shared" else index
        e.op("Identity", [take_rows(e, "x", index)], ["y"])
    return _function(COMPACT, ["x", "kept_indices"], ["y"], e, opset)
