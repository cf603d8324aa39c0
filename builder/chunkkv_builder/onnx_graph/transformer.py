"""Plan to ONNX: the step graph, which runs a block of tokens against the cache.

One step graph serves prefill blocks and decode steps alike, so its weights exist once in memory. Cache slots and
logical positions are separate inputs: `cache_lengths` says where a token is stored, `position_ids` how it is rotated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from chunkkv_builder.checkpoint.config_keys import GLOBAL, UNROTATED
from chunkkv_builder.checkpoint.families import GELU_TANH
from chunkkv_builder.checkpoint.model_config import rope_frequencies
from chunkkv_builder.checkpoint.tensor_shapes import norm_before_mlp
from chunkkv_builder.onnx_graph.arithmetic import scaled, soft_cap, soft_capped_attention
from chunkkv_builder.onnx_graph.emitter import NUMPY_TO_ONNX, GraphEmitter
from chunkkv_builder.onnx_graph.head_parts import HeadParts
from chunkkv_builder.onnx_graph.projections import CONTRIB, PACKED_SUFFIX, Projections
from chunkkv_builder.onnx_graph.rotary_tables import rotated_kinds
from chunkkv_builder.onnx_graph.weights import WeightLocation
from chunkkv_builder.plan import GraphPlan, LayerPlan, PartPlan

STANDARD_OPSET = 24
_INT64, _FLOAT = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT


def capacity_name(length_class: int, length_classes: int) -> str:
    """Return the name of the dimension that counts the slots of a length class."""
    return "capacity" if length_classes == 1 else f"capacity_{length_class}"


class StepGraph:
    """Emits the step graph of a plan in operators that every engine has, for any B and S.

    Attention is TensorScatter and Attention of ONNX opset 24, with a mask over slots. FusedStepGraph is the form for
    ONNX Runtime.

    Parameters
    ----------
    plan : GraphPlan
        Model, settings and layers.
    weights : mapping
        Where each tensor lies, by its name in the checkpoint.
    dtype : str, default "float32"
        Type of weights, cache and arithmetic; logits are always float32.
    emitter : GraphEmitter, optional
        Decides where the weights lie; default: in a file beside the graph.
    window_queries : bool, default True
        Whether the graph has the outputs query.l, which a compress graph needs.
    packed_activations : str or None, default "int8"
        Type in which inputs are multiplied with packed weights, as Projections takes it.
    """

    gives_logits = True  # whether the graph has the input logit_indices and the output logits
    lengths: dict[int, tuple[str, str]]  # what attention needs of each length class

    def __init__(
        self,
        plan: GraphPlan,
        weights: Mapping[str, WeightLocation],
        dtype: str = "float32",
        emitter: GraphEmitter | None = None,
        window_queries: bool = True,
        packed_activations: str | None = "int8",
    ) -> None:
        self.plan = plan
        self.model = plan.model
        self.weights = weights
        self.dtype = self.cache_dtype = dtype
        self.e = emitter or GraphEmitter()
        self._keeps_queries = window_queries
        self._project = Projections(self.e, self.model, weights, packed_activations)

    def build(self) -> onnx.ModelProto:
        """Return the model.

        Inputs: input_ids [B,S], position_ids [B,S] int64, cache_lengths [length_classes,B] int32 (slots filled before
        this block), logit_indices [B,P] int64 (places in the block), query_count [1] int64 where a part scores, and
        past_key.p and past_value.p [B,H,C,D] for each part p of the cache with its H KV heads. Outputs: logits [B,P,V],
        present_key.p and present_value.p (the same buffers), and for each part p that scores query.p [B,g*H,w,D], the
        block's last query_count rotated queries (fewer where the block is shorter). A part is a layer where the budget
        is not split by heads.
        """
        e = self.e
        ids = e.input("input_ids", "int64", ["batch", "block"])
        positions = e.input("position_ids", "int64", ["batch", "block"])
        lengths = e.input("cache_lengths", "int32", [self.plan.layout.length_classes, "batch"])
        places = e.input("logit_indices", "int64", ["batch", "logit_count"]) if self.gives_logits else ""
        if self._keeps_queries and any(part.scores for part in self.plan.parts):
            self._observe(e.input("query_count", "int64", [1]))
        self.rows = e.op("Concat", [e.dim("input_ids", 0), e.dim("input_ids", 1), e.ints(-1)], axis=0)
        self._cache_inputs(lengths)
        self._rotation(positions)
        hidden = self._layers(self._embed(ids))
        if self.gives_logits:
            self._logits(hidden, places)
        return self._model()

    def _model(self) -> onnx.ModelProto:
        contrib = any(name.endswith(PACKED_SUFFIX) for name in self.weights)
        return self.e.model(
            "chunkkv_step",
            opset=STANDARD_OPSET,
            domains=[(CONTRIB, 1)] if contrib else [],
            metadata={"chunkkv.graph": "step"},
        )

    def _observe(self, query_count: str) -> None:
        """Derive from query_count what the outputs query.p need."""
        self._first_query = self.e.op("Neg", [query_count])

    def _cache_inputs(self, lengths: str) -> None:
        """Derive from cache_lengths what the attention operator needs, once for all parts of a length class."""
        e = self.e
        first_parts = {part.length_class: part for part in reversed(self.plan.parts)}
        firsts, self.lengths = e.op("Cast", [lengths], to=_INT64), {}
        steps = e.op("Range", [e.const(0, "int64"), e.op("Squeeze", [e.dim("input_ids", 1)]), e.const(1, "int64")])
        for number, part in sorted(first_parts.items()):
            first = self._of_class(firsts, number)
            capacity = e.op("Squeeze", [e.dim(f"past_key.{part.number}", 2)])
            slots = e.op("Range", [e.const(0, "int64"), capacity, e.const(1, "int64")])
            newest = e.op(
                "Add",
                [e.op("Reshape", [first, e.ints(-1, 1, 1, 1)]), e.op("Reshape", [steps, e.ints(1, 1, -1, 1)])],
            )
            self.lengths[number] = (first, e.op("LessOrEqual", [slots, newest]))

    def _of_class(self, values: str, number: int) -> str:
        """Return what `values` [length_classes,...] says of one length class."""
        if self.plan.layout.length_classes == 1:
            return self.e.op("Squeeze", [values, self.e.ints(0)])
        return self.e.op("Gather", [values, self.e.const(number, "int64")], axis=0)

    def _rotation(self, positions: str) -> None:
        """Cosines and sines [B,S,R/2] of this block's positions, in float32 as transformers computes them.

        R are the rotated dimensions of a head; `rotations` has one pair for each kind of rotated layer.
        """
        e = self.e
        self.rotations: dict[str, tuple[str, str]] = {}
        at = e.op("Unsqueeze", [e.op("Cast", [positions], to=_FLOAT), e.ints(2)])
        for kind in rotated_kinds(self.model):
            frequencies, factor = rope_frequencies(self.model, kind)
            wave = np.asarray(frequencies, dtype=np.float32).reshape(1, 1, -1)
            angles = e.op("Mul", [at, e.inline(f"rope.{kind}_frequencies", wave)])
            cosines, sines = (scaled(e, e.op(function, [angles]), factor) for function in ("Cos", "Sin"))
            self.rotations[kind] = (self._cast(cosines, self.dtype), self._cast(sines, self.dtype))

    def _embed(self, ids: str) -> str:
        """Return the embeddings of the tokens `ids` [B,S] as [B*S,hidden]."""
        e = self.e
        hidden = self._project.rows("model.embed_tokens", e.op("Reshape", [ids, e.ints(-1)]), "/embed_tokens")
        return scaled(e, hidden, self.model.embedding_scale, self.dtype)

    def _cast(self, value: str, dtype: str) -> str:
        """Return float32 `value`, or a value of the graph's type, as `dtype`; float32 graphs need no Cast."""
        return value if self.dtype == "float32" else self.e.op("Cast", [value], to=NUMPY_TO_ONNX[dtype])

    def _layers(self, hidden: str) -> str:
        """Run all layers over the embeddings [B*S,hidden]."""
        for layer in self.plan.layers:
            prefix = f"model.layers.{layer.index}"
            mixed = self._attention(layer, self._norm(f"{prefix}.input_layernorm.weight", hidden))
            hidden = self.e.op("Add", [hidden, self._addend(mixed, f"{prefix}.post_attention_layernorm.weight")])
            inner = self._mlp(prefix, self._norm(self._norm_before_mlp(prefix), hidden))
            hidden = self.e.op("Add", [hidden, self._addend(inner, f"{prefix}.post_feedforward_layernorm.weight")])
        return hidden

    def _norm_before_mlp(self, prefix: str) -> str:
        return norm_before_mlp(self.model, prefix)

    def _addend(self, output: str, post_norm: str) -> str:
        """Return what one half of a layer adds to the residual stream, normalised before where the model does so."""
        if self.model.post_norms:
            output = self._norm(post_norm, output)
        return scaled(self.e, output, self.model.residual_scale, self.dtype)

    def _mlp(self, prefix: str, normed: str) -> str:
        gate = self._project.emit(f"{prefix}.mlp.gate_proj", normed)
        if self.model.activation == GELU_TANH:
            gate = self.e.op("Gelu", [gate], approximate="tanh")
        else:
            gate = self.e.op("Mul", [gate, self.e.op("Sigmoid", [gate])])
        return self._project.emit_of_product(f"{prefix}.mlp.down_proj", gate, f"{prefix}.mlp.up_proj", normed)

    def _attention(self, layer: LayerPlan, normed: str) -> str:
        prefix = f"model.layers.{layer.index}.self_attn"
        query, key = self._scale_query(self._heads(f"{prefix}.q", normed)), self._heads(f"{prefix}.k", normed)
        value = self.e.op("Reshape", [self._project.emit(f"{prefix}.v_proj", normed), self.rows])
        query, key, value = self._split_heads((query, key, value))
        query, key = self._rotate(layer.index, query), self._rotate(layer.index, key)
        return self._project.emit(f"{prefix}.o_proj", self._attend(layer, (query, key, value)))

    def _scale_query(self, query: str) -> str:
        """Put a model's own scale of attention on its queries, so that 1/sqrt(D) is right wherever they go.

        That is done before they are rotated: TensorRT for RTX 1.7 does not compile two multiplications in a row between
        a rotation and Attention.
        """
        scale = self.model.attention_scale
        return query if scale is None else scaled(self.e, query, scale * self.model.head_dim**0.5, self.dtype)

    def _attend(self, layer: LayerPlan, qkv: tuple[str, str, str]) -> str:
        """Attention of this block over the cache, [B*S,Hq*D]; its keys and values are stored on the way.

        `qkv` are [B,H,S,D].
        """
        parts = self.plan.parts_of(layer.index)
        return self._merge_heads(self._attend_parts(parts, qkv, axis=1, width=1))

    def _attend_parts(self, parts: list[PartPlan], qkv: tuple[str, str, str], axis: int, width: int) -> str:
        """Attention of all parts of a layer, in the layout of `qkv`, which have `width` numbers per head on `axis`."""
        widths = self.model.num_heads // self.model.num_kv_heads * width, width, width
        heads = HeadParts(self.e, parts)
        pieces = [heads.split(value, size, axis) for value, size in zip(qkv, widths, strict=True)]
        mixed = [self._attend_part(part, piece) for part, *piece in zip(parts, *pieces, strict=True)]
        return heads.merge(mixed, widths[0], axis)

    def _attend_part(self, part: PartPlan, qkv: list[str]) -> str:
        """Attention of the heads of one part over its cache, in the layout of `qkv`."""
        if part.scores and self._keeps_queries:
            self._window_queries(part, qkv[0])
        return self._attention_over(part, qkv, *self._cache_of(part))

    def _cache_of(self, part: PartPlan) -> tuple[list[str], list[str]]:
        """Declare a part's keys and values as inputs and outputs of the graph, and return both pairs of names."""
        shape: list[int | str] = ["batch", len(part.kv_heads), self._capacity_name(part), self.model.head_dim]
        past, present = ([f"{when}_{kind}.{part.number}" for kind in ("key", "value")] for when in ("past", "present"))
        for name in past:
            self.e.input(name, self.cache_dtype, shape)
        for name in present:
            self.e.output(name, self.cache_dtype, shape)
        return past, present

    def _capacity_name(self, part: PartPlan) -> str:
        """Return what the graph calls the slots of a part's cache; classes of other lengths have other slots."""
        return capacity_name(part.length_class, self.plan.layout.length_classes)

    def _query_heads(self, part: PartPlan) -> int:
        """Return how many query heads read the KV heads of `part`."""
        return len(part.kv_heads) * (self.model.num_heads // self.model.num_kv_heads)

    def _attention_name(self, part: PartPlan) -> str:
        """Return the name of the node in which the queries of `part` meet its keys."""
        return f"/layers.{part.layer}/attention{part.suffix(self.model.num_kv_heads)}"

    def _heads(self, prefix: str, normed: str) -> str:
        """Project to heads, with Qwen3's per-head norm where the model has it: [B,S,H*D]."""
        heads = self._project.emit(f"{prefix}_proj", normed)
        return self._norm_heads(prefix, heads) if self.model.qk_norm else self.e.op("Reshape", [heads, self.rows])

    def _norm_heads(self, prefix: str, heads: str) -> str:
        by_head = self.e.op("Reshape", [heads, self.e.ints(-1, self.model.head_dim)])
        return self.e.op("Reshape", [self._norm(f"{prefix}_norm.weight", by_head), self.rows])

    def _rotate(self, layer: int, heads: str, **attributes: Any) -> str:
        kind = self._rotation_of(layer)
        if kind == UNROTATED:
            return heads
        return self.e.op("RotaryEmbedding", [heads, *self.rotations[kind]], **attributes, **self._rotary_attributes())

    def _rotation_of(self, layer: int) -> str:
        return self.model.rotations[layer] if self.model.rotations else GLOBAL

    def _rotary_attributes(self) -> dict[str, Any]:
        return {} if self.model.rotary_dim is None else {"rotary_embedding_dim": self.model.rotary_dim}

    def _window_queries(self, part: PartPlan, query: str) -> None:
        """Emit the output query.p of a part, from its rotated queries."""
        e, name = self.e, f"query.{part.number}"
        e.op("Slice", [query, self._first_query, e.ints(np.iinfo(np.int64).max), e.ints(2)], [name])
        e.output(name, self.dtype, self._queries_shape(part))

    def _queries_shape(self, part: PartPlan) -> list[int | str]:
        return ["batch", self._query_heads(part), "window", self.model.head_dim]

    def _attention_over(self, part: PartPlan, qkv: list[str], past: list[str], present: list[str]) -> str:
        """Store the keys and values of `qkv` [B,H,S,D] in a part's cache and return its attention [B,Hq,S,D]."""
        e = self.e
        first, visible = self.lengths[part.length_class]
        for old, new, name in zip(past, qkv[1:], present, strict=True):
            e.op("TensorScatter", [old, new, first], [name], name=f"/layers.{part.layer}/store/{name}", axis=2)
        counts = self._query_heads(part), len(part.kv_heads)
        return self._scaled_attention(self._attention_name(part), (qkv[0], present[0], present[1]), visible, counts)

    def _scaled_attention(
        self, name: str, qkv: tuple[str, str, str], visible: str | None, counts: tuple[int, int]
    ) -> str:
        """Emit attention with 1/sqrt(D) already on the query.

        `visible` is the mask, None for a causal one; `counts` are the numbers of query heads and of KV heads.

        Left to the operator, TensorRT's parser puts a fourth root, rounded to the graph's type, on queries and keys: in
        bfloat16 that bends logits by up to half a percent, and it multiplies the whole cache at every step.
        """
        e, cap = self.e, self.model.attention_soft_cap
        query = e.op("Mul", [qkv[0], e.scalar(self.model.head_dim**-0.5, self.dtype)])
        if cap is not None:
            return soft_capped_attention(e, name, (query, *qkv[1:]), visible, cap, counts, self.dtype)
        if visible is None:
            return e.op("Attention", [query, *qkv[1:]], name=name, scale=1.0, is_causal=1)
        return e.op("Attention", [query, *qkv[1:], visible], name=name, scale=1.0)

    def _split_heads(self, qkv: tuple[str, str, str]) -> list[str]:
        """[B,S,H*D] to [B,H,S,D], for query, key and value."""
        e, model = self.e, self.model
        counts = (model.num_heads, model.num_kv_heads, model.num_kv_heads)
        shaped = [e.op("Reshape", [x, e.ints(0, 0, n, model.head_dim)]) for x, n in zip(qkv, counts, strict=True)]
        return [e.op("Transpose", [heads], perm=[0, 2, 1, 3]) for heads in shaped]

    def _merge_heads(self, heads: str) -> str:
        """Bring the output of attention [B,Hq,S,D] to [B*S,Hq*D]."""
        rows = self.e.op("Transpose", [heads], perm=[0, 2, 1, 3])
        return self.e.op("Reshape", [rows, self.e.ints(-1, self.model.num_heads * self.model.head_dim)])

    def _logits(self, hidden: str, places: str) -> None:
        """Norm and vocabulary projection of the asked places only."""
        e, block = self.e, self.e.dim("input_ids", 1)
        batch = e.op("Squeeze", [e.dim("input_ids", 0)])
        first = e.op("Mul", [e.op("Range", [e.const(0, "int64"), batch, e.const(1, "int64")]), block])
        flat = e.op("Reshape", [e.op("Add", [places, e.op("Unsqueeze", [first, e.ints(1)])]), e.ints(-1)])
        normed = self._norm("model.norm.weight", e.op("Gather", [hidden, flat]))
        head = "model.embed_tokens" if self.model.tie_word_embeddings else "lm_head"
        scores = self._cast(self._project.head(head, normed), "float32")
        scores = scaled(e, scores, 1 / self.model.logit_divisor)
        if self.model.logit_soft_cap is not None:
            scores = soft_cap(e, scores, self.model.logit_soft_cap, "float32")
        shape = e.op("Concat", [e.op("Shape", [places]), e.ints(self.model.vocab_size)], axis=0)
        e.op("Reshape", [scores, shape], ["logits"])
        e.output("logits", "float32", ["batch", "logit_count", self.model.vocab_size])

    def _norm(self, name: str, value: str) -> str:
        weight = self.e.weight(self.weights[name])
        return self.e.op("RMSNormalization", [value, weight], name="/" + name, axis=-1, epsilon=self.model.rms_norm_eps)
