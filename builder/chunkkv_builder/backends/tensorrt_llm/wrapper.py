"""The one place where ChunkKV enters a TensorRT-LLM network: around gpt_attention, as the attention layers call it.

GPTAttention is told a position-free attention (queries and keys are rotated before it, by logical positions) and the
number of tokens that the cache really holds. Behind a group's leader the kept tokens move to the front of the cache.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from chunkkv.engine.preconditions import BUILD_PRECONDITIONS, build_values, check
from chunkkv.engine.tensorrt_llm_side_file import KV_ITEM_BYTES, RankLayers
from chunkkv.errors import BackendUnavailableError, BuildError, ConfigError
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.backends.tensorrt_llm.library import FieldValues, Plugins
from chunkkv_builder.backends.tensorrt_llm.preconditions import LAYER_PRECONDITIONS

_STATE = "_chunkkv"  # the attribute of a network that holds what its layers share
_HOST_INPUTS = (
    *("host_request_types", "host_context_lengths", "host_past_key_value_lengths", "host_kv_cache_block_offsets"),
    *("host_kv_cache_pool_pointers", "host_kv_cache_pool_mapping"),
)
# The fields of settings that every plugin has which chooses or counts tokens.
_SETTING_FIELDS = (
    *("window", "sinks", "chunk_size", "boundaries", "pooling", "score"),
    *("keep_per_10k", "budget_tokens", "min_tokens"),
    *("window_reduce", "head_reduce", "value_norm"),
)
# What takes GPTAttention's own rotation away.
_UNROTATED = {"rotary_embedding_dim": 0, "rotary_embedding_scale": 1.0, "rotary_inv_freq": None, "rotary_cos_sin": None}


@dataclass(frozen=True)
class RankBuild:
    """What ChunkKV does in one rank's network.

    Parameters
    ----------
    settings : ChunkKVSettings
        Settings, with the layer groups of the whole model.
    layers : RankLayers
        The groups of this rank, in its own numbers.
    plugins : Plugins
        Adds the nodes.
    vocab_size : int
        Tokens of the vocabulary.
    max_length : int
        The longest prompt in tokens that a runtime may send.
    delimiter_words : int32 array or None, default None
        The table of delimiter tokens, see library.delimiter_words; present with delimiter boundaries only.
    tp_group : tuple of int, default empty
        The tensor-parallel ranks that add up their chunk scores; empty where each chooses by its own heads.
    rotary_table : float32 array or None, default None
        The table that takes the place of the model's own, which is too short; see rotary.stretched_table.
    """

    settings: ChunkKVSettings
    layers: RankLayers
    plugins: Plugins
    vocab_size: int
    max_length: int
    delimiter_words: np.ndarray | None = None
    tp_group: tuple[int, ...] = ()
    rotary_table: np.ndarray | None = None


@dataclass(frozen=True)
class AttentionShape:
    """Cache and positions of a network, as its first attention layer has them; all layers must have the same.

    Parameters
    ----------
    num_heads, num_kv_heads, head_size : int
        Query heads, KV heads and size of a head of this rank.
    kv_dtype : str
        Type of a cached number, a key of KV_ITEM_BYTES.
    tokens_per_block : int
        Tokens in one block of the paged KV cache.
    mapping_rank : int
        Dimensions of the input host_kv_cache_pool_mapping, which differ between versions.
    max_positions : int or None
        Rows of the rotary table, None for models without one.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    kv_dtype: str
    tokens_per_block: int
    mapping_rank: int
    max_positions: int | None

    def head_fields(self) -> FieldValues:
        """Return the plugin fields of the heads."""
        return {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, "head_size": self.head_size}


@dataclass
class WrappedLayers:
    """The attention layers that were wrapped so far.

    `layers` are their local numbers in the order of their calls; `shape` is the network's once the first was wrapped.
    """

    layers: list[int] = field(default_factory=list)
    shape: AttentionShape | None = None

    def check_complete(self, expected: RankLayers) -> AttentionShape:
        """Return the shape; raises BuildError unless every layer of the rank was wrapped once, in order."""
        if self.layers != list(range(expected.num_layers)) or self.shape is None:
            raise BuildError(
                f"{len(self.layers)} attention layers were given ChunkKV, rank {expected.rank} has "
                f"{expected.num_layers}: this model has attention of another kind and is not supported"
            )
        return self.shape


