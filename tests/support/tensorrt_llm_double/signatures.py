"""The keywords of gpt_attention with their defaults, as far as layers give them or ChunkKV looks at them."""

from __future__ import annotations

import inspect
from typing import Any

_REQUIRED = (
    *("qkv", "past_key_value", "sequence_length", "host_past_key_value_lengths", "host_max_attention_window_sizes"),
    *("host_sink_token_length", "context_lengths", "cache_indirection", "host_request_types", "layer_idx"),
    *("num_heads", "num_kv_heads", "hidden_size_per_head", "q_scaling"),
)
_ABSENT = (
    *("kv_orig_quant_scale", "kv_quant_orig_scale", "attention_output_orig_quant_scale", "max_context_length"),
    *("alibi_slopes", "kv_cache_block_offsets", "host_kv_cache_block_offsets", "host_kv_cache_pool_pointers"),
    *("host_kv_cache_pool_mapping", "host_context_lengths", "qkv_bias", "spec_decoding_generation_lengths"),
    *("spec_decoding_packed_mask", "long_rope_rotary_cos_sin", "mrope_rotary_cos_sin", "host_runtime_perf_knobs"),
    *("host_context_progress", "skip_attn", "attention_mask", "attention_packed_mask", "rotary_inv_freq"),
    *("rotary_cos_sin", "cross_kv", "relative_attention_bias", "logn_scaling", "attention_output_sf_scale"),
)


def gpt_attention_signature(positions: Any, scalings: Any, masks: Any, mode: Any) -> inspect.Signature:
    """Return the signature, with the package's own enums; all parameters are keyword-only."""
    defaults: dict[str, Any] = {
        **dict.fromkeys(_ABSENT),
        **{"attn_logit_softcapping_scale": 0.0, "rotary_embedding_dim": 0, "rotary_embedding_base": 10000.0},
        **{"rotary_embedding_scale_type": scalings.none, "rotary_embedding_scale": 1.0},
        **{"rotary_embedding_max_positions": 1024, "position_embedding_type": positions.learned_absolute},
        **{"kv_cache_quant_mode": mode(0), "mask_type": masks.causal, "tp_size": 1, "tp_rank": 0},
        **{"vision_start": -1, "do_cross_attention": False, "use_cache": True, "is_mla_enabled_flag": False},
        **{"cp_group": [0], "cp_size": 1, "cp_rank": 0, "num_kv_heads_origin": -1},
    }
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(name, kind) for name in _REQUIRED]
    parameters += [inspect.Parameter(name, kind, default=value) for name, value in defaults.items()]
    return inspect.Signature(parameters)
