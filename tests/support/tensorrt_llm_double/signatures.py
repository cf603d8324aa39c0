"""The keywords of gpt_attention with their defaults; all are keyword-only."""

from __future__ import annotations

import inspect
from typing import Any

_REQUIRED = ["qkv", "past_key_value", "sequence_length", "host_past_key_value_lengths"]
_REQUIRED += ["host_max_attention_window_sizes", "host_sink_token_length", "context_lengths", "cache_indirection"]
_REQUIRED += ["host_request_types", "layer_idx", "num_heads", "num_kv_heads", "hidden_size_per_head", "q_scaling"]
_MLA = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_CROSS = ("cross_kv", "cross_kv_length", "encoder_input_lengths", "relative_attention_bias", "logn_scaling")
_ABSENT = [
    "kv_orig_quant_scale", "kv_quant_orig_scale", "attention_output_orig_quant_scale", "max_context_length",
    "alibi_slopes", "kv_cache_block_offsets", "host_kv_cache_block_offsets", "host_kv_cache_pool_pointers",
    "host_kv_cache_pool_mapping", "host_context_lengths", "qkv_bias", "spec_decoding_generation_lengths",
    "spec_decoding_position_offsets", "spec_decoding_packed_mask", "long_rope_rotary_inv_freq",
    "long_rope_rotary_cos_sin", "mrope_position_deltas", "host_runtime_perf_knobs", "host_context_progress",
    "q_b_proj", "kv_b_proj", "skip_attn", "attention_mask", "attention_packed_mask",
    "rotary_inv_freq", "rotary_cos_sin",
]  # fmt: skip


def gpt_attention_signature(positions: Any, scalings: Any, masks: Any) -> inspect.Signature:
    """Return the signature, with the package's own enums."""
    from tensorrt_llm.quantization import QuantMode

    defaults: dict[str, Any] = {
        "attn_logit_softcapping_scale": 0.0,
        **{"rotary_embedding_dim": 0, "rotary_embedding_base": 10000.0, "rotary_embedding_scale_type": scalings.none},
        **{"rotary_embedding_short_m_scale": 1.0, "rotary_embedding_long_m_scale": 1.0, "rotary_embedding_scale": 1.0},
        **{"rotary_embedding_max_positions": 1024, "rotary_embedding_original_max_positions": 1024},
        "position_embedding_type": positions.learned_absolute,
        **{"kv_cache_quant_mode": QuantMode(0), "mask_type": masks.causal},
        **{"block_sparse_block_size": 64, "block_sparse_homo_head_pattern": False},
        **{"block_sparse_num_local_blocks": 16, "block_sparse_vertical_stride": 8},
        **{"tp_size": 1, "tp_rank": 0, "vision_start": -1, "vision_length": -1},
        **{"do_cross_attention": False, "max_distance": 0, "use_cache": True},
        **{"spec_decoding_is_generation_length_variable": False, "spec_decoding_max_generation_length": 0},
        "is_mla_enabled_flag": False,
        **dict.fromkeys(_MLA, 0),
        **dict.fromkeys((*_ABSENT, *_CROSS)),
        **{"cp_group": [0], "cp_size": 1, "cp_rank": 0},
    }
    defaults |= dict.fromkeys(("attention_output_sf_scale", "spec_decoding_use", "mrope_rotary_cos_sin"))
    defaults |= {"num_kv_heads_origin": -1, "k_b_proj_trans": None}
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(name, kind) for name in _REQUIRED]
    parameters += [inspect.Parameter(name, kind, default=value) for name, value in defaults.items()]
    return inspect.Signature(parameters)
