"""Attention, which calls the module's own gpt_attention once per layer."""

from __future__ import annotations

from typing import Any

import tensorrt as trt

from tensorrt_llm import functional as f
from tensorrt_llm.functional import PositionEmbeddingType, RotaryScalingType, gpt_attention


class Attention:
    """One layer; reads its sizes per rank from the model's configuration, its weights from the model."""

    def __init__(self, model: Any, local_layer_idx: int) -> None:
        self._model, self._config, self._layer = model, model.config, local_layer_idx

    def forward(self, hidden_states: f.Tensor, use_cache: bool, attention_params: Any) -> tuple[f.Tensor, Any]:
        own = f"transformer.layers.{self._layer}.attention."
        qkv = f.matmul(hidden_states, self._model.weight(own + "qkv.weight"))
        keywords = {**vars(attention_params), **self._sizes(), **self._scales(own)}
        context, past_key_value = gpt_attention(qkv=qkv, use_cache=use_cache, past_key_value=None, **keywords)
        return self._model.row_linear(context, own + "dense.weight"), past_key_value

    def _sizes(self) -> dict[str, Any]:
        config, mapping = self._config, self._config.mapping
        kind, scaling = PositionEmbeddingType[config.position_embedding_type], config.rotary_scaling or {}
        rotary = {
            "rotary_embedding_dim": config.head_size,
            "rotary_embedding_base": config.rotary_base,
            "rotary_embedding_scale_type": RotaryScalingType[scaling.get("rope_type") or "none"],
            "rotary_embedding_scale": float(scaling.get("factor", 1.0)),
            "rotary_embedding_max_positions": config.max_position_embeddings,
        }
        return {
            **(rotary if kind.is_rope() else {}),
            **{"position_embedding_type": kind, "layer_idx": self._layer, "q_scaling": 1.0},
            **{"num_heads": config.num_attention_heads // mapping.tp_size},
            **{"num_kv_heads": -(-config.num_key_value_heads // mapping.tp_size)},
            **{"hidden_size_per_head": config.head_size, "kv_cache_quant_mode": config.quant_mode},
            **{"tp_size": mapping.tp_size, "tp_rank": mapping.tp_rank, "cp_size": mapping.cp_size},
            "num_kv_heads_origin": config.num_key_value_heads,
        }

    def _scales(self, own: str) -> dict[str, Any]:
        if not self._config.quant_mode.has_kv_cache_quant():
            return {}
        scale = self._model.weight(own + "kv_cache_scaling_factor", trt.float32)
        return {"kv_orig_quant_scale": f.record("reciprocal", scale), "kv_quant_orig_scale": scale}
