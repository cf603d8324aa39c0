"""N of docs/method.md, section 1, in ONNX operators: how many tokens stay, for each class of heads."""

from __future__ import annotations

import onnx

from chunkkv.cache_layout import ALL_HEADS, LOCAL
from chunkkv.limits import KEEP_SCALE
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.onnx_graph.emitter import NodeEmitter


def kept_tokens(e: NodeEmitter, settings: ChunkKVSettings, length: str, head_class: str = ALL_HEADS) -> str:
    """Return how many tokens a row keeps in the heads of `head_class`, [B,1] int64; ChunkKVSettings.class_lengths.

    Reads keep_per_10k and budget_tokens [B] int32 of the graph or function; `length` is [B,1] int64.
    """
    column = e.ints(1)
    ratio = e.op("Unsqueeze", [e.op("Cast", ["keep_per_10k"], to=onnx.TensorProto.INT64), column])
    budget = e.op("Unsqueeze", [e.op("Cast", ["budget_tokens"], to=onnx.TensorProto.INT64), column])
    has_budget = e.op("Greater", [budget, e.const(0, "int64")])
    least = e.const(settings.min_tokens, "int64")
    by_ratio = e.op("Div", [e.op("Mul", [length, ratio]), e.const(KEEP_SCALE, "int64")])
    requested = e.op("Where", [has_budget, budget, by_ratio])
    kept = e.op("Min", [length, e.op("Max", [requested, least])])
    heads = settings.num_kv_heads * len(settings.reading_heads)
    reading = sum(map(len, settings.reading_heads))
    local = heads - reading
    if head_class == ALL_HEADS or not reading or not local:
        return kept
    share = e.const(settings.reading_share_per_10k, "int64")
    by_ratio = e.op("Mul", [e.op("Mul", [length, ratio]), share])
    by_ratio = e.op("Div", [by_ratio, e.const(KEEP_SCALE**2, "int64")])
    by_budget = e.op("Div", [e.op("Mul", [budget, share]), e.const(KEEP_SCALE, "int64")])
    wanted = e.op("Where", [has_budget, by_budget, by_ratio])
    total = e.op("Mul", [kept, e.const(heads, "int64")])
    most = e.op("Sub", [total, e.const(local * settings.min_tokens, "int64")])
    most = e.op("Div", [most, e.const(reading, "int64")])
    of_class = e.op("Min", [length, e.op("Max", [least, e.op("Min", [wanted, most])])])
    if head_class == LOCAL:
        rest = e.op("Sub", [total, e.op("Mul", [of_class, e.const(reading, "int64")])])
        of_class = e.op("Min", [length, e.op("Div", [rest, e.const(local, "int64")])])
    return e.op("Where", [e.op("LessOrEqual", [length, least]), kept, of_class])


def recent_indices(e: NodeEmitter, settings: ChunkKVSettings, length: str, kept: str, count: str) -> str:
    """Return the sinks and the most recent tokens of each row, [B,count] int32 with -1 behind its `kept` [B,1].

    Policy "recent" of docs/method.md, section 4. `length` and `kept` are int64, `count` is a scalar of that type.
    """
    steps = e.op("Range", [e.const(0, "int64"), count, e.const(1, "int64")])
    slot = e.op("Unsqueeze", [steps, e.ints(0)])
    is_sink = e.op("Less", [slot, e.const(settings.sinks, "int64")])
    behind = e.op("Add", [slot, e.op("Sub", [length, kept])])
    position = e.op("Where", [e.op("Less", [slot, kept]), e.op("Where", [is_sink, slot, behind]), e.const(-1, "int64")])
    return e.op("Cast", [position], to=onnx.TensorProto.INT32)
