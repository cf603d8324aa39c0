"""Plan to ONNX: one-shot prefill of a right-padded batch with the ChunkKV nodes inside, standard operators only.

Only one group's full keys and values are alive at a time, but attention sees the whole prompt at once: an engine
whose attention materialises the score matrix should run the step graph in blocks instead.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from chunkkv_builder.onnx_graph import functions
from chunkkv_builder.onnx_graph.compress import ChunkKVNodes, KeepAllNodes
from chunkkv_builder.onnx_graph.emitter import GraphEmitter
from chunkkv_builder.onnx_graph.head_parts import HeadParts
from chunkkv_builder.onnx_graph.projections import CONTRIB, PACKED_SUFFIX
from chunkkv_builder.onnx_graph.transformer import STANDARD_OPSET, StepGraph
from chunkkv_builder.onnx_graph.weights import WeightLocation
from chunkkv_builder.plan import GraphPlan, LayerPlan

_INT64 = onnx.TensorProto.INT64


def takes_window(plan: GraphPlan) -> bool:
    """Return whether the prefill graph has the input window: where a part is scored by queries."""
    settings = plan.settings
    return settings is not None and settings.score != "given" and any(part.scores for part in plan.parts)


class PrefillGraph(StepGraph):
    """Emits the prefill graph of `plan`: the step graph's layers without a past, each group compacted as it ends.

    A plan without ChunkKV gives the same graph with every token kept. The parameters are those of StepGraph.
    """

    def __init__(
        self,
        plan: GraphPlan,
        weights: Mapping[str, WeightLocation],
        dtype: str = "float32",
        emitter: GraphEmitter | None = None,
        sorting: bool = True,
    ) -> None:
        super().__init__(plan, weights, dtype=dtype, emitter=emitter)
        self._sorting = sorting

    def build(self) -> onnx.ModelProto:
        """Return the model.

        Inputs: input_ids [B,S] int64, right-padded with any valid id, and those of ChunkKVNodes or KeepAllNodes.
        Outputs: logits [B,1,V] after each row's last token, kept_lengths [length_classes,B], kept_key.p and
        kept_value.p for each part p of the cache; with ChunkKV also kept_indices.p and token_scores.p.
        """
        e = self.e
        ids = e.input("input_ids", "int64", ["batch", "tokens"])
        self.nodes = self._cache_nodes()
        self.caches: dict[int, tuple[str, str]] = {}
        self.rows = e.op("Concat", [e.dim(ids, 0), e.dim(ids, 1), e.ints(-1)], axis=0)
        self.last = e.op("Sub", [e.op("Cast", ["lengths"], to=_INT64), e.const(1, "int64")])
        count = e.op("Squeeze", [e.dim(ids, 1)])
        steps = e.op("Range", [e.const(0, "int64"), count, e.const(1, "int64")])
        self._rotation(e.op("Expand", [e.op("Unsqueeze", [steps, e.ints(0)]), e.op("Shape", [ids])]))
        self._logits(self._layers(self._embed(ids)), e.op("Unsqueeze", [self.last, e.ints(1)]))
        self.nodes.finish()
        packed = any(name.endswith(PACKED_SUFFIX) for name in self.weights)
        return e.model(
            "chunkkv_prefill",
            opset=STANDARD_OPSET,
            functions=self.nodes.functions(STANDARD_OPSET),
            domains=[(functions.DOMAIN, functions.DOMAIN_VERSION)][: self.plan.settings is not None]
            + ([(CONTRIB, 1)] if packed else []),
            metadata=self.nodes.metadata("prefill"),
        )

    def _cache_nodes(self) -> ChunkKVNodes | KeepAllNodes:
        if self.plan.settings is None:
            return KeepAllNodes(self.e, self.plan, self.dtype)
        has_window = takes_window(self.plan)
        form = self.dtype, self._sorting, has_window
        return ChunkKVNodes(self.e, self.plan, "input_ids", *form, padded_lists=True)

    def _attend(self, layer: LayerPlan, qkv: tuple[str, str, str]) -> str:
        """Causal attention over the block alone; a group is compacted once its leader and its members have run."""
        query, key, value = qkv
        parts = self.plan.parts_of(layer.index)
        heads = HeadParts(self.e, parts)
        for part, *pair in zip(parts, heads.split(key, 1, 1), heads.split(value, 1, 1), strict=True):
            self.caches[part.number] = pair[0], pair[1]
        if layer.is_leader:
            assert isinstance(self.nodes, ChunkKVNodes)
            group = self.model.num_heads // self.model.num_kv_heads
            queries = heads.split(self._last_queries(query), group, 1)
            for part, part_query in zip(parts, queries, strict=True):
                self.nodes.select(part, part_query, *self.caches[part.number])
        for member in self.plan.parts:
            if member.number in self.caches and self.plan.parts[member.leader].layer <= layer.index:
                self.nodes.compact(member, *self.caches.pop(member.number))
        counts = self.model.num_heads, self.model.num_kv_heads
        return self._merge_heads(
            self._scaled_attention(f"/layers.{layer.index}/attention", (query, key, value), None, counts)
        )

    def _last_queries(self, query: str) -> str:
        """Each row's own last w queries, [B,Hq,w,D]; a row shorter than w repeats its first."""
        assert self.plan.settings is not None
        e, window = self.e, self.plan.settings.window
        places = e.op(
            "Add", [e.op("Unsqueeze", [self.last, e.ints(1)]), e.const([list(range(1 - window, 1))], "int64")]
        )
        places = e.op("Max", [places, e.const(0, "int64")])
        return functions.take_rows(e, query, e.op("Unsqueeze", [places, e.ints(1)]))
