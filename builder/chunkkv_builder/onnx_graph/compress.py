"""Plan to ONNX: the ChunkKV nodes of all layers, as a graph of their own and as pieces for other graphs."""

from __future__ import annotations

import json

import numpy as np
import onnx

from chunkkv.errors import ConfigError
from chunkkv_builder.onnx_graph import functions
from chunkkv_builder.onnx_graph.emitter import GraphEmitter
from chunkkv_builder.plan import GraphPlan, LayerPlan

COMPRESS_OPSET = 23


class ChunkKVNodes:
    """Emits select and compact nodes into a graph; raises ConfigError for a plan without ChunkKV.

    Declares the graph inputs lengths, keep_per_10k, budget_tokens [B] int32 and capacity [1] int64: the slots of the
    output caches, at least the largest N.

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
    """

    def __init__(
        self, e: GraphEmitter, plan: GraphPlan, ids: str = "input_ids", dtype: str = "float32", sorting: bool = True
    ) -> None:
        if plan.settings is None:
            raise ConfigError("this plan has no ChunkKV settings, so there is nothing to compress")
        self._e, self._plan, self.settings, self._dtype = e, plan, plan.settings, dtype
        self._sorting = sorting
        self._shared = [e.input(name, "int32", ["batch"]) for name in ("lengths", "keep_per_10k", "budget_tokens")]
        e.input("capacity", "int64", [1])
        if self.settings.boundaries == "delimiter":
            assert plan.delimiter_tokens is not None
            table = e.inline("delimiter_tokens", plan.delimiter_tokens.astype(np.int32))
            self._shared.append(e.op("Gather", [table, ids]))

    def select(self, leader: int, query: str, key: str) -> None:
        """Emit the choice of a group from its leader's query [B,Hq,w,D] and key [B,Hkv,S,D].

        Outputs kept_indices.l [B,N] int32, token_scores.l [B,S]; slots.l are the indices padded to the capacity. A
        plugin cannot know N where shapes are made and gives [B,S] with -1 behind N: the Pad then crops to the capacity.
        """
        e = self._e
        indices, scores = f"kept_indices.{leader}", f"token_scores.{leader}"
        e.op(
            functions.SELECT,
            [query, key, *self._shared],
            [indices, f"kept_lengths.{leader}", scores],
            name=f"/layers.{leader}/chunkkv/select",
            domain=functions.DOMAIN,
            **(functions.select_attributes(self.settings) if self._sorting else {}),
        )
        e.output(indices, "int32", ["batch", "kept"])
        e.output(scores, "float32", ["batch", "tokens"])
        spare = e.op("Sub", ["capacity", e.dim(indices, 1)])
        pads = e.op("Concat", [e.ints(0, 0, 0), spare], axis=0)
        e.op("Pad", [indices, pads, e.const(-1, "int32")], [f"slots.{leader}"])

    def compact(self, layer: LayerPlan, key: str, value: str) -> None:
        """Emit the compaction of a layer's caches [B,Hkv,S,D] to kept_key.l and kept_value.l [B,Hkv,capacity,D]."""
        model = self._plan.model
        for kind, full in (("key", key), ("value", value)):
            output = f"kept_{kind}.{layer.index}"
            self._e.op(
                functions.COMPACT,
                [full, f"slots.{layer.leader}"],
                [output],
                name=f"/layers.{layer.index}/chunkkv/compact_{kind}",
                domain=functions.DOMAIN,
                **(functions.plugin_attributes() if self._sorting else {}),
            )
            self._e.output(output, self._dtype, ["batch", model.num_kv_heads, "capacity_slots", model.head_dim])

    def finish(self) -> None:
        """Declare the graph output kept_lengths [B] int32: N is the same for every layer."""
        self._e.op("Identity", [f"kept_lengths.{self._plan.leaders[0]}"], ["kept_lengths"])
        self._e.output("kept_lengths", "int32", ["batch"])

    def functions(self, opset: int) -> list[onnx.FunctionProto]:
        """Return the bodies that engines without a ChunkKV operator run."""
        model = self._plan.model
        heads = model.num_heads, model.num_kv_heads
        select = functions.select_function(self.settings, *heads, opset, sorting=self._sorting)
        return [select, functions.compact_function(opset)]

    def metadata(self, graph: str) -> dict[str, str]:
        """Return what the model file says of itself."""
        return {"chunkkv.graph": graph, "chunkkv.settings": json.dumps(self.settings.to_dict())}


