"""What must hold in the network of a model and for its lengths; the rest is in chunkkv.engine.preconditions."""

from __future__ import annotations

from typing import Any

from chunkkv.engine.preconditions import Precondition
from chunkkv.errors import ConfigError
from chunkkv_builder.backends.tensorrt_llm.model import POSITION_TYPES, ROPE_SCALINGS, LlmModel

_NO_SPECULATION = "leave --speculative_decoding_mode out"
_UNSUPPORTED = "this model is not supported: build it with trtllm-build, without ChunkKV"


def _absent(name: str, feature: str, remedy: str = _UNSUPPORTED) -> Precondition:
    return Precondition(name, f"none ({feature})", remedy, lambda value: value is None or value is False)


# Looked up in the keywords that an attention layer calls gpt_attention with.
LAYER_PRECONDITIONS = (
    Precondition("use_cache", "True", "give --kv_cache_type paged", bool),
    Precondition(
        "qkv",
        "one packed tensor",
        "convert the checkpoint without separate query, key and value projections",
        lambda value: not isinstance(value, (list, tuple)),
    ),
    Precondition("kv_cache_block_offsets", "a tensor", "give --kv_cache_type paged", lambda value: value is not None),
    Precondition(
        "host_context_lengths", "a tensor", "give --remove_input_padding enable", lambda value: value is not None
    ),
    Precondition("max_context_length", "a number", _UNSUPPORTED, lambda value: isinstance(value, int) and value > 0),
    _absent("do_cross_attention", "cross attention"),
    _absent("cross_kv", "cross attention"),
    _absent("is_mla_enabled_flag", "multi-head latent attention"),
    Precondition("cp_size", "1", "convert the checkpoint with --cp_size 1", lambda value: value == 1),
    Precondition("vision_start", "-1 (no vision expert)", _UNSUPPORTED, lambda value: value is None or value < 0),
    _absent("skip_attn", "attention that is skipped"),
    _absent("logn_scaling", "logn scaling"),
    _absent("relative_attention_bias", "a bias by cache slot"),
    _absent("qkv_bias", "a bias that attention adds after the rotation"),
    _absent("alibi_slopes", "a bias by cache slot"),
    _absent("attention_mask", "a mask by cache slot"),
    _absent("attention_packed_mask", "a mask by cache slot"),
    _absent("spec_decoding_packed_mask", "speculative decoding", _NO_SPECULATION),
    _absent("spec_decoding_generation_lengths", "speculative decoding", _NO_SPECULATION),
    _absent("attention_output_sf_scale", "fp4 output of attention", "give --fuse_fp4_quant disable"),
    _absent("long_rope_rotary_cos_sin", "two rotary tables"),
    _absent("mrope_rotary_cos_sin", "positions with three axes"),
    _absent("mrope_rotary_sin_cos", "positions with three axes"),
    Precondition("mask_type", "causal, without a sliding window", _UNSUPPORTED, lambda value: value.name == "causal"),
    Precondition(
        "q_scaling", "1.0 (the scoring kernels scale by the head size only)", _UNSUPPORTED, lambda value: value == 1.0
    ),
    Precondition(
        "attn_logit_softcapping_scale", "0.0 (no capped logits)", _UNSUPPORTED, lambda value: value in (None, 0.0)
    ),
    Precondition(
        "position_embedding_type",
        ", ".join(POSITION_TYPES),
        _UNSUPPORTED,
        lambda value: getattr(value, "name", value) in POSITION_TYPES,
    ),
    Precondition(
        "rotary_embedding_scale_type",
        ", ".join(ROPE_SCALINGS),
        _UNSUPPORTED,
        lambda value: getattr(value, "name", value) in ROPE_SCALINGS,
    ),
)


def check_lengths(model: LlmModel, limits: Any) -> None:
    """Raise ConfigError where a prompt cannot run in one piece, or a position would have no rotary row.

    `limits` has max_input_len, max_seq_len and max_num_tokens where they are known, as flags and BuildConfig do.
    """
    names = ("max_input_len", "max_seq_len", "max_num_tokens")
    max_input_len, max_seq_len, max_num_tokens = (getattr(limits, name, None) for name in names)
    if max_input_len and max_num_tokens and max_num_tokens < max_input_len:
        raise ConfigError(
            f"max_num_tokens is {max_num_tokens}, below max_input_len = {max_input_len}; a prompt must run in one "
            f"piece, because chunked context is not supported: give --max_num_tokens {max_input_len} or more"
        )
    longest = max_seq_len or model.default_max_seq_len
    if longest > model.stretched_positions:
        stretch = " stretched by rotary_scaling" if model.stretched_positions > model.max_positions else ""
        raise ConfigError(
            f"max_seq_len is {longest}; this model has {model.stretched_positions} positions "
            f"(max_position_embeddings{stretch}): give --max_seq_len {model.stretched_positions} or less"
        )
    if model.sliding_window is not None and model.sliding_window < longest:
        raise ConfigError(
            f"The model's sliding_window is {model.sliding_window}, below max_seq_len = {longest}; attention "
            f"that forgets by itself is not supported: give --max_seq_len {model.sliding_window} or less"
        )


def longest_prompt(model: LlmModel, limits: Any) -> int:
    """Return the tokens of the longest prompt that a runtime admits.

    With packed input TensorRT-LLM's C++ runtime looks at max_seq_len and max_num_tokens only, not at max_input_len.
    """
    longest = limits.max_seq_len or model.default_max_seq_len
    return min(longest, limits.max_num_tokens or longest)
