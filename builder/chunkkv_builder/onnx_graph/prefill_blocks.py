"""The graphs that append blocks of a prompt whose logits nobody asks for: all blocks but the last.

They multiply whole numbers where most step graphs multiply packed weights, which is several times as fast, and leave
out what only logits need: of the last layer all but storing its keys and values. Decode keeps the step graph.

The layers are split into two stages, a graph each, so that one block can be in the second while the next one is in the
first. That keeps two threads busy that exchange nothing but the hidden states of a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from chunkkv.cache_scales import CacheScales
from chunkkv.engine.directory import HIDDEN, NEXT_HIDDEN
from chunkkv_builder.onnx_graph.emitter import NUMPY_TO_ONNX
from chunkkv_builder.onnx_graph.fused_step import FusedStepGraph
from chunkkv_builder.onnx_graph.head_parts import HeadParts
from chunkkv_builder.onnx_graph.smoothing import SMOOTHED_SUFFIX
from chunkkv_builder.onnx_graph.weights import WeightLocation
from chunkkv_builder.plan import GraphPlan, LayerPlan, PartPlan


def stages_of(num_layers: int) -> list[range]:
    """Return the layers of each stage, about equally much work: two stages, or one for a model of a single layer.

    Of the last layer only storing its keys and values is left, so the second stage has no fewer layers than the first.
    """
    middle = num_layers // 2
    return [range(middle), range(middle, num_layers)] if middle else [range(num_layers)]


class PrefillBlocksGraph(FusedStepGraph):
    """Emits one stage of the graph of a plan that only fills the cache.

    Inputs are those of FusedStepGraph without logit_indices and query_count, and of another stage than the first HIDDEN
    [S,hidden] float32, the residual stream of the block. Outputs are present_key.p and present_value.p of the stage's
    layers, and of another stage than the last NEXT_HIDDEN, which is HIDDEN of the next one.

    Parameters
    ----------
    plan : GraphPlan
        Model, settings and layers.
    weights : mapping
        Where each tensor lies, by name: those of the step graph, and of every projection the codes with a scale for
        each output. Of tensors that are there with SMOOTHED_SUFFIX, too, it takes those.
    layers : range
        Layers of the stage, one of stages_of.
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
        layers: range,
        cache_dtype: str = "float32",
        scales: CacheScales | None = None,
    ) -> None:
        own = {name: weights.get(name + SMOOTHED_SUFFIX, place) for name, place in weights.items()}
        super().__init__(plan, own, "int8", cache_dtype, scales)
        self._keeps_queries = False
        self._stage = plan.layers[layers.start : layers.stop]

    def _embed(self, ids: str) -> str:
        """Return the embeddings of the tokens `ids` [1,S], or of a later stage what the one before it gives."""
        if self._stage[0].index == 0:
            return super()._embed(ids)
        return self.e.input(HIDDEN, self.dtype, ["tokens", self.model.hidden_size])

    def _layers(self, hidden: str) -> str:
        """Run the stage's layers. Of the model's last one only keys and values are needed."""
        last = self._stage[-1]
        hidden, normed = self._before_last(self._stage, hidden)
        if last is self.plan.layers[-1]:
            self._store(last, normed)
            return hidden
        self.e.output(NEXT_HIDDEN, self.dtype, ["tokens", self.model.hidden_size])
        return self.e.op("Add", [*self._layer(last, hidden, normed)], [NEXT_HIDDEN])

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
