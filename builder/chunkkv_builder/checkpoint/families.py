"""The model families that are read, and what the configs of each mean where families differ: one row for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """One architecture of Hugging Face checkpoints. Nothing has a default, so a new family says everything.

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
    qk_norm : bool
        Whether each query and key head is normalised.
    sliding_window : {"never", "unless_null", "on_request"}
        When its attention forgets tokens outside a window, which is refused: never; unless the key `sliding_window`
        is there and null; where the key `use_sliding_window` is true.
    needs_kv_heads : bool
        Whether the key `num_key_value_heads` must be there; otherwise every query head has a KV head of its own.
    default_head_dim : int or None
        `head_dim` where the key is missing; None means hidden_size / num_attention_heads.
    default_bos_token_id, default_eos_token_id : int or None
        Special tokens where the key is missing; None for none.
    """

    name: str
    architecture: str
    reads_attention_bias: bool
    always_has_qkv_bias: bool
    reads_mlp_bias: bool
    qk_norm: bool
    sliding_window: Literal["never", "unless_null", "on_request"]
    needs_kv_heads: bool
    default_head_dim: int | None
    default_bos_token_id: int | None
    default_eos_token_id: int | None


FAMILIES = (
    Family(
        name="llama",
        architecture="LlamaForCausalLM",
        reads_attention_bias=True,
        always_has_qkv_bias=False,
        reads_mlp_bias=True,
        qk_norm=False,
        sliding_window="never",
        needs_kv_heads=False,
        default_head_dim=None,
        default_bos_token_id=1,
        default_eos_token_id=2,
    ),
    Family(
        name="mistral",
        architecture="MistralForCausalLM",
        reads_attention_bias=False,
        always_has_qkv_bias=False,
        reads_mlp_bias=False,
        qk_norm=False,
        sliding_window="unless_null",
        needs_kv_heads=True,
        default_head_dim=None,
        default_bos_token_id=1,
        default_eos_token_id=2,
    ),
    Family(
        name="qwen2",
        architecture="Qwen2ForCausalLM",
        reads_attention_bias=False,
        always_has_qkv_bias=True,
        reads_mlp_bias=False,
        qk_norm=False,
        sliding_window="on_request",
        needs_kv_heads=True,
        default_head_dim=None,
        default_bos_token_id=None,
        default_eos_token_id=None,
    ),
    Family(
        name="qwen3",
        architecture="Qwen3ForCausalLM",
        reads_attention_bias=True,
        always_has_qkv_bias=False,
        reads_mlp_bias=False,
        qk_norm=True,
        sliding_window="on_request",
        needs_kv_heads=True,
        default_head_dim=128,
        default_bos_token_id=None,
        default_eos_token_id=None,
    ),
)
FAMILY_OF = {family.architecture: family for family in FAMILIES}
