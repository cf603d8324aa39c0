"""The one place where ChunkKV enters a TensorRT-LLM network: around layers.attention.gpt_attention.

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
from chunkkv.errors import BuildError, ConfigError
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.backends.tensorrt_llm import plugins as nodes
from chunkkv_builder.backends.tensorrt_llm.allreduce import sum_over_ranks
from chunkkv_builder.backends.tensorrt_llm.library import Plugins
from chunkkv_builder.backends.tensorrt_llm.preconditions import LAYER_PRECONDITIONS

_STATE = "_chunkkv"  # the attribute of a network that holds what its layers share
_HOST_INPUTS = (
    *("host_request_types", "host_context_lengths", "host_past_key_value_lengths", "host_kv_cache_block_offsets"),
    *("host_kv_cache_pool_pointers", "host_kv_cache_pool_mapping"),
)
# What takes GPTAttention's own rotation away.
_UNROTATED = {"rotary_embedding_dim": 0, "rotary_embedding_scale": 1.0, "rotary_inv_freq": None, "rotary_cos_sin": None}


@dataclass(frozen=True)
class Rank:
    """What ChunkKV does in one rank's network.

    `max_length` is the longest prompt in tokens that may come; `delimiter_words` are given with delimiter boundaries
    only, `tp_group` (ranks) where scores are added up.
    """

    settings: ChunkKVSettings
    layers: RankLayers
    plugins: Plugins
    vocab_size: int
    max_length: int
    delimiter_words: np.ndarray | None = None
    tp_group: tuple[int, ...] = ()


@dataclass(frozen=True)
class Shape:
    """The cache and positions of a network, as its first attention layer has them; all layers must have the same."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    kv_dtype: str
    tokens_per_block: int
    mapping_rank: int
    max_positions: int | None

    def head_fields(self) -> nodes.Fields:
        """Return the plugin fields of the heads."""
        return {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, "head_size": self.head_size}


@dataclass
class Injection:
    """What was wrapped so far: local layer numbers in order, and the network's shape once it is known."""

    layers: list[int] = field(default_factory=list)
    shape: Shape | None = None

    def check_complete(self, expected: RankLayers) -> Shape:
        """Return the shape; raises BuildError unless every layer of the rank was wrapped once, in order."""
        if self.layers != list(range(expected.num_layers)) or self.shape is None:
            raise BuildError(
                f"{len(self.layers)} attention layers were given ChunkKV, rank {expected.rank} has "
                f"{expected.num_layers}: this model has attention of another kind and is not supported"
            )
        return self.shape


@contextmanager
def injected(rank: Rank) -> Iterator[Injection]:
    """Wrap gpt_attention while the block runs; whatever happens in it, the original is put back."""
    from tensorrt_llm.layers import attention

    original = attention.gpt_attention
    injection = Injection()
    attention.gpt_attention = _wrapped(original, rank, injection)
    try:
        yield injection
    finally:
        attention.gpt_attention = original


def _wrapped(original: Callable[..., Any], rank: Rank, injection: Injection) -> Callable[..., Any]:
    parameters = inspect.signature(original).parameters
    defaults = {name: each.default for name, each in parameters.items() if each.default is not each.empty}

    @functools.wraps(original)
    def chunkkv_gpt_attention(**given: Any) -> tuple[Any, None]:
        from tensorrt_llm._common import default_net

        net, given = default_net(), {**defaults, **given}
        check(BUILD_PRECONDITIONS, build_values(net.plugin_config))
        check(LAYER_PRECONDITIONS, given)
        _check_host_inputs(given)
        if not hasattr(net, _STATE):
            setattr(net, _STATE, _Network(rank, net, given))
        network: _Network = getattr(net, _STATE)
        layer = network.next_layer(given, _shape_of(given, net.plugin_config))
        changed, qkv = network.rotated(given)
        context, present = original(**{**changed, "qkv": qkv, "sequence_length": network.attention_lengths})
        if present is not None or isinstance(context, tuple):
            raise BuildError(
                "gpt_attention gave more than one output: give --kv_cache_type paged --fuse_fp4_quant disable"
            )
        injection.layers.append(layer)
        injection.shape = network.shape
        return network.compressed(layer, context, qkv, given), None

    return chunkkv_gpt_attention


