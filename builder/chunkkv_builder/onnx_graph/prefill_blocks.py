"""The graph that appends blocks of a prompt whose logits nobody asks for: all blocks but the last.

It multiplies whole numbers where the step graph multiplies packed weights, which is several times as fast, and leaves
out what only logits need: of the last layer all but storing its keys and values. Decode keeps the step graph, whose
weights are smaller and more exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from chunkkv.cache_scales import CacheScales
from chunkkv_builder.onnx_graph.emitter import NUMPY_TO_ONNX
from chunkkv_builder.onnx_graph.fused_step import FusedStepGraph
from chunkkv_builder.onnx_graph.head_parts import HeadParts
from chunkkv_builder.onnx_graph.smoothing import SMOOTHED_SUFFIX
from chunkkv_builder.onnx_graph.weights import WeightLocation
from chunkkv_builder.plan import GraphPlan, LayerPlan, PartPlan


class PrefillBlocksGraph(FusedStepGraph):
    """Emits the graph of a plan that only fills the cache.

    Inputs are those of FusedStepGraph without logit_indices and query_count; outputs are present_key.p and
    present_value.p alone.

    Parameters
    ----------
    plan : GraphPlan
        Model, settings and layers.
    weights : mapping
        Where each tensor lies, by name: those of the step graph, and of every projection the codes with a scale for
        each output. Of tensors that are there with SMOOTHED_SUFFIX, too, it takes those.
    cache_dtype : str, default "float32"
        As FusedStepGraph takes it.
    scales : CacheScales or None, default None
        As FusedStepGraph takes it.
    """

    gives_logits = False
    kind = "prefill_blocks"

    def __init__(
        self,
        plan: GraphPlan,
        weights: Mapping[str, WeightLocation],
        cache_dtype: str = "float32",
        scales: CacheScales | None = None,
    ) -> None:
        own = {name: weights.get(name + SMOOTHED_SUFFIX, place) for name, place in weights.items()}
        super().__init__(plan, own, "int8", cache_dtype, scales)
        self._keeps_queries = False

    def _layers(self, hidden: str) -> str:
        """Run all layers but the last, of which only keys and values are needed."""
        hidden, normed = self._before_last(hidden)
        self._store(self.plan.layers[-1], normed)
        return hidden

    def _store(self, layer: LayerPlan, normed: str) -> None:
        """Store the keys and values of a layer whose attention nobody needs."""
        e, width = self.e, self.model.head_dim
        _, key, value = self._split(layer, self._projected(layer, normed))
        ready = self._ready(layer, "k", key), self.model.num_kv_heads
        (key,) = self._turned(e, layer.index, self._positions, (ready,))
        parts = self.plan.parts_of(layer.index)
        heads = HeadParts(e, parts)
        pieces = heads.split(key, width, 2), heads.split(value, width, 2)
        for part, *new in zip(parts, *pieces, strict=True):
            self._store_part(part, new)

    def _store_part(self, part: PartPlan, new: Sequence[str]) -> None:
        """Store keys and values of a part, `new` [1,S,H*D] each."""
        past, present = self._cache_of(part)
        if self._scales is not None:
            self._eight_bit_part(part).store(self.e, new, self._scales, self._places[part.length_class])
            return
        if self.cache_dtype != self.dtype:
            new = [self.e.op("Cast", [values], to=NUMPY_TO_ONNX[self.cache_dtype]) for values in new]
        self._block_attention(self.e, part).store(new, past, self.lengths[part.length_class][0], present)