@contextmanager
def injected(rank: RankBuild) -> Iterator[WrappedLayers]:
    """Wrap gpt_attention while the block runs; whatever happens in it, the original is put back."""
    from tensorrt_llm.layers import attention
    from tensorrt_llm.quantization import layers as quantized

    # SmoothQuant, FP8 by row and QServe have attention layers in a module of their own.
    originals = [(module, module.gpt_attention) for module in (attention, quantized)]
    wrapped = WrappedLayers()
    for module, original in originals:
        module.gpt_attention = _wrapper(original, rank, wrapped)
    try:
        yield wrapped
    finally:
        for module, original in originals:
            module.gpt_attention = original


def _wrapper(original: Callable[..., Any], rank: RankBuild, wrapped: WrappedLayers) -> Callable[..., Any]:
    parameters = inspect.signature(original).parameters
    defaults = {
        name: parameter.default for name, parameter in parameters.items() if parameter.default is not parameter.empty
    }

    @functools.wraps(original)
    def chunkkv_gpt_attention(**keywords: Any) -> tuple[Any, None]:
        from tensorrt_llm._common import default_net

        net, keywords = default_net(), {**defaults, **keywords}
        check(BUILD_PRECONDITIONS, build_values(net.plugin_config))
        check(LAYER_PRECONDITIONS, keywords)
        _check_host_inputs(keywords)
        if not hasattr(net, _STATE):
            setattr(net, _STATE, _Network(rank, net, keywords))
        network: _Network = getattr(net, _STATE)
        layer = network.next_layer(keywords, _shape_of(keywords, net.plugin_config, rank.rotary_table))
        changed, qkv = network.rotated(keywords)
        context, present = original(**{**changed, "qkv": qkv, "sequence_length": network.attention_lengths})
        if present is not None or isinstance(context, tuple):
            raise BuildError(
                "gpt_attention gave more than one output: give --kv_cache_type paged --fuse_fp4_quant disable"
            )
        wrapped.layers.append(layer)
        wrapped.shape = network.shape
        return network.compressed(layer, context, qkv, keywords), None

    return chunkkv_gpt_attention


