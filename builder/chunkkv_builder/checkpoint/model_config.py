"""What a checkpoint's model is: family, sizes, and where it differs from a plain Llama, read from config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkkv.engine.fields import Fields
from chunkkv.errors import ConfigError
from chunkkv_builder.checkpoint import config_keys, rope
from chunkkv_builder.checkpoint.config_keys import DTYPES, GLOBAL, LOCAL, ROTATIONS
from chunkkv_builder.checkpoint.families import ACTIVATIONS, FAMILIES, SILU, Family
from chunkkv_builder.checkpoint.rope import RopeScaling

ARCHITECTURES = {family.architecture: family.name for family in FAMILIES}
MAX_LAYERS = 4096


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer of a supported family; raises ConfigError for sizes that do not fit together.

    Parameters
    ----------
    architecture, family : str
        A key of ARCHITECTURES, and its value.
    vocab_size, hidden_size, intermediate_size : int
        Tokens of the vocabulary, and widths of the residual stream and of the MLP.
    num_layers, num_heads, num_kv_heads, head_dim : int
        Decoder layers, query heads and KV heads of a layer, and the width of a head.
    rms_norm_eps : float
        Epsilon of every norm.
    rope_theta : float
        Base of the rotary frequencies.
    rope_scaling : RopeScaling or None
        None for plain RoPE.
    max_position_embeddings : int
        Positions the model was trained for.
    tie_word_embeddings : bool, default False
        Whether the embedding table is also the projection to the vocabulary.
    attention_bias, attention_out_bias, mlp_bias : bool, default False
        Whether the projections have a bias: q, k and v; the output of attention; those of the MLP.
    qk_norm : bool, default False
        Whether each query and key head is normalised, as in Qwen3.
    bos_token_id : int or None, default None
        Token that begins a text.
    eos_token_ids : tuple of int, default empty
        Tokens that end an answer.
    sliding_window : int or None, default None
        Tokens that a layer attends to; an engine must not take longer sequences, for which the window would matter.
        None for attention to everything.
    dtype : str, default "float32"
        Type the checkpoint's tensors are stored in, one of DTYPES.
    activation : str, default "silu"
        Activation of the MLP, one of families.ACTIVATIONS.
    post_norms : bool, default False
        Whether the outputs of attention and MLP are normalised before they are added, as in Gemma 2.
    rotary_dim : int or None, default None
        How many dimensions of a head are rotated, the first ones; None for all.
    rotations : tuple of str, default empty
        For each layer one of config_keys.ROTATIONS: rotated by rope_theta and rope_scaling, by local_rope_theta alone,
        or not at all. Empty where all are of the first kind.
    local_rope_theta : float or None, default None
        Base of the rotary frequencies of "local" layers.
    attention_scale : float or None, default None
        What queries times keys are multiplied by; None for head_dim ** -0.5.
    embedding_scale, residual_scale : float, default 1.0
        What embeddings, and the outputs of attention and MLP, are multiplied by.
    logit_divisor : float, default 1.0
        What the vocabulary's logits are divided by.
    attention_soft_cap, logit_soft_cap : float or None, default None
        Bound c of a soft cap, which turns x into c * tanh(x / c): of queries times keys, and of the vocabulary's
        logits.
    """

    architecture: str
    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    sliding_window: int | None = None
    dtype: str = "float32"
    activation: str = SILU
    post_norms: bool = False
    rotary_dim: int | None = None
    rotations: tuple[str, ...] = ()
    local_rope_theta: float | None = None
    attention_scale: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None

    def __post_init__(self) -> None:
        if ARCHITECTURES.get(self.architecture) != self.family:
            raise config_keys.unsupported(self.architecture)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key-value heads: "
                "num_attention_heads must be a multiple of num_key_value_heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; rotary embeddings need an even number")

    @property
    def rotated_dims(self) -> int:
        """How many dimensions of a head are rotated."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @classmethod
    def from_hf(
        cls,
        config: Mapping[str, Any],
        generation_config: Mapping[str, Any] | None = None,
        source: str = "config.json",
    ) -> ModelConfig:
        """Read a Hugging Face config of transformers 4 or 5.

        Parameters
        ----------
        config : mapping
            The content of config.json.
        generation_config : mapping, optional
            The content of generation_config.json; its end tokens win over those of `config`.
        source : str, default "config.json"
            What `config` is called in errors.

        Raises
        ------
        ConfigError
            For an architecture, activation, attention or rotary variant that is not supported, and for missing or
            invalid keys.
        """
        fields = Fields(config, source)
        family = config_keys.read_family(fields)
        config_keys.refuse_variants(fields, family)
        num_heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
        positions = fields.integer("max_position_embeddings")
        num_layers = fields.integer("num_hidden_layers", high=MAX_LAYERS)
        head_dim = config_keys.read_head_dim(fields, family, hidden, num_heads)
        rotary = rope.read_rope(fields, family, positions, head_dim)
        attention_bias = family.reads_attention_bias and fields.flag("attention_bias", default=False)
        return cls(
            architecture=family.architecture,
            family=family.name,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=config_keys.read_kv_heads(fields, family, num_heads),
            head_dim=head_dim,
            rms_norm_eps=fields.number("rms_norm_eps"),
            rope_theta=rotary.theta,
            rope_scaling=rotary.scaling,
            max_position_embeddings=positions,
            tie_word_embeddings=fields.flag("tie_word_embeddings", default=family.default_tied),
            attention_bias=family.always_has_qkv_bias or attention_bias,
            attention_out_bias=attention_bias,
            mlp_bias=family.reads_mlp_bias and fields.flag("mlp_bias", default=False),
            qk_norm=family.qk_norm,
            **_read_special_tokens(fields, Fields(generation_config or {}, "generation_config.json"), family),
            dtype=config_keys.read_dtype(fields),
            rotary_dim=None if rotary.rotary_dim == head_dim else rotary.rotary_dim,
            local_rope_theta=rotary.local_theta,
            **_read_differences(fields, family, hidden, num_layers),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain JSON values under TensorRT-LLM's names for them."""
        return {
            "architecture": self.architecture,
            "dtype": self.dtype,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_size": self.head_dim,
            "hidden_act": self.activation,
            "norm_epsilon": self.rms_norm_eps,
            "position_embedding_type": "rope_gpt_neox",
            "rotary_base": self.rope_theta,
            "rotary_scaling": None if self.rope_scaling is None else self.rope_scaling.to_dict(),
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attn_bias": self.attention_bias,
            "attn_out_bias": self.attention_out_bias,
            "mlp_bias": self.mlp_bias,
            "qk_norm": self.qk_norm,
            "bos_token_id": self.bos_token_id,
            "eos_token_ids": list(self.eos_token_ids),
            **self._differences(),
        }

    def _differences(self) -> dict[str, Any]:
        """Return the entries that most models do not have."""
        entries = {name: getattr(self, name) for name in _OPTIONAL if getattr(self, name) != getattr(ModelConfig, name)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in entries.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "pretrained_config") -> ModelConfig:
        """Read what to_dict wrote; raises ConfigError for missing or invalid entries."""
        fields = Fields(values, source)
        architecture = fields.text("architecture")
        positions = fields.integer("max_position_embeddings")
        scaling = None
        if fields.get("rotary_scaling") is not None:
            scaling_fields = Fields(fields.get("rotary_scaling"), f"{source}: rotary_scaling")
            scaling = rope.read_scaling(scaling_fields, Fields({}, source), positions)
        return cls(
            architecture=architecture,
            family=ARCHITECTURES.get(architecture, ""),
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=fields.integer("num_hidden_layers", high=MAX_LAYERS),
            num_heads=fields.integer("num_attention_heads"),
            num_kv_heads=fields.integer("num_key_value_heads"),
            head_dim=fields.integer("head_size"),
            rms_norm_eps=fields.number("norm_epsilon"),
            rope_theta=fields.number("rotary_base", above=1.0),
            rope_scaling=scaling,
            max_position_embeddings=positions,
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            attention_bias=fields.flag("attn_bias"),
            attention_out_bias=fields.flag("attn_out_bias"),
            mlp_bias=fields.flag("mlp_bias"),
            qk_norm=fields.flag("qk_norm"),
            bos_token_id=fields.integer("bos_token_id", low=0, default=None),
            eos_token_ids=tuple(config_keys.read_token_ids(fields, "eos_token_ids")),
            sliding_window=fields.integer("sliding_window", default=None),
            dtype=fields.text("dtype", allowed=DTYPES),
            activation=fields.text("hidden_act", allowed=ACTIVATIONS),
            post_norms=fields.flag("post_norms", default=False),
            rotary_dim=fields.integer("rotary_dim", default=None),
            rotations=_stored_rotations(fields),
            local_rope_theta=fields.number("local_rope_theta", above=1.0, default=None),
            attention_scale=fields.number("attention_scale", default=None),
            attention_soft_cap=fields.number("attention_soft_cap", default=None),
            logit_soft_cap=fields.number("logit_soft_cap", default=None),
            **{name: fields.number(name, default=1.0) for name in _SCALES},
        )


