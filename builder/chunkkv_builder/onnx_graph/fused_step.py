"""The step graph for ONNX Runtime: its own attention, which rotates heads itself, and sums fused with norms.

The attention's memory does not grow with block x cache. It takes several tokens per row only for B = 1. With weights
that are multiplied as whole numbers, long blocks of long prompts take BlockAttention instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import onnx
from onnx import helper, numpy_helper

from chunkkv.cache_scales import SCALES_KEY, CacheScales
from chunkkv.engine.directory import LONG_BLOCK, PRODUCTS_KEY, WHOLE_NUMBERS
from chunkkv_builder.checkpoint.config_keys import UNROTATED
from chunkkv_builder.onnx_graph.arithmetic import scaled
from chunkkv_builder.onnx_graph.block_attention import BlockAttention
from chunkkv_builder.onnx_graph.eight_bit_cache import OPSET as EIGHT_BIT_OPSET
from chunkkv_builder.onnx_graph.eight_bit_cache import BlockPlace, EightBitPart
from chunkkv_builder.onnx_graph.emitter import NUMPY_TO_ONNX, NodeEmitter
from chunkkv_builder.onnx_graph.merged_weights import MERGED
from chunkkv_builder.onnx_graph.projections import CHANNELS_SUFFIX, CONTRIB
from chunkkv_builder.onnx_graph.rotary_tables import rotated_kinds, table_names
from chunkkv_builder.onnx_graph.transformer import StepGraph
from chunkkv_builder.onnx_graph.weights import WeightLocation
from chunkkv_builder.plan import GraphPlan, LayerPlan, PartPlan

_OPSET = 23
_END = np.iinfo(np.int64).max  # of a slice: to the last
_INT32, _INT64 = onnx.TensorProto.INT32, onnx.TensorProto.INT64
# Where BlockAttention is faster than ONNX Runtime's own: its many small operators need this much work.
_LONG_BLOCK = 64
# Filled slots, by the cache's type: ONNX Runtime's attention would need one of 8 bits as floats first.
_LONG_CACHES = {"float32": 1024, "int8": 384}


class FusedStepGraph(StepGraph):
    """Emits the step graph of a plan for ONNX Runtime.

    The inputs and outputs are those of StepGraph. With a query_count of 0 the outputs query.p have no queries, and
    decode spares computing them.

    Parameters
    ----------
    plan : GraphPlan
        Model, settings and layers.
    weights : mapping
        Where each tensor lies, by name: those of with_merged_projections and with_scaled_queries, and of rotary_tables
        where it gives any.
    packed_activations : str or None, default "int8"
        Type in which inputs are multiplied with packed weights, as Projections takes it.
    cache_dtype : str, default "float32"
        Type of the KV cache, "float32", "float16" or "int8". Attention over float16 computes in float16 where queries
        meet the cache. Heads are rotated before, in float32.
    scales : CacheScales or None, default None
        With which 8 bits hold keys and values; given exactly for "int8".
    """

    kind = "step"  # as the graph's file says

    def __init__(
        self,
        plan: GraphPlan,
        weights: Mapping[str, WeightLocation],
        packed_activations: str | None = "int8",
        cache_dtype: str = "float32",
        scales: CacheScales | None = None,
    ) -> None:
        super().__init__(plan, weights, packed_activations=packed_activations)
        self.cache_dtype, self._scales = cache_dtype, scales
        self._rotates_inside = all(name in weights for kind in rotated_kinds(plan.model) for name in table_names(kind))
        self._observed: list[tuple[PartPlan, str]] = []
        self._multiplies_whole_numbers = any(name.endswith(CHANNELS_SUFFIX) for name in weights)
        self._has_block_attention = (
            self._multiplies_whole_numbers
            and cache_dtype in (self.dtype, "int8")
            and plan.model.attention_soft_cap is None
        )

    def _model(self) -> onnx.ModelProto:
        if self._observed:
            self._emit_queries()
        metadata = {"chunkkv.graph": self.kind}
        if self._multiplies_whole_numbers:
            metadata[PRODUCTS_KEY] = WHOLE_NUMBERS
        if self._keeps_queries:
            metadata["chunkkv.queries"] = "counted"
        if self._scales is not None:
            metadata[SCALES_KEY] = self._scales.to_text()
        opset = _OPSET if self._scales is None else EIGHT_BIT_OPSET
        return self.e.model(f"chunkkv_{self.kind}", opset=opset, domains=[(CONTRIB, 1)], metadata=metadata)

    def _cache_inputs(self, lengths: str) -> None:
        e = self.e
        block = e.op("Cast", [e.op("Squeeze", [e.dim("input_ids", 1)])], to=_INT32)
        last = e.op("Add", [lengths, e.op("Sub", [block, e.const(1, "int32")])])
        total = e.op("Add", [e.op("ReduceMax", [lengths, e.ints(1)], keepdims=0), block])
        classes = sorted({part.length_class for part in self.plan.parts})
        self.lengths = {number: (self._of_class(last, number), self._of_class(total, number)) for number in classes}
        if self._has_block_attention:
            # Named, because the runtime replaces it on processors that cannot multiply the attention's whole numbers.
            long_block = e.inline(LONG_BLOCK, np.array(_LONG_BLOCK, np.int32))
            is_small = e.op("Less", [block, long_block])
            long = e.const(_LONG_CACHES[self.cache_dtype], "int32")
            self._is_short = {
                number: e.op("Or", [is_small, e.op("Squeeze", [e.op("Less", [held, long])])])
                for number, (_, held) in self.lengths.items()
            }
        if self._scales is not None:
            is_single, filled = e.op("Equal", [block, e.const(1, "int32")]), e.op("Cast", [lengths], to=_INT64)
            is_short = self._is_short if self._has_block_attention else {}
            self._places = {
                number: BlockPlace(
                    *self.lengths[number], self._of_class(filled, number), is_single, is_short.get(number)
                )
                for number in classes
            }

    def _rotation(self, positions: str) -> None:
        self._positions = positions
        if not self._rotates_inside:
            super()._rotation(positions)

    def _layers(self, hidden: str) -> str:
        hidden, normed = self._before_last(self.plan.layers, hidden)
        return self.e.op("Add", [*self._layer(self.plan.layers[-1], hidden, normed)])

    def _before_last(self, layers: Sequence[LayerPlan], hidden: str) -> tuple[str, str]:
        """Run all `layers` but the last over the residual stream; return that, and its norm for the last."""
        normed = self._norm(f"model.layers.{layers[0].index}.input_layernorm.weight", hidden)
        for layer, following in pairwise(layers):
            norm = f"model.layers.{following.index}.input_layernorm.weight"
            hidden, normed = self._add_and_norm(*self._layer(layer, hidden, normed), norm)
        return hidden, normed

    def _layer(self, layer: LayerPlan, hidden: str, normed: str) -> tuple[str, str]:
        """Run one layer; return the residual stream before its MLP, and what the MLP adds to it."""
        prefix = f"model.layers.{layer.index}"
        mixed = self._addend(self._attention(layer, normed), f"{prefix}.post_attention_layernorm.weight")
        hidden, normed = self._add_and_norm(hidden, mixed, self._norm_before_mlp(prefix))
        return hidden, self._addend(self._mlp(prefix, normed), f"{prefix}.post_feedforward_layernorm.weight")

    def _add_and_norm(self, hidden: str, addend: str, norm: str) -> tuple[str, str]:
        """Return the sum of both, and that sum normalised."""
        added, normed = f"/{norm}_sum", f"/{norm}_output"
        self.e.op(
            "SkipSimplifiedLayerNormalization",
            [hidden, addend, self.e.weight(self.weights[norm])],
            [normed, "", "", added],
            name="/" + norm,
            domain=CONTRIB,
            epsilon=self.model.rms_norm_eps,
        )
        return added, normed

    def _attention(self, layer: LayerPlan, normed: str) -> str:
        e, prefix = self.e, f"model.layers.{layer.index}.self_attn"
        flat = e.ints(-1, self.model.num_heads * self.model.head_dim)
        return self._project.emit(f"{prefix}.o_proj", e.op("Reshape", [self._mixed(layer, normed), flat]))

    def _mixed(self, layer: LayerPlan, normed: str) -> str:
        """Return a layer's attention [B,S,Hq*D] before its last projection."""
        parts, qkv = self.plan.parts_of(layer.index), self._projected(layer, normed)
        is_ready = self._rotates_inside or self._rotation_of(layer.index) == UNROTATED
        if is_ready and self._scales is None and len(parts) == 1 and not self.model.qk_norm:
            return self._attend_part(parts[0], [qkv, "", ""])
        return self._attend_parts(parts, self._apart(layer, qkv), axis=2, width=self.model.head_dim)

    def _projected(self, layer: LayerPlan, normed: str) -> str:
        """Return queries, keys and values of a layer beside each other, [B,S,(Hq+2*Hkv)*D]."""
        projected = self._project.emit(f"model.layers.{layer.index}.self_attn.{MERGED}", normed)
        return self.e.op("Reshape", [projected, self.rows])

    def _apart(self, layer: LayerPlan, qkv: str) -> tuple[str, str, str]:
        """Return query, key and value [B,S,H*D] of `qkv`, ready for the attention."""
        query, key, value = self._split(layer, qkv)
        return self._ready(layer, "q", query), self._ready(layer, "k", key), value

    def _split(self, layer: LayerPlan, qkv: str) -> list[str]:
        """Return query, key and value [B,S,H*D] of `qkv`, as they are projected."""
        model = self.model
        heads = (model.num_heads, model.num_kv_heads, model.num_kv_heads)
        outputs = [f"{qkv}/{name}" for name in ("query", "key", "value")]
        self.e.op("Split", [qkv, self.e.ints(*(count * model.head_dim for count in heads))], outputs, axis=2)
        return outputs

    def _ready(self, layer: LayerPlan, kind: str, heads: str) -> str:
        """Return the queries or keys [B,S,H*D] of a layer, `kind` "q" or "k", ready for the attention."""
        if self.model.qk_norm:
            heads = self._norm_heads(f"model.layers.{layer.index}.self_attn.{kind}", heads)
        if self._rotates_inside:
            return heads
        count = self.model.num_heads if kind == "q" else self.model.num_kv_heads
        return self._rotate(layer.index, heads, num_heads=count)

    def _attention_over(self, part: PartPlan, qkv: list[str], past: list[str], present: list[str]) -> str:
        """Store keys and values in a part's cache and return its attention [B,S,Hq*D].

        `qkv` are [B,S,H*D], or [B,S,(Hq+2*Hkv)*D] and two empty names.
        """
        name = self._attention_name(part)
        outputs = [f"{name}_output", *present]
        if self._scales is not None:
            place = self._places[part.length_class]
            return self._eight_bit_part(part).attend(self.e, name, qkv, self._scales, place)
        if not self._has_block_attention:
            return self._fused_attention(self.e, part, qkv, past, outputs)
        step, block = NodeEmitter(f"{name}/step/"), NodeEmitter(f"{name}/block/")
        of_step = [f"{name}/step/{output}" for output in ("mixed", "key", "value")]
        self._fused_attention(step, part, qkv, past, of_step)
        attention = self._block_attention(block, part)
        of_block = attention.emit(self._rotated(block, part, qkv), past, self.lengths[part.length_class][0])
        self.e.op(
            "If",
            [self._is_short[part.length_class]],
            outputs,
            name=f"{name}/either",
            then_branch=self._attention_branch(step, of_step, part),
            else_branch=self._attention_branch(block, of_block, part),
        )
        return outputs[0]

    def _block_attention(self, e: NodeEmitter, part: PartPlan) -> BlockAttention:
        """Return the attention of long blocks over a part of a float cache."""
        return BlockAttention(e, self._query_heads(part), len(part.kv_heads), self.model.head_dim)

    def _eight_bit_part(self, part: PartPlan) -> EightBitPart:
        """Return what attends to a part of a cache of 8 bits."""
        sizes = self._query_heads(part), len(part.kv_heads), self.model.head_dim
        return EightBitPart(part.number, *sizes, self._attention_attributes())

    def _attention_branch(self, e: NodeEmitter, names: Sequence[str], part: PartPlan) -> onnx.GraphProto:
        """Return the nodes of `e` as a branch whose outputs are attention, keys and values."""
        cache: list[int | str] = ["batch", len(part.kv_heads), self._capacity_name(part), self.model.head_dim]
        mixed: list[int | str] = ["batch", "block", self._query_heads(part) * self.model.head_dim]
        shapes = zip(names, (mixed, cache, cache), strict=True)
        return e.branch([(name, self.dtype, shape) for name, shape in shapes])

    def _rotated(self, e: NodeEmitter, part: PartPlan, qkv: list[str]) -> tuple[str, str, str]:
        """Return query, key and value [1,S,H*D] of a part, rotated where the attention would have done it."""
        name, model = self._attention_name(part), self.model
        heads = self._query_heads(part), len(part.kv_heads), len(part.kv_heads)
        query, key, value = qkv
        if not key:
            query, key, value = pieces = [f"{name}/block/{piece}" for piece in ("query", "key", "value")]
            e.op("Split", [qkv[0], e.ints(*(count * model.head_dim for count in heads))], pieces, axis=2)
        query, key = self._turned(e, part.layer, self._positions, ((query, heads[0]), (key, heads[1])))
        return query, key, value

    def _turned(self, e: NodeEmitter, layer: int, positions: str, values: Sequence[tuple[str, int]]) -> list[str]:
        """Return `values`, each [B,S,H*D] with its H, rotated to `positions` where the attention would have done it."""
        kind = self._rotation_of(layer)
        if not self._rotates_inside or kind == UNROTATED:
            return [heads for heads, _ in values]
        tables = [e.op("Gather", [self.e.weight(self.weights[name]), positions]) for name in table_names(kind)]
        attributes = self._rotary_attributes()
        return [e.op("RotaryEmbedding", [heads, *tables], num_heads=count, **attributes) for heads, count in values]

    def _fused_attention(
        self, e: NodeEmitter, part: PartPlan, qkv: list[str], past: list[str], outputs: Sequence[str]
    ) -> str:
        """Emit ONNX Runtime's own attention to `e`; `outputs` are names for attention, keys and values."""
        name, kind = self._attention_name(part), self._rotation_of(part.layer)
        rotary = []
        if self._rotates_inside and kind != UNROTATED:
            rotary = [*(self.e.weight(self.weights[table]) for table in table_names(kind)), self._positions]
        if self.cache_dtype != self.dtype:
            qkv = [value and e.op("Cast", [value], to=NUMPY_TO_ONNX[self.cache_dtype]) for value in qkv]
        mixed = e.op(
            "GroupQueryAttention",
            [*qkv, *past, *self.lengths[part.length_class], *rotary],
            list(outputs),
            name=name,
            domain=CONTRIB,
            num_heads=self._query_heads(part),
            kv_num_heads=len(part.kv_heads),
            do_rotary=int(bool(rotary)),
            **self._attention_attributes(),
        )
        return mixed if self.cache_dtype == self.dtype else e.op("Cast", [mixed], to=NUMPY_TO_ONNX[self.dtype])

    def _attention_attributes(self) -> dict[str, float]:
        """Return attributes beside the numbers of heads; queries have their scale from with_scaled_queries."""
        cap = self.model.attention_soft_cap
        return {"scale": 1.0} if cap is None else {"scale": 1.0, "softcap": cap}

    def _observe(self, query_count: str) -> None:
        e, block = self.e, self.e.dim("input_ids", 1)
        self._query_count = query_count
        self._first_place = e.op("Sub", [block, e.op("Min", [query_count, block])])
        self._first_query = e.op("Concat", [self._first_place, e.ints(0)], axis=0)

    def _window_queries(self, part: PartPlan, query: str) -> None:
        """Keep the block's last queries of a part; `query` [B,S,n] begins with its queries, or is only they."""
        e = self.e
        ends = e.ints(_END, self._query_heads(part) * self.model.head_dim)
        self._observed.append((part, e.op("Slice", [query, self._first_query, ends, e.ints(1, 2)])))
        e.output(f"query.{part.number}", self.dtype, self._queries_shape(part))

    def _emit_queries(self) -> None:
        """Emit the outputs query.p from the kept queries, where the caller asks for any."""
        then, otherwise = NodeEmitter("queries/"), NodeEmitter("no_queries/")
        found, none = [], []
        places = then.op("Slice", [self._positions, self._first_place, then.ints(_END), then.ints(1)])
        for part, last in self._observed:
            found.append(self._queries_of(then, part, last, places))
            empty = np.zeros((0, self._query_heads(part), 0, self.model.head_dim), np.float32)
            none.append(otherwise.op("Constant", [], value=numpy_helper.from_array(empty)))
        is_asked = self.e.op("Squeeze", [self.e.op("Greater", [self._query_count, self.e.ints(0)])])
        self.e.op(
            "If",
            [is_asked],
            [f"query.{part.number}" for part, _ in self._observed],
            name="/queries",
            then_branch=self._branch(then, found),
            else_branch=self._branch(otherwise, none),
        )

    def _queries_of(self, e: NodeEmitter, part: PartPlan, last: str, positions: str) -> str:
        """Return the queries `last` [B,w,g*H*D] of a part as [B,g*H,w,D], rotated, for scores with 1/sqrt(D)."""
        heads, model = self._query_heads(part), self.model
        (last,) = self._turned(e, part.layer, positions, ((last, heads),))
        last = scaled(e, last, model.head_dim**0.5)
        return e.op("Transpose", [e.op("Reshape", [last, e.ints(0, 0, heads, model.head_dim)])], perm=[0, 2, 1, 3])

    def _branch(self, e: NodeEmitter, names: list[str]) -> onnx.GraphProto:
        values = [
            helper.make_tensor_value_info(name, NUMPY_TO_ONNX[self.dtype], self._queries_shape(part))
            for name, (part, _) in zip(names, self._observed, strict=True)
        ]
        return helper.make_graph(e.nodes, names[0], [], values)
