"""Everything that must hold for a ChunkKV engine of TensorRT-LLM, each with the flag that makes it hold.

BUILD is looked up in flags, in a BuildConfig and in the PluginConfig of a network: a name that a version does not have
is not checked. LAYER is looked up in the keywords that an attention layer calls gpt_attention with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from chunkkv.errors import ConfigError
from chunkkv_builder.backends.tensorrt_llm.model import POSITION_TYPES, ROPE_SCALINGS, LlmModel

_OFF = (None, False, 0, "none", "disable", "disabled")
_ATTENTION_DTYPES = ("auto", "float16", "bfloat16")


@dataclass(frozen=True)
class Precondition:
    """`name` is a flag of trtllm-build or a keyword of gpt_attention; `remedy` says what to change."""

    name: str
    allowed: str
    remedy: str
    holds: Callable[[Any], bool]

    def check(self, values: Mapping[str, Any]) -> None:
        """Raise ConfigError where `values` has the name with a value that is not allowed."""
        if self.name in values and not self.holds(values[self.name]):
            raise ConfigError(f"{self.name} is {_shown(values[self.name])}; allowed is {self.allowed}: {self.remedy}")


def _off(name: str, why: str, remedy: str = "") -> Precondition:
    return Precondition(name, f"none ({why})", remedy or f"leave --{name} out", lambda value: value in _OFF)


def _disabled(name: str, why: str) -> Precondition:
    return Precondition(name, f"disable ({why})", f"give --{name} disable", lambda value: value in _OFF)


def _enabled(name: str, why: str) -> Precondition:
    return Precondition(name, f"enable ({why})", f"give --{name} enable", lambda value: value in (True, None))


def _at_most_one(name: str, why: str) -> Precondition:
    return Precondition(name, f"1 ({why})", f"give --{name} 1", lambda value: value in (None, 0, 1))


BUILD = (
    Precondition(
        "gpt_attention_plugin",
        "float16 or bfloat16 (ChunkKV stands behind that plugin)",
        "give --gpt_attention_plugin auto",
        lambda value: value in _ATTENTION_DTYPES,
    ),
    _enabled("remove_input_padding", "the plugins read packed tokens"),
    Precondition(
        "kv_cache_type",
        "paged (kept tokens move within the blocks of the cache)",
        "give --kv_cache_type paged",
        lambda value: value in (None, "paged"),
    ),
    _enabled("paged_kv_cache", "kept tokens move within the blocks of the cache"),
    _enabled("context_fmha", "prefill must not write padded attention masks"),
    _at_most_one("max_beam_width", "beams share the blocks of a prompt"),
    _disabled("multiple_profiles", "the engine must have one profile"),
    _disabled("streamingllm", "it drops tokens by itself"),
    _disabled("fuse_fp4_quant", "attention would give fp4"),
    Precondition(
        "speculative_decoding_mode",
        "none (draft tokens are taken back by cache length)",
        "leave --speculative_decoding_mode out",
        lambda value: value in _OFF or value == 1,
    ),
    _off("max_draft_len", "draft tokens are taken back by cache length"),
    Precondition(
        "tokens_per_block",
        "a power of two",
        "give --tokens_per_block 32 or 64",
        lambda value: value is None or (value > 0 and value & (value - 1) == 0),
    ),
    _at_most_one("workers", "more workers are new processes, which would build without ChunkKV"),
    _at_most_one("auto_parallel", "it rewrites the network: convert the checkpoint with --tp_size instead"),
    _off("lora_dir", "adapters are given to the runtime", "leave --lora_dir out, give --lora_target_modules"),
)

_NO_SPECULATION = "leave --speculative_decoding_mode out"
_UNSUPPORTED = "this model is not supported: build it with trtllm-build, without ChunkKV"


def _absent(name: str, what: str, remedy: str = _UNSUPPORTED) -> Precondition:
    return Precondition(name, f"none ({what})", remedy, lambda value: value is None or value is False)


LAYER = (
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


def check(table: tuple[Precondition, ...], values: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first precondition of `table` that `values` break."""
    for precondition in table:
        precondition.check(values)


def values_of(*objects: Any) -> dict[str, Any]:
    """Return what the objects (flags, a BuildConfig, a PluginConfig) say under the names of BUILD, as flags say it."""
    found: dict[str, Any] = {}
    for name in (precondition.name for precondition in BUILD):
        for each in objects:
            # paged_kv_cache of a PluginConfig is None until the build has decided.
            value = getattr(each, name, None)
            if value is not None or (hasattr(each, name) and name not in found):
                found[name] = _as_flag(value)
    return found


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
    if longest > model.max_positions:
        origin = "" if max_seq_len else ", as trtllm-build takes it"
        raise ConfigError(
            f"max_seq_len is {longest}{origin}; the rotary table of this model has {model.max_positions} positions "
            f"(max_position_embeddings): give --max_seq_len {model.max_positions} or less"
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


def _as_flag(value: Any) -> Any:
    value = getattr(value, "name", value)
    if isinstance(value, str):
        value = value.lower()
    return {"enable": True, "disable": False}.get(value, value) if isinstance(value, str) else value


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "enable" if value else "disable"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    text = str(getattr(value, "name", value))
    return text if len(text) <= 60 else type(value).__name__