_SCALES = ("embedding_scale", "residual_scale", "logit_divisor")
_OPTIONAL = (
    *("sliding_window", "post_norms", "rotary_dim", "rotations", "local_rope_theta", "attention_scale"),
    *("attention_soft_cap", "logit_soft_cap", *_SCALES),
)


def rope_frequencies(config: ModelConfig, rotation: str = GLOBAL) -> tuple[NDArray[np.float64], float]:
    """Return the inverse frequencies [rotated_dims/2] of a kind of layer, and the factor on its cosines and sines."""
    if rotation == LOCAL:
        assert config.local_rope_theta is not None
        return rope.frequencies(config.rotated_dims, config.local_rope_theta, None)
    return rope.frequencies(config.rotated_dims, config.rope_theta, config.rope_scaling)


def _read_special_tokens(fields: Fields, generation: Fields, family: Family) -> dict[str, Any]:
    """Return the arguments of ModelConfig for the tokens that begin a text and end an answer."""
    begin, ends = (
        config_keys.read_first_ids(key, generation, fields, default)
        for key, default in (
            ("bos_token_id", family.default_bos_token_id),
            ("eos_token_id", family.default_eos_token_id),
        )
    )
    return {"bos_token_id": begin[0], "eos_token_ids": tuple(token for token in ends if token is not None)}


def _read_differences(fields: Fields, family: Family, hidden_size: int, num_layers: int) -> dict[str, Any]:
    """Return the arguments of ModelConfig by which layers differ from each other and from those of a plain Llama."""
    kinds = config_keys.read_layer_types(fields, family, num_layers)
    caps = config_keys.read_soft_caps(fields, family)
    return {
        "sliding_window": config_keys.read_sliding_window(fields, family, kinds, num_layers),
        "activation": family.activation,
        "post_norms": family.post_norms,
        "rotations": config_keys.read_rotations(fields, family, kinds, num_layers),
        "attention_scale": config_keys.read_attention_scale(fields, family),
        "attention_soft_cap": caps.attention,
        "logit_soft_cap": caps.logits,
        **config_keys.read_multipliers(fields, family, hidden_size),
    }


def _stored_rotations(fields: Fields) -> tuple[str, ...]:
    rotations = fields.texts("rotations") if fields.get("rotations") is not None else ()
    if not set(rotations) <= set(ROTATIONS):
        raise fields.error("rotations", f"every entry must be {' or '.join(map(repr, ROTATIONS))}")
    return rotations