class KeepAllNodes:
    """Stands in for ChunkKVNodes in a plan without ChunkKV: every layer's cache is padded to the capacity.

    Declares the graph inputs lengths [B] int32 and capacity [1] int64, at least the padded length S. The parameters
    are those of ChunkKVNodes.
    """

    def __init__(self, e: GraphEmitter, plan: GraphPlan, dtype: str = "float32") -> None:
        self._e, self._plan, self._dtype = e, plan, dtype
        e.input("lengths", "int32", ["batch"])
        e.input("capacity", "int64", [1])
        spare = e.op("Sub", ["capacity", e.dim("input_ids", 1)])
        self._pads = e.op("Concat", [e.ints(0, 0, 0, 0, 0, 0), spare, e.ints(0)], axis=0)

    def compact(self, layer: LayerPlan, key: str, value: str) -> None:
        """Emit a layer's caches [B,Hkv,S,D] as kept_key.l and kept_value.l [B,Hkv,capacity,D], zeros behind S."""
        model = self._plan.model
        for kind, full in (("key", key), ("value", value)):
            output = f"kept_{kind}.{layer.index}"
            self._e.op("Pad", [full, self._pads], [output], name=f"/layers.{layer.index}/store_{kind}")
            self._e.output(output, self._dtype, ["batch", model.num_kv_heads, "capacity_slots", model.head_dim])

    def finish(self) -> None:
        """Declare the graph output kept_lengths [B] int32: the whole prompt."""
        self._e.op("Identity", ["lengths"], ["kept_lengths"])
        self._e.output("kept_lengths", "int32", ["batch"])

    def functions(self, opset: int) -> list[onnx.FunctionProto]:
        """Return no function bodies."""
        return []

    def metadata(self, graph: str) -> dict[str, str]:
        """Return what the model file says of itself."""
        return {"chunkkv.graph": graph}


def compress_graph(plan: GraphPlan) -> onnx.ModelProto:
    """Return the graph that compacts the caches of all layers after the last prefill block; it has no weights.

    Inputs: those of ChunkKVNodes, query.l [B,Hq,w,D] per leader, key.l and value.l [B,Hkv,S,D], and input_ids [B,S]
    int64 for delimiter boundaries. Outputs: kept_lengths, kept_indices.l, token_scores.l, kept_key.l, kept_value.l.
    """
    e, model = GraphEmitter(), plan.model
    if plan.settings is not None and plan.settings.boundaries == "delimiter":
        e.input("input_ids", "int64", ["batch", "tokens"])
    nodes = ChunkKVNodes(e, plan)
    shape: list[int | str] = ["batch", model.num_kv_heads, "tokens", model.head_dim]
    caches = [[e.input(f"{kind}.{i}", "float32", shape) for kind in ("key", "value")] for i in range(model.num_layers)]
    for leader in plan.leaders:
        window: list[int | str] = ["batch", model.num_heads, nodes.settings.window, model.head_dim]
        nodes.select(leader, e.input(f"query.{leader}", "float32", window), f"key.{leader}")
        for layer in plan.layers:
            if layer.leader == leader:
                nodes.compact(layer, *caches[layer.index])
    nodes.finish()
    return e.model(
        "chunkkv_compress",
        opset=COMPRESS_OPSET,
        functions=nodes.functions(COMPRESS_OPSET),
        domains=[(functions.DOMAIN, functions.DOMAIN_VERSION)],
        metadata=nodes.metadata("compress"),
    )
