"""Plan to ONNX: the ChunkKV nodes of all layers, as a graph of their own and as pieces for other graphs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx

from chunkkv.cache_layout import ALL_HEADS, LOCAL, READING
from chunkkv.cache_scales import CacheScales
from chunkkv.errors import ConfigError
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.onnx_graph import functions, ranked, together
from chunkkv_builder.onnx_graph.budgets import kept_tokens, recent_indices
from chunkkv_builder.onnx_graph.emitter import GraphEmitter
from chunkkv_builder.onnx_graph.transformer import capacity_name
from chunkkv_builder.plan import GraphPlan, PartPlan

COMPRESS_OPSET = 23
_NOTHING = "this plan has no ChunkKV settings, so there is nothing to compress"


class ChunkKVNodes:
    """Emits select and compact nodes into a graph; raises ConfigError for a plan without ChunkKV.

    Declares the graph inputs lengths, keep_per_10k, budget_tokens [B] int32, window [B] int32 with `request_window`,
    and capacity [length_classes] int64: the slots of the output caches, at least the largest N of each length class, or
    0 where only the choice is needed and nothing is to be copied.

    Parameters
    ----------
    e : GraphEmitter
        The graph that gets the nodes.
    plan : GraphPlan
        Model, settings and layers.
    ids : str, default "input_ids"
        Name of the token ids [B,S], read for delimiter boundaries only.
    dtype : str, default "float32"
        Type of queries and caches.
    sorting : bool, default True
        Which function bodies the graph brings along: see functions.select_function. Without sorting the nodes do not
        name the plugins, so that TensorRT takes the bodies.
    request_window : bool, default False
        Whether each row says how many of the last W queries score.
    padded_lists : bool, default False
        Whether lists of recent tokens are as long as the prompts, -1 behind N, as those of plugins are. TensorRT must
        know sizes before it knows N.
    """

    def __init__(
        self,
        e: GraphEmitter,
        plan: GraphPlan,
        ids: str = "input_ids",
        dtype: str = "float32",
        sorting: bool = True,
        request_window: bool = False,
        padded_lists: bool = False,
    ) -> None:
        if plan.settings is None:
            raise ConfigError(_NOTHING)
        if plan.settings.budget_split == "ranked" and not sorting:
            raise ConfigError("budget_split is 'ranked', whose lengths depend on the scores: use backend onnxruntime")
        self._e, self._plan, self.settings, self._dtype = e, plan, plan.settings, dtype
        self._of_part = plan.settings.of_one_part()
        self._sorting = sorting
        self._request_window, self._padded_lists = request_window, padded_lists
        self._names = functions.select_inputs(self.settings, request_window)
        per_row = ("lengths", "keep_per_10k", "budget_tokens", *(["window"] if "window" in self._names else []))
        self._shared = {name: e.input(name, "int32", ["batch"]) for name in per_row}
        self._rank_values: dict[int, str] = {}  # by part
        self._together: dict[str, tuple[str, int]] = {}  # class and number of heads, by operator
        self._capacities = capacities(e, plan)
        self._recent: PartPlan | None = None  # the first part that keeps recent tokens; all others keep the same
        if self.settings.boundaries == "delimiter":
            assert plan.delimiter_tokens is not None
            table = e.inline("delimiter_tokens", plan.delimiter_tokens.astype(np.int32))
            self._shared["is_delimiter"] = e.op("Gather", [table, ids])

    def select(self, part: PartPlan, query: str, key: str, value: str) -> None:
        """Emit the choice of a leading part from its query [B,g*H,W,D], key and value [B,H,S,D].

        Outputs kept_indices.p [B,N] int32, token_scores.p [B,S]; slots.p are the indices padded to the capacity. Where
        each head of a part has its own choice, these are [B,H,N], [B,H,S] and [B,H,capacity]. A plugin cannot know N
        where shapes are made and gives [B,S] with -1 behind N: the Pad then crops to the capacity. Where scores are
        given, `query` names them, before pooling and of the shape of token_scores.p.

        Parts that keep recent tokens score nothing: `query` may be anything, and the first of them has kept_indices.p.
        With budget_split "ranked" the choice follows in `rank`, after all parts were selected.
        """
        if not part.scores:
            if self._recent is None:
                self._recent = part
                self._keep_recent(part, key)
            return
        e, each = self._e, self._of_part.heads == "each"
        scores_shape: list[int | str] = ["batch", len(part.kv_heads), "tokens"] if each else ["batch", "tokens"]
        named = {**self._shared, "query": query, "scores": query, "key": key, "value": value}
        inputs, scores = [named[name] for name in self._names], f"token_scores.{part.number}"
        e.output(scores, "float32", scores_shape)
        if self.settings.budget_split == "ranked":
            values = self._rank_values[part.number] = f"rank_values.{part.number}"
            e.op(functions.SCORE, inputs, [values, scores], name=f"{self._place(part)}/score", domain=functions.DOMAIN)
            return
        indices = f"kept_indices.{part.number}"
        attributes = functions.select_attributes(self.settings, self._request_window, part.head_class)
        e.op(
            functions.select_name(part.head_class, len(part.kv_heads)),
            inputs,
            [indices, f"kept_lengths.{part.number}", scores],
            name=f"{self._place(part)}/select",
            domain=functions.DOMAIN,
            **(attributes if self._sorting else {}),
        )
        kept = f"kept_{part.length_class}"
        e.output(indices, "int32", ["batch", len(part.kv_heads), kept] if each else ["batch", kept])
        self._pad_to_capacity(part, indices, axis=2 if each else 1)

    def select_together(self, raw: Mapping[int, str]) -> None:
        """Emit one choice for all parts of a class of heads; for budget_split "uniform" and "classes".

        `raw` are the scores before pooling of each part that scores, [B,S] or [B,H,S] as token_scores.p are. The
        outputs are those of `select`. To the node, every part is a head, or as many heads as it has, with a choice of
        its own.
        """
        e, each, parts = self._e, self._of_part.heads == "each", self._plan.parts
        settings = replace(self.settings, heads="each")
        for head_class in dict.fromkeys(parts[number].head_class for number in raw):
            numbers = [number for number in raw if parts[number].head_class == head_class]
            sizes = [len(parts[number].kv_heads) if each else 1 for number in numbers]
            rows = [raw[number] if each else e.op("Unsqueeze", [raw[number], e.ints(1)]) for number in numbers]
            named = {**self._shared, "scores": e.op("Concat", rows, axis=1)}
            operator = functions.select_name(head_class, sum(sizes))
            self._together[operator] = head_class, sum(sizes)
            made = [f"kept_indices/{head_class}", f"kept_lengths.{numbers[0]}", f"token_scores/{head_class}"]
            e.op(
                operator,
                [named[name] for name in functions.select_inputs(settings)],
                made,
                name="/chunkkv/select" if head_class == ALL_HEADS else f"/chunkkv/select.{head_class}",
                domain=functions.DOMAIN,
                **functions.select_attributes(settings, head_class=head_class),
            )
            slots = self._padded(made[0], self._capacities[parts[numbers[0]].length_class], axis=2)
            for name, stacked in (("kept_indices", made[0]), ("slots", slots), ("token_scores", made[2])):
                self._of_each_part(stacked, [f"{name}.{number}" for number in numbers], sizes)
            for number, size in zip(numbers, sizes, strict=True):
                heads: list[int | str] = [size] if each else []
                e.output(f"token_scores.{number}", "float32", ["batch", *heads, "tokens"])
                kept = f"kept_{parts[number].length_class}"
                e.output(f"kept_indices.{number}", "int32", ["batch", *heads, kept])

    def _of_each_part(self, stacked: str, names: list[str], sizes: list[int]) -> None:
        """Emit each part's own rows of what was chosen together, [B,K] or [B,H,K] from [B,rows,K]."""
        e = self._e
        if self._of_part.heads == "each":
            e.op("Split", [stacked, e.ints(*sizes)], names, axis=1)
            return
        for place, name in enumerate(names):
            e.op("Gather", [stacked, e.const(place, "int64")], [name], axis=1)

    def rank(self) -> None:
        """Emit the one ranking of all parts that were selected; nothing with another budget_split."""
        if self.settings.budget_split != "ranked":
            return
        e = self._e
        length = e.op("Unsqueeze", [e.op("Cast", ["lengths"], to=onnx.TensorProto.INT64), e.ints(1)])
        kept = kept_tokens(e, self.settings, length)
        heads = len(self._plan.parts) // self._plan.model.num_layers
        indices, lengths = ranked.rank_parts(e, list(self._rank_values.values()), kept, heads)
        for number, of_part in zip(self._rank_values, indices, strict=True):
            part = self._plan.parts[number]
            e.op("Identity", [of_part], [f"kept_indices.{number}"])
            place = e.const(part.length_class, "int64")
            e.op("Gather", [lengths, place], [f"kept_lengths.{number}"], axis=0)
            e.output(f"kept_indices.{number}", "int32", ["batch", "kept"])
            self._pad_to_capacity(part, f"kept_indices.{number}")

    def _keep_recent(self, part: PartPlan, key: str) -> None:
        """Emit what all parts keep that keep sinks and recent tokens."""
        e, indices = self._e, f"kept_indices.{part.number}"
        length = e.op("Unsqueeze", [e.op("Cast", ["lengths"], to=onnx.TensorProto.INT64), e.ints(1)])
        kept = kept_tokens(e, self.settings, length, part.head_class)
        tokens = e.op("Squeeze", [e.dim(key, 2)])
        count = tokens if self._padded_lists else e.op("ReduceMax", [kept], keepdims=0)
        e.op("Identity", [recent_indices(e, self.settings, length, kept, count)], [indices])
        e.output(indices, "int32", ["batch", f"kept_{part.length_class}"])
        if self.settings.heads == "each":  # all heads keep the same recent tokens
            self._pad_to_capacity(part, e.op("Unsqueeze", [indices, e.ints(1)]), axis=2)
        else:
            self._pad_to_capacity(part, indices)

    def _pad_to_capacity(self, part: PartPlan, indices: str, axis: int = 1) -> None:
        self._padded(indices, self._capacities[part.length_class], axis, f"slots.{part.number}")

    def _padded(self, indices: str, capacity: str, axis: int, output: str | None = None) -> str:
        """Return indices with -1 up to the capacity along their last axis, which is `axis`."""
        e = self._e
        spare = e.op("Sub", [capacity, e.dim(indices, axis)])
        pads = e.op("Concat", [e.ints(*[0] * (2 * axis + 1)), spare], axis=0)
        return e.op("Pad", [indices, pads, e.const(-1, "int32")], [output] if output else None)

    def compact(self, part: PartPlan, key: str, value: str) -> None:
        """Emit the compaction of a part's caches [B,H,S,D] to kept_key.p and kept_value.p [B,H,capacity,D]."""
        recent = self._recent is not None and not self._plan.parts[part.leader].scores
        leader = self._recent.number if recent and self._recent is not None else part.leader
        slots = f"slots.{leader}"
        if recent and self.settings.heads == "each":  # one list for all of them, and a plugin wants one for each head
            slots = self._e.op("Expand", [slots, self._e.ints(1, len(part.kv_heads), 1)])
        for kind, full in (("key", key), ("value", value)):
            output = f"kept_{kind}.{part.number}"
            self._e.op(
                functions.COMPACT,
                [full, slots],
                [output],
                name=f"{self._place(part)}/compact_{kind}",
                domain=functions.DOMAIN,
                **(functions.compact_attributes(self._of_part) if self._sorting else {}),
            )
            self._e.output(output, self._dtype, kept_shape(self._plan, part))

    def finish(self) -> None:
        """Declare the graph output kept_lengths [length_classes,B] int32: N is the same for all parts of a class."""
        e, rows = self._e, []
        for number in range(self._plan.layout.length_classes):
            chosen = [part for part in self._plan.parts if part.length_class == number and part.leads and part.scores]
            if chosen:
                kept = f"kept_lengths.{chosen[0].number}"
            else:
                length = e.op("Unsqueeze", [e.op("Cast", ["lengths"], to=onnx.TensorProto.INT64), e.ints(1)])
                kept = kept_tokens(e, self.settings, length, (READING, LOCAL)[number])
                kept = e.op("Cast", [e.op("Squeeze", [kept, e.ints(1)])], to=onnx.TensorProto.INT32)
            rows.append(e.op("Unsqueeze", [kept, e.ints(0)]))
        e.op("Concat", rows, ["kept_lengths"], axis=0)
        e.output("kept_lengths", "int32", [len(rows), "batch"])

    def functions(self, opset: int) -> list[onnx.FunctionProto]:
        """Return the bodies that engines without a ChunkKV operator run."""
        model, bodies = self._plan.model, {}
        group, options = model.num_heads // model.num_kv_heads, {"request_window": self._request_window}
        if self.settings.budget_split == "ranked":
            kv_heads = len(self._plan.parts[0].kv_heads)  # of every part: they are layers, or single heads
            bodies[functions.SCORE] = functions.score_function(
                self.settings, kv_heads * group, kv_heads, opset, **options
            )
        for name, (head_class, count) in self._together.items():
            bodies[name] = functions.select_function(
                replace(self.settings, heads="each"), count, count, opset, head_class=head_class, name=name
            )
        for part in self._plan.parts if not bodies else ():
            kv_heads = len(part.kv_heads)
            if part.scores and (name := functions.select_name(part.head_class, kv_heads)) not in bodies:
                bodies[name] = functions.select_function(
                    self.settings,
                    kv_heads * group,
                    kv_heads,
                    opset,
                    sorting=self._sorting,
                    head_class=part.head_class,
                    name=name,
                    **options,
                )
        return [*bodies.values(), functions.compact_function(opset, self._of_part.heads, self._sorting)]

    def _place(self, part: PartPlan) -> str:
        """Return how the names of a part's nodes begin."""
        return f"/layers.{part.layer}/chunkkv{part.suffix(self._plan.model.num_kv_heads)}"

    def metadata(self, graph: str) -> dict[str, str]:
        """Return what the model file says of itself."""
        return _metadata(graph, self.settings)