class _Network:
    """One network's ChunkKV nodes: Prepare once, then per layer Rope and, where the group says so, Compress."""

    def __init__(self, rank: RankBuild, net: Any, keywords: dict[str, Any]) -> None:
        self._rank, self.shape = rank, _shape_of(keywords, net.plugin_config, rank.rotary_table)
        self._rotary_table: Any = None  # the constant of rank.rotary_table
        self._group_of = {layer: group for group in rank.layers.groups for layer in group}
        self._in_pool: dict[int, int] = {}
        self._kept_indices: dict[int, Any] = {}  # by leader
        self._done: Any = None  # what the next Rope waits for
        self._last = len(self._group_of) - 1
        outputs = self._add("ChunkKVPrepare", self._prepare_fields(), self._prepare_inputs(net, keywords))
        self.attention_lengths, self._kept_lengths, self._row_starts, self._positions = outputs[:4]
        self._is_delimiter = outputs[4:]

    def next_layer(self, keywords: dict[str, Any], shape: AttentionShape) -> int:
        """Return the local number of the layer that calls; raises ConfigError for one that does not fit the others."""
        layer = keywords["layer_idx"]
        if layer not in self._group_of or layer in self._in_pool:
            raise ConfigError(
                f"layer_idx is {layer}; expected is each of 0 to {len(self._group_of) - 1} once: this model has "
                "attention of another kind and is not supported"
            )
        if shape != self.shape:
            raise ConfigError(
                f"layer {layer} has {shape}, the first one {self.shape}; all layers must be alike: this model is not "
                "supported"
            )
        # Where a version has no such keyword the mapping itself says the place.
        place = keywords.get("layer_idx_in_cache_pool")
        self._in_pool[layer] = layer if place is None else place
        return layer

    def rotated(self, keywords: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """Return the keywords for a position-free GPTAttention, and qkv with rotated queries and keys."""
        kind = keywords["position_embedding_type"]
        if not kind.is_rope():
            return keywords, keywords["qkv"]
        rotary = {
            **self.shape.head_fields(),
            "rotary_dim": keywords["rotary_embedding_dim"],
            "neox": int(kind.name != "rope_gptj"),
            "max_positions": self.shape.max_positions,
        }
        waits = [] if self._done is None else [self._done]
        inputs = [keywords["qkv"], self._positions, self._table(keywords), *waits]
        qkv = self._add("ChunkKVRope", {**rotary, "behind": len(waits)}, inputs)[0]
        changes = {
            **_UNROTATED,
            "position_embedding_type": type(kind).learned_absolute,
            "rotary_embedding_scale_type": type(keywords["rotary_embedding_scale_type"]).none,
        }
        return {**keywords, **changes}, qkv

    def _table(self, keywords: dict[str, Any]) -> Any:
        from tensorrt_llm.functional import constant

        if self._rank.rotary_table is None:
            return keywords["rotary_cos_sin"]
        if self._rotary_table is None:
            self._rotary_table = constant(self._rank.rotary_table)
        return self._rotary_table

    def compressed(self, layer: int, context: Any, qkv: Any, keywords: dict[str, Any]) -> Any:
        """Return attention's output, with the node behind it that compacts caches where this layer has one.

        Somebody must wait for that node, or TensorRT cuts it away. The next layer's Rope does, by a tensor that is
        never read; behind the last layer, and where no layer rotates, the node passes attention's output on.
        """
        group = self._group_of[layer]
        leader = self._rank.layers.leaders[self._rank.layers.groups.index(group)]
        if layer < leader:
            return context
        if layer == leader:
            # The caches of earlier layers of the group are complete: one launch compacts them all.
            layers = tuple(each for each in group if each <= leader)
            role, source = self._chosen_by(qkv, keywords)
        else:
            layers, role, source = (layer,), "follower", self._kept_indices[leader]
        orders_only = int(layer < self._last and self.shape.max_positions is not None)
        out, *kept = self._compress(role, layers, context, source, keywords, orders_only)
        if kept:
            self._kept_indices[leader] = kept[0]
        if not orders_only:
            return out
        self._done = out
        return context

    def _chosen_by(self, qkv: Any, keywords: dict[str, Any]) -> tuple[str, Any]:
        if not self._rank.tp_group:
            return "leader", qkv
        lengths = (keywords["context_lengths"], self._row_starts, keywords["host_request_types"])
        inputs = [qkv, *lengths, keywords["host_context_lengths"], *self._is_delimiter]
        fields = {**self._choice_fields(), **self.shape.head_fields()}
        (scores,) = self._add("ChunkKVScore", fields, inputs)
        return "ranker", _sum_over_ranks(scores, list(self._rank.tp_group))

    def _compress(
        self,
        role: str,
        layers: tuple[int, ...],
        context: Any,
        source: Any,
        keywords: dict[str, Any],
        orders_only: int,
    ) -> list[Any]:
        fields = {
            **self._choice_fields(),
            **self.shape.head_fields(),
            "role": role,
            "layers": np.array(layers),
            "layer_in_pool": np.array([self._in_pool[layer] for layer in layers]),
            "tokens_per_block": self.shape.tokens_per_block,
            "kv_bytes": KV_ITEM_BYTES[self.shape.kv_dtype],
            "mapping_rank": self.shape.mapping_rank,
            "order_only": orders_only,
        }
        inputs = [
            *(context, source, self._kept_lengths, self._row_starts, keywords["context_lengths"]),
            *(keywords["host_request_types"], keywords["host_context_lengths"], keywords["kv_cache_block_offsets"]),
            *(keywords["host_kv_cache_pool_pointers"], keywords["host_kv_cache_pool_mapping"]),
            *([] if role == "follower" else self._is_delimiter),
        ]
        return self._add("ChunkKVCompress", fields, inputs)

    def _choice_fields(self) -> FieldValues:
        values = {name: getattr(self._rank.settings, name) for name in _SETTING_FIELDS}
        return {**values, "max_length": self._rank.max_length}

    def _prepare_fields(self) -> FieldValues:
        words = self._rank.delimiter_words
        fields = {**self._choice_fields(), "tokens_per_block": self.shape.tokens_per_block}
        return fields if words is None else {**fields, "vocab_size": self._rank.vocab_size, "delimiter_bitmap": words}

    def _prepare_inputs(self, net: Any, keywords: dict[str, Any]) -> list[Any]:
        names = ("sequence_length", "context_lengths", *_HOST_INPUTS[:4], "qkv")
        tokens = []
        if self._rank.delimiter_words is not None:
            if "input_ids" not in net._inputs:
                raise ConfigError(
                    "boundaries is 'delimiter', but this network has no input_ids: give --chunkkv_boundaries fixed"
                )
            tokens = [net._inputs["input_ids"]]
        return [keywords[name] for name in names] + tokens

    def _add(self, name: str, fields: FieldValues, inputs: list[Any]) -> list[Any]:
        return self._rank.plugins.add_node(name, fields, inputs)


def _check_host_inputs(keywords: dict[str, Any]) -> None:
    """Raise BuildError where a host tensor is no network input: TensorRT would then pass its address on the GPU."""
    for name in _HOST_INPUTS:
        if not getattr(keywords[name], "is_network_input", True):
            raise BuildError(f"{name} is computed in the network; the plugins read it on the host: not supported")


def _shape_of(keywords: dict[str, Any], plugin_config: Any, rotary_table: np.ndarray | None) -> AttentionShape:
    heads, kv_heads = keywords["num_heads"], keywords["num_kv_heads"]
    if heads % kv_heads:
        raise ConfigError(f"num_heads is {heads}, no multiple of num_kv_heads = {kv_heads}: this is not supported")
    rows = None
    if keywords["position_embedding_type"].is_rope():
        table, width = keywords["rotary_cos_sin"], keywords["rotary_embedding_dim"]
        if table is None:
            raise ConfigError("rotary_cos_sin is none; the model must hand its rotary table to gpt_attention")
        rows = int(np.prod(tuple((table if rotary_table is None else rotary_table).shape))) // width
        if rows < keywords["max_context_length"]:
            raise ConfigError(
                f"max_input_len is {keywords['max_context_length']}, beyond the {rows} positions of the rotary table: "
                f"give --max_input_len {rows} or less"
            )
    return AttentionShape(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=keywords["hidden_size_per_head"],
        kv_dtype=_kv_dtype(keywords),
        tokens_per_block=plugin_config.tokens_per_block,
        mapping_rank=keywords["host_kv_cache_pool_mapping"].ndim(),
        max_positions=rows,
    )


def _kv_dtype(keywords: dict[str, Any]) -> str:
    from tensorrt_llm._utils import trt_dtype_to_str

    mode = keywords["kv_cache_quant_mode"]
    if mode.has_int8_kv_cache():
        return "int8"
    if mode.has_fp8_kv_cache():
        return "fp8"
    name = "another quantisation" if mode.has_kv_cache_quant() else trt_dtype_to_str(keywords["qkv"].dtype)
    if name not in KV_ITEM_BYTES:
        raise ConfigError(
            f"the KV cache is of {name}; allowed is {', '.join(KV_ITEM_BYTES)}: convert the checkpoint again"
        )
    return name


def _sum_over_ranks(scores: Any, group: list[int]) -> Any:
    """Return the sum of `scores` (float32) over the ranks in `group`, the same bits on each of them.

    TensorRT-LLM reduces in the type of its NCCL plugin, which is set to float32 for this one node: in 16 bits many
    chunks would tie. NCCL is asked for by name, because the faster strategies choose by message size.
    """
    from tensorrt_llm import functional
    from tensorrt_llm._common import default_net

    parameters = inspect.signature(functional.allreduce).parameters
    strategy = functional.AllReduceStrategy.NCCL
    if "all_reduce_params" in parameters:
        options = {"all_reduce_params": functional.AllReduceParams(strategy=strategy)}
    elif "strategy" in parameters:
        options = {"strategy": strategy}
    else:
        raise BackendUnavailableError(
            f"tensorrt_llm.functional.allreduce takes {', '.join(parameters)}, none of which is a strategy: leave "
            "--chunkkv_tp_agree out"
        )
    config = default_net().plugin_config
    before = config.nccl_plugin
    config.nccl_plugin = "float32"
    try:
        return functional.allreduce(scores, group, **options)
    finally:
        config.nccl_plugin = before