class _Network:
    """One network's ChunkKV nodes: Prepare once, then per layer Rope and, where the group says so, Compress."""

    def __init__(self, rank: Rank, net: Any, given: dict[str, Any]) -> None:
        self._rank, self.shape = rank, _shape_of(given, net.plugin_config)
        self._group_of = {layer: group for group in rank.layers.groups for layer in group}
        self._in_pool: dict[int, int] = {}
        self._kept_indices: dict[int, Any] = {}  # by leader
        outputs = self._add("ChunkKVPrepare", self._prepare_fields(), self._prepare_inputs(net, given))
        self.attention_lengths, self._kept_lengths, self._row_starts, self._positions = outputs[:4]
        self._is_delimiter = outputs[4:]

    def next_layer(self, given: dict[str, Any], shape: Shape) -> int:
        """Return the local number of the layer that calls; raises ConfigError for one that does not fit the others."""
        layer = given["layer_idx"]
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
        place = given.get("layer_idx_in_cache_pool")
        self._in_pool[layer] = layer if place is None else place
        return layer

    def rotated(self, given: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """Return the keywords for a position-free GPTAttention, and qkv with rotated queries and keys."""
        kind = given["position_embedding_type"]
        if not kind.is_rope():
            return given, given["qkv"]
        rotary = {
            **self.shape.head_fields(),
            "rotary_dim": given["rotary_embedding_dim"],
            "neox": int(kind.name != "rope_gptj"),
            "max_positions": self.shape.max_positions,
        }
        qkv = self._add("ChunkKVRope", rotary, [given["qkv"], self._positions, given["rotary_cos_sin"]])[0]
        changes = {
            **_UNROTATED,
            "position_embedding_type": type(kind).learned_absolute,
            "rotary_embedding_scale_type": type(given["rotary_embedding_scale_type"]).none,
        }
        return {**given, **changes}, qkv

    def compressed(self, layer: int, context: Any, qkv: Any, given: dict[str, Any]) -> Any:
        """Return attention's output, behind the node that compacts caches where this layer has one."""
        group = self._group_of[layer]
        leader = self._rank.layers.leaders[self._rank.layers.groups.index(group)]
        if layer == leader:
            # A leader that comes last finds every cache of its group complete and compacts them all.
            layers = group if leader == group[-1] else (layer,)
            role, source = self._chosen_by(qkv, given)
            context, self._kept_indices[leader] = self._compress(role, layers, context, source, given)
        elif leader < layer:
            (context,) = self._compress("follower", (layer,), context, self._kept_indices[leader], given)
        return context

    def _chosen_by(self, qkv: Any, given: dict[str, Any]) -> tuple[str, Any]:
        if not self._rank.tp_group:
            return "leader", qkv
        lengths = (given["context_lengths"], self._row_starts, given["host_request_types"])
        inputs = [qkv, *lengths, given["host_context_lengths"], *self._is_delimiter]
        fields = {**self._choice_fields(), **self.shape.head_fields()}
        (scores,) = self._add("ChunkKVScore", fields, inputs)
        return "ranker", sum_over_ranks(scores, list(self._rank.tp_group))

    def _compress(
        self, role: str, layers: tuple[int, ...], context: Any, source: Any, given: dict[str, Any]
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
        }
        inputs = [
            *(context, source, self._kept_lengths, self._row_starts, given["context_lengths"]),
            *(given["host_request_types"], given["host_context_lengths"], given["kv_cache_block_offsets"]),
            *(given["host_kv_cache_pool_pointers"], given["host_kv_cache_pool_mapping"]),
            *([] if role == "follower" else self._is_delimiter),
        ]
        return self._add("ChunkKVCompress", fields, inputs)

    def _choice_fields(self) -> nodes.Fields:
        return {**nodes.settings_fields(self._rank.settings), "max_length": self._rank.max_length}

    def _prepare_fields(self) -> nodes.Fields:
        words = self._rank.delimiter_words
        fields = {**self._choice_fields(), "tokens_per_block": self.shape.tokens_per_block}
        return fields if words is None else {**fields, "vocab_size": self._rank.vocab_size, "delimiter_bitmap": words}

    def _prepare_inputs(self, net: Any, given: dict[str, Any]) -> list[Any]:
        names = ("sequence_length", "context_lengths", *_HOST_INPUTS[:4], "qkv")
        tokens = []
        if self._rank.delimiter_words is not None:
            if "input_ids" not in net._inputs:
                raise ConfigError(
                    "boundaries is 'delimiter', but this network has no input_ids: give --chunkkv_boundaries fixed"
                )
            tokens = [net._inputs["input_ids"]]
        return [given[name] for name in names] + tokens

    def _add(self, name: str, fields: nodes.Fields, inputs: list[Any]) -> list[Any]:
        return nodes.add(self._rank.plugins, name, fields, inputs)


def _check_host_inputs(given: dict[str, Any]) -> None:
    """Raise BuildError where a host tensor is no network input: TensorRT would read its address on the GPU."""
    for name in _HOST_INPUTS:
        if not getattr(given[name], "is_network_input", True):
            raise BuildError(f"{name} is computed in the network; the plugins read it on the host: not supported")


def _shape_of(given: dict[str, Any], plugin_config: Any) -> Shape:
    heads, kv_heads = given["num_heads"], given["num_kv_heads"]
    if heads % kv_heads:
        raise ConfigError(f"num_heads is {heads}, no multiple of num_kv_heads = {kv_heads}: this is not supported")
    rows = None
    if given["position_embedding_type"].is_rope():
        table, width = given["rotary_cos_sin"], given["rotary_embedding_dim"]
        if table is None:
            raise ConfigError("rotary_cos_sin is none; the model must hand its rotary table to gpt_attention")
        rows = int(np.prod(tuple(table.shape))) // width
        if rows < given["max_context_length"]:
            raise ConfigError(
                f"max_input_len is {given['max_context_length']}, beyond the {rows} positions of the rotary table: "
                f"give --max_input_len {rows} or less"
            )
    return Shape(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=given["hidden_size_per_head"],
        kv_dtype=_kv_dtype(given),
        tokens_per_block=plugin_config.tokens_per_block,
        mapping_rank=given["host_kv_cache_pool_mapping"].ndim(),
        max_positions=rows,
    )


def _kv_dtype(given: dict[str, Any]) -> str:
    from tensorrt_llm._utils import trt_dtype_to_str

    mode = given["kv_cache_quant_mode"]
    if mode.has_int8_kv_cache():
        return "int8"
    if mode.has_fp8_kv_cache():
        return "fp8"
    name = "another quantisation" if mode.has_kv_cache_quant() else trt_dtype_to_str(given["qkv"].dtype)
    if name not in KV_ITEM_BYTES:
        raise ConfigError(
            f"the KV cache is of {name}; allowed is {', '.join(KV_ITEM_BYTES)}: convert the checkpoint again"
        )
    return name