def _metadata(graph: str, settings: ChunkKVSettings) -> dict[str, str]:
    return {"chunkkv.graph": graph, "chunkkv.settings": json.dumps(settings.to_dict())}


def capacities(e: GraphEmitter, plan: GraphPlan) -> list[str]:
    """Declare the graph input capacity and return the slots of each length class, [1] int64."""
    count = plan.layout.length_classes
    e.input("capacity", "int64", [count])
    if count == 1:
        return ["capacity"]
    return [e.op("Slice", ["capacity", e.ints(number), e.ints(number + 1)]) for number in range(count)]


def kept_shape(plan: GraphPlan, part: PartPlan) -> list[int | str]:
    """Return the shape of the kept keys, or values, of a part."""
    slots = capacity_name(part.length_class, plan.layout.length_classes).replace("capacity", "capacity_slots")
    return ["batch", len(part.kv_heads), slots, plan.model.head_dim]


class KeepAllNodes:
    """Stands in for ChunkKVNodes in a plan without ChunkKV: every layer's cache is padded to the capacity.

    Declares the graph inputs lengths [B] int32 and capacity [1] int64, at least the padded length S. The parameters
    are those of ChunkKVNodes.
    """

    def __init__(self, e: GraphEmitter, plan: GraphPlan, dtype: str = "float32") -> None:
        self._e, self._plan, self._dtype = e, plan, dtype
        e.input("lengths", "int32", ["batch"])
        spare = e.op("Sub", [capacities(e, plan)[0], e.dim("input_ids", 1)])
        self._pads = e.op("Concat", [e.ints(0, 0, 0, 0, 0, 0), spare, e.ints(0)], axis=0)

    def compact(self, part: PartPlan, key: str, value: str) -> None:
        """Emit a part's caches [B,Hkv,S,D] as kept_key.p and kept_value.p [B,Hkv,capacity,D], zeros behind S."""
        for kind, full in (("key", key), ("value", value)):
            output = f"kept_{kind}.{part.number}"
            self._e.op("Pad", [full, self._pads], [output], name=f"/layers.{part.layer}/store_{kind}")
            self._e.output(output, self._dtype, kept_shape(self._plan, part))

    def finish(self) -> None:
        """Declare the graph output kept_lengths [1,B] int32: the whole prompt."""
        self._e.op("Unsqueeze", ["lengths", self._e.ints(0)], ["kept_lengths"])
        self._e.output("kept_lengths", "int32", [1, "batch"])

    def functions(self, opset: int) -> list[onnx.FunctionProto]:
        """Return no function bodies."""
        return []

    def metadata(self, graph: str) -> dict[str, str]:
        """Return what the model file says of itself."""
        return {"chunkkv.graph": graph}


