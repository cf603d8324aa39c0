"""The model families that are read, and what the configs of each mean where families differ: one row for each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

SILU, GELU_TANH = ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class Family:
    """One architecture of Hugging Face checkpoints. Nothing has a default; a row below starts from its nearest kin.

    Parameters
    ----------
    name : str
        The `model_type` of its configs.
    architecture : str
        The entry of `architectures` in its configs.
    reads_attention_bias : bool
        Whether the key `attention_bias` gives the projections q, k, v and o a bias.
    always_has_qkv_bias : bool
        Whether q, k and v have a bias whatever the config says.
    reads_mlp_bias : bool
        Whether the key `mlp_bias` gives the projections of the MLP a bias.
    fused_projections : bool
        Whether q, k and v are stored as the rows of one tensor `qkv_proj`, and gate and up as those of `gate_up_proj`.
    qk_norm : bool
        Whether each query and key head is normalised.
    post_norms : bool
        Whether the outputs of attention and MLP are normalised, too, before they are added to the residual stream.
    norms_add_one : bool
        Whether a norm multiplies by 1 + its weight, not by its weight.
    activation_key : str
        The key that names the activation of the MLP.
    activation : str
        The one activation that is computed, one of ACTIVATIONS; also what a missing key means.
    rotated_layers : {"all", "no_rope_layers", "two_bases"}
        Which layers rotate queries and keys: all by the same angles; those that the keys `no_rope_layers` and
        `no_rope_layer_interval` do not leave out; all, those with a sliding window by angles of their own.
    reads_partial_rotary : bool
        Whether the key `partial_rotary_factor` leaves the last dimensions of a head as they are.
    longrope_names : tuple of str
        Other names of the rotary scaling "longrope" in its configs.
    default_theta : float
        Base of the rotary frequencies where the key is missing.
    attention_scale : {"head_dim", "query_pre_attn_scalar", "attention_multiplier"}
        What queries times keys are multiplied by: head_dim ** -0.5; that key ** -0.5, its default being 256; that key,
        its default being 1.
    reads_multipliers : bool
        Whether the keys `embedding_multiplier`, `residual_multiplier` and `logits_scaling` scale what they name.
    scales_embedding : bool
        Whether embeddings are multiplied by hidden_size ** 0.5.
    overflows_float16 : bool
        Whether activations of its real models leave the range of float16, so that a build in that type is warned of.
    default_soft_caps : (float or None, float or None), or None
        What the keys `attn_logit_softcapping` and `final_logit_softcapping` mean where they are missing; None where the
        family has no such keys.
    sliding_window : {"never", "always", "on_request", "by_layer"}
        When its attention forgets tokens outside a window: never; in every layer; where the key `use_sliding_window` is
        true; in the layers that `layer_types` says. A `sliding_window` that is null turns all of them off.
    default_window : int or None
        `sliding_window` where the key is missing; None means no window.
    default_max_window_layers : int or None
        `max_window_layers` where the key is missing: how many of the first layers never have a window. None where the
        family has no such key.
    full_attention_every : int or None
        With sliding_window "by_layer", every how many layers one attends to everything, where there are no
        `layer_types`. None for other families.
    needs_kv_heads : bool
        Whether the key `num_key_value_heads` must be there; otherwise every query head has a KV head of its own.
    default_head_dim : int or None
        `head_dim` where the key is missing; None means hidden_size / num_attention_heads.
    default_tied : bool
        `tie_word_embeddings` where the key is missing.
    default_bos_token_id, default_eos_token_id : int or None
        Special tokens where the key is missing; None for none.
    """

    name: str
    architecture: str
    reads_attention_bias: bool
    always_has_qkv_bias: bool
    reads_mlp_bias: bool
    fused_projections: bool
    qk_norm: bool
    post_norms: bool
    norms_add_one: bool
    activation_key: str
    activation: str
    rotated_layers: Literal["all", "no_rope_layers", "two_bases"]
    reads_partial_rotary: bool
    longrope_names: tuple[str, ...]
    default_theta: float
    attention_scale: Literal["head_dim", "query_pre_attn_scalar", "attention_multiplier"]
    reads_multipliers: bool
    scales_embedding: bool
    overflows_float16: bool
    default_soft_caps: tuple[float | None, float | None] | None
    sliding_window: Literal["never", "always", "on_request", "by_layer"]
    default_window: int | None
    default_max_window_layers: int | None
    full_attention_every: int | None
    needs_kv_heads: bool
    default_head_dim: int | None
    default_tied: bool
    default_bos_token_id: int | None
    default_eos_token_id: int | None


_LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    reads_attention_bias=True,
    always_has_qkv_bias=False,
    reads_mlp_bias=True,
    fused_projections=False,
    qk_norm=False,
    post_norms=False,
    norms_add_one=False,
    activation_key="hidden_act",
    activation=SILU,
    rotated_layers="all",
    reads_partial_rotary=False,
    longrope_names=(),
    default_theta=10_000.0,
    attention_scale="head_dim",
    reads_multipliers=False,
    scales_embedding=False,
    overflows_float16=False,
    default_soft_caps=None,
    sliding_window="never",
    default_window=None,
    default_max_window_layers=None,
    full_attention_every=None,
    needs_kv_heads=False,
    default_head_dim=None,
    default_tied=False,
    default_bos_token_id=1,
    default_eos_token_id=2,
)
_MISTRAL = replace(
    _LLAMA,
    name="mistral",
    architecture="MistralForCausalLM",
    reads_attention_bias=False,
    reads_mlp_bias=False,
    sliding_window="always",
    default_window=4096,
    needs_kv_heads=True,
)
_QWEN2 = replace(
    _LLAMA,
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    reads_attention_bias=False,
    always_has_qkv_bias=True,
    reads_mlp_bias=False,
    sliding_window="on_request",
    default_window=4096,
    default_max_window_layers=28,
    needs_kv_heads=True,
    default_bos_token_id=None,
    default_eos_token_id=None,
)
_QWEN3 = replace(
    _QWEN2,
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    reads_attention_bias=True,
    always_has_qkv_bias=False,
    qk_norm=True,
    default_head_dim=128,
)
_PHI3 = replace(
    _LLAMA,
    name="phi3",
    architecture="Phi3ForCausalLM",
    reads_attention_bias=False,
    reads_mlp_bias=False,
    fused_projections=True,
    reads_partial_rotary=True,
    longrope_names=("su", "yarn"),
    sliding_window="always",
    default_eos_token_id=32000,
)
_GRANITE = replace(
    _LLAMA,
    name="granite",
    architecture="GraniteForCausalLM",
    attention_scale="attention_multiplier",
    reads_multipliers=True,
)
_SMOLLM3 = replace(
    _LLAMA,
    name="smollm3",
    architecture="SmolLM3ForCausalLM",
    rotated_layers="no_rope_layers",
    default_theta=2_000_000.0,
    sliding_window="on_request",
    needs_kv_heads=True,
    default_tied=True,
    default_bos_token_id=128_000,
    default_eos_token_id=128_001,
)
_GEMMA = replace(
    _LLAMA,
    name="gemma",
    architecture="GemmaForCausalLM",
    reads_mlp_bias=False,
    norms_add_one=True,
    activation=GELU_TANH,
    scales_embedding=True,
    overflows_float16=True,
    needs_kv_heads=True,
    default_head_dim=256,
    default_tied=True,
    default_bos_token_id=2,
    default_eos_token_id=1,
)
_GEMMA2 = replace(
    _GEMMA,
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    post_norms=True,
    activation_key="hidden_activation",
    attention_scale="query_pre_attn_scalar",
    default_soft_caps=(50.0, 30.0),
    sliding_window="by_layer",
    default_window=4096,
    full_attention_every=2,
)
_GEMMA3 = replace(
    _GEMMA2,
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    qk_norm=True,
    rotated_layers="two_bases",
    default_theta=1_000_000.0,
    default_soft_caps=(None, None),
    full_attention_every=6,
)
FAMILIES = (_LLAMA, _MISTRAL, _QWEN2, _QWEN3, _PHI3, _GRANITE, _SMOLLM3, _GEMMA, _GEMMA2, _GEMMA3)
FAMILY_OF = {family.architecture: family for family in FAMILIES}
