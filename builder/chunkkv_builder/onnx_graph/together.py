"""Scores of all parts of a cache, so that one node chooses for all of them.

Most nodes of the op work on one number per token, and take an engine longer to start than to run. Only what is as large
as a window's attention is computed part by part: it stays in the processor's caches, and its memory is used again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from chunkkv.cache_scales import CacheScales
from chunkkv_builder.onnx_graph import functions
from chunkkv_builder.onnx_graph import scores as score_bodies
from chunkkv_builder.onnx_graph.emitter import GraphEmitter
from chunkkv_builder.plan import GraphPlan, PartPlan

_FLOAT, _INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64


def given_scores(e: GraphEmitter, plan: GraphPlan) -> dict[int, str]:
    """Declare the graph inputs scores.p for each part that scores; shapes are those of `raw_scores`."""
    assert plan.settings is not None
    each, made = plan.settings.of_one_part().heads == "each", {}
    for part in _scoring(plan):
        heads: list[int | str] = [len(part.kv_heads)] if each else []
        made[part.number] = e.input(f"scores.{part.number}", "float32", ["batch", *heads, "tokens"])
    return made


def raw_scores(
    e: GraphEmitter, plan: GraphPlan, caches: Sequence[Sequence[str]], scales: CacheScales | None
) -> dict[int, str]:
    """Return for each part that scores what its window's queries give each token, [B,S] or [B,H,S] before pooling.

    Declares the graph inputs window [B] int32 and query.p [B,g*H,W,D] float32 of each of these parts p, its last
    rotated queries.

    Parameters
    ----------
    e : GraphEmitter
        The graph that gets the nodes; it has the input lengths.
    plan : GraphPlan
        Model, settings and parts.
    caches : sequence of (str, str)
        Keys and values [B,H,S,D] of every part.
    scales : CacheScales or None
        What keys and values of 8 bits mean.
    """
    assert plan.settings is not None
    settings, group = plan.settings.of_one_part(), plan.model.num_heads // plan.model.num_kv_heads
    e.input("window", "int32", ["batch"])
    if not _scoring(plan):  # all parts keep recent tokens
        return {}
    length = e.op("Unsqueeze", [e.op("Cast", ["lengths"], to=_INT64), e.ints(1)])
    position = functions.positions(e, e.op("Squeeze", [e.dim(caches[0][0], 2)]))
    mask = score_bodies.WindowMask(e, settings, length, position)
    observed = score_bodies.observed_queries(e, settings)
    made = {}
    for number, query in _queries(e, plan, caches[0][0], scales, observed).items():
        kv_heads, (key, value) = len(plan.parts[number].kv_heads), caches[number]
        if scales is not None and settings.value_norm == "on":  # else values are not read
            floats = e.op("Cast", [value], to=_FLOAT)
            value = e.op("Mul", [floats, e.inline(f"value_scale.{number}", scales.values[number][None, :, None])])
        counts = score_bodies.HeadCounts(kv_heads * group, kv_heads)
        attended = score_bodies.Attended(query, key, value)
        made[number] = score_bodies.raw_scores(e, settings, counts, attended, mask, observed)
    return made


def _queries(
    e: GraphEmitter, plan: GraphPlan, key: str, scales: CacheScales | None, observed: score_bodies.Observed
) -> dict[int, str]:
    """Return the queries of each part as score_bodies.raw_scores takes them, prepared in one piece.

    Keys of 8 bits score as what they mean: their scales go into the queries, of which there are few.
    """
    assert plan.settings is not None
    group, window = plan.model.num_heads // plan.model.num_kv_heads, plan.settings.window
    heads = {part.number: len(part.kv_heads) * group for part in _scoring(plan)}
    shapes: dict[int, list[int | str]] = {
        n: ["batch", count, window, plan.model.head_dim] for n, count in heads.items()
    }
    inputs = [e.input(f"query.{number}", "float32", shape) for number, shape in shapes.items()]
    query = e.op("Concat", inputs, axis=1)
    if scales is not None:
        of_keys = np.concatenate([np.repeat(scales.keys[number], group, axis=0) for number in heads])  # [Hq,D]
        query = e.op("Mul", [query, e.inline("key_scales", of_keys[None, :, None])])
    query = score_bodies.window_queries(e, plan.settings, query, key, observed)
    names = [f"window_query.{number}" for number in heads]
    e.op("Split", [query, e.ints(*heads.values())], names, axis=1)
    return dict(zip(heads, names, strict=True))


def _scoring(plan: GraphPlan) -> list[PartPlan]:
    return [part for part in plan.parts if part.leads and part.scores]