def compress_graph(plan: GraphPlan, cache_dtype: str = "float32", scales: CacheScales | None = None) -> onnx.ModelProto:
    """Return the graph that compacts the caches of all parts after the last prefill block; it has no weights.

    Keys and values are of type `cache_dtype`, and compacted bit for bit; scores are computed in float32, for which
    `scales` say what keys and values of 8 bits mean.

    Inputs: those of ChunkKVNodes, query.p [B,g*H,W,D] per part p that scores (scores.p for scores from outside), key.p
    and value.p [B,H,S,D], and input_ids [B,S] int64 for delimiter boundaries. Outputs: kept_lengths, kept_key.p,
    kept_value.p, and per leading part kept_indices.p and token_scores.p.
    """
    e, settings = GraphEmitter(), plan.settings
    if settings is None:
        raise ConfigError(_NOTHING)
    if settings.boundaries == "delimiter":
        e.input("input_ids", "int64", ["batch", "tokens"])
    nodes = ChunkKVNodes(e, replace(plan, settings=settings.with_score("given")), dtype=cache_dtype)
    caches = []
    for part in plan.parts:
        shape: list[int | str] = ["batch", len(part.kv_heads), "tokens", plan.model.head_dim]
        caches.append([e.input(f"{kind}.{part.number}", cache_dtype, shape) for kind in ("key", "value")])
    raw = together.given_scores(e, plan) if settings.score == "given" else together.raw_scores(e, plan, caches, scales)
    if settings.budget_split == "ranked":
        for number, scores in raw.items():
            nodes.select(plan.parts[number], scores, *caches[number])
        nodes.rank()
    else:
        nodes.select_together(raw)
    for part in plan.parts:
        if part.leads and not part.scores:
            nodes.select(part, "", *caches[part.number])
    for part in plan.parts:
        nodes.compact(part, *caches[part.number])
    nodes.finish()
    return e.model(
        "chunkkv_compress",
        opset=COMPRESS_OPSET,
        functions=nodes.functions(COMPRESS_OPSET),
        domains=[(functions.DOMAIN, functions.DOMAIN_VERSION)],
        metadata=_metadata("compress", settings),
    )
