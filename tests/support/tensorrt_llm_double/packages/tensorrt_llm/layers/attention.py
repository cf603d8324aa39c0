"""Attention, which calls the module's own gpt_attention once per layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tensorrt_llm import functional as f
from tensorrt_llm.functional import PositionEmbeddingType, RotaryScalingType, constant, gpt_attention
from tensorrt_llm.layers.basic import ColumnLinear, RowLinear
from tensorrt_llm.module import Module, Parameter
from tensorrt_llm.quantization import QuantMode


@dataclass
class AttentionParams:
    sequence_length: Any = None
    context_lengths: Any = None
    host_context_lengths: Any = None
    max_context_length: Any = None
    host_request_types: Any = None
    encoder_input_lengths: Any = None
    host_runtime_perf_knobs: Any = None
    host_context_progress: Any = None
    embed_positions_for_gpt_attention: Any = None
    rotary_inv_freq: Any = None


@dataclass
class KeyValueCacheParams:
    past_key_value: Any = None
    host_past_key_value_lengths: Any = None
    host_max_attention_window_sizes: Any = None
    host_sink_token_length: Any = None
    kv_cache_block_offsets: Any = None
    host_kv_cache_block_offsets: Any = None
    host_kv_cache_pool_pointers: Any = None
    host_kv_cache_pool_mapping: Any = None
    cache_indirection: Any = None


class Attention(Module):
    """Reads its sizes per rank from the model's configuration."""

    def __init__(self, config: Any, local_layer_idx: int, dtype: Any) -> None:
        mapping = self._mapping = config.mapping
        self._config, self._layer = config, local_layer_idx
        self._heads = config.num_attention_heads // mapping.tp_size
        self._kv_heads = -(-config.num_key_value_heads // mapping.tp_size)
        self._size = config.head_size
        self._kind = PositionEmbeddingType[config.position_embedding_type]
        outputs = (self._heads + 2 * self._kv_heads) * self._size * mapping.tp_size
        self.qkv = ColumnLinear(config.hidden_size, outputs, config.attn_bias, dtype, mapping)
        self.dense = RowLinear(
            config.num_attention_heads * self._size, config.hidden_size, config.dense_bias, dtype, mapping
        )
        if config.qk_layernorm:
            self.q_layernorm, self.k_layernorm = Parameter((self._size,), dtype), Parameter((self._size,), dtype)
        if config.quant_mode.has_kv_cache_quant():
            from tensorrt import float32

            self.kv_cache_scaling_factor = Parameter((1,), float32)

    def forward(
        self,
        hidden_states: f.Tensor,
        use_cache: bool = False,
        kv_cache_params: KeyValueCacheParams | None = None,
        attention_params: AttentionParams | None = None,
    ) -> Any:
        qkv = self.qkv(hidden_states)
        if self._config.qk_layernorm:
            sizes = (self._heads, self._kv_heads, self._size)
            weights = self.q_layernorm.value, self.k_layernorm.value
            qkv = f.split_qk_norm(qkv, *weights, self._config.norm_epsilon, sizes)
        keywords = self._keywords(kv_cache_params, attention_params)
        context, past_key_value = gpt_attention(qkv=qkv, use_cache=use_cache, **keywords)
        if context.dtype is not qkv.dtype:
            context = f.cast(context, qkv.dtype)
        return self.dense(context), past_key_value

    def _keywords(self, kv: KeyValueCacheParams, attention: AttentionParams) -> dict[str, Any]:
        config, mapping, kv_scales = self._config, self._mapping, {}
        if config.quant_mode.has_kv_cache_quant():
            scale = self.kv_cache_scaling_factor.value
            kv_scales = {"kv_orig_quant_scale": constant(np.ones(1, np.float32)) / scale, "kv_quant_orig_scale": scale}
        lengths = ("host_past_key_value_lengths", "host_max_attention_window_sizes", "host_sink_token_length")
        cache = ("kv_cache_block_offsets", "host_kv_cache_block_offsets", "host_kv_cache_pool_pointers")
        rest = ("host_kv_cache_pool_mapping", "cache_indirection")
        steps = ("sequence_length", "context_lengths", "host_context_lengths", "max_context_length")
        hosts = ("host_request_types", "host_runtime_perf_knobs", "host_context_progress")
        return {
            **{name: getattr(kv, name) for name in (*lengths, *cache, *rest)},
            **{name: getattr(attention, name) for name in (*steps, *hosts)},
            "past_key_value": kv.past_key_value[0],
            "layer_idx": self._layer,
            **{"num_heads": self._heads, "num_kv_heads": self._kv_heads, "hidden_size_per_head": self._size},
            **{"q_scaling": 1.0, "kv_cache_quant_mode": QuantMode(config.quant_mode)},
            **{"tp_size": mapping.tp_size, "tp_rank": mapping.tp_rank},
            **{"cp_group": [mapping.rank], "cp_size": mapping.cp_size, "cp_rank": mapping.cp_rank},
            "position_embedding_type": self._kind,
            **(self._rotary(attention) if self._kind.is_rope() else {}),
            **kv_scales,
            "num_kv_heads_origin": config.num_key_value_heads,
        }

    def _rotary(self, attention: AttentionParams) -> dict[str, Any]:
        config = self._config
        scaling = config.rotary_scaling or {}
        kind = scaling.get("rope_type") or scaling.get("type") or "none"
        return {
            "rotary_embedding_dim": self._size,
            "rotary_embedding_base": config.rotary_base,
            "rotary_embedding_scale_type": RotaryScalingType.from_string(kind),
            "rotary_embedding_scale": float(scaling.get("factor", 1.0)),
            "rotary_embedding_max_positions": config.max_position_embeddings,
            "rotary_cos_sin": attention.embed_positions_for_gpt_attention,
            "rotary_inv_freq": attention.rotary_inv_freq,
        }


def rotary_tables(config: Any) -> tuple[Parameter, Parameter]:
    """Return inverse frequencies and the table as parameters of the model, shared by all layers."""
    scaling = config.rotary_scaling or {}
    kind = RotaryScalingType.from_string(scaling.get("rope_type") or scaling.get("type") or "none")
    make = f.RopeEmbeddingUtils.create_sinusoidal_positions_for_attention_plugin
    inverse, table = make(
        config.max_position_embeddings,
        config.head_size,
        config.rotary_base,
        float(scaling.get("factor", 1.0)),
        kind,
        config.rotary_scaling,
    )
    from tensorrt import float32

    buffers = [Parameter(array.shape, float32, is_buffer=True) for array in (inverse, table)]
    for buffer, array in zip(buffers, (inverse, table), strict=True):
        buffer.load(array)
    return buffers[0], buffers[1]
