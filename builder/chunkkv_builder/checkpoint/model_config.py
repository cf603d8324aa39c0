"""What a checkpoint's model is: family, sizes, biases and rotary scaling, read from its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkkv.engine.fields import Fields, is_integer
from chunkkv.errors import ConfigError
from chunkkv_builder.checkpoint import rope
from chunkkv_builder.checkpoint.families import FAMILIES, FAMILY_OF, Family
from chunkkv_builder.checkpoint.rope import RopeScaling

ARCHITECTURES = {family.architecture: family.name for family in FAMILIES}
DTYPES = ("float32", "float16", "bfloat16")
MAX_LAYERS = 4096
_, _SLIDING = _LAYER_TYPES = ("full_attention", "sliding_attention")
_DEFAULT_WINDOW = 4096  # transformers' value for configs of Mistral and Qwen that do not name it


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

    def __post_init__(self) -> None:
        if ARCHITECTURES.get(self.architecture) != self.family:
            raise _unsupported(self.architecture)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key-value heads: "
                "num_attention_heads must be a multiple of num_key_value_heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; rotary embeddings need an even number")

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
        family = _read_family(fields)
        _refuse_variants(fields, family)
        num_heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
        positions = fields.integer("max_position_embeddings")
        theta, scaling = rope.read_rope(fields, positions)
        attention_bias = family.reads_attention_bias and fields.flag("attention_bias", default=False)
        generation = Fields(generation_config or {}, "generation_config.json")
        return cls(
            architecture=family.architecture,
            family=family.name,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=fields.integer("num_hidden_layers", high=MAX_LAYERS),
            num_heads=num_heads,
            num_kv_heads=_read_kv_heads(fields, family, num_heads),
            head_dim=_read_head_dim(fields, family, hidden, num_heads),
            rms_norm_eps=fields.number("rms_norm_eps"),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=positions,
            tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
            attention_bias=family.always_has_qkv_bias or attention_bias,
            attention_out_bias=attention_bias,
            mlp_bias=family.reads_mlp_bias and fields.flag("mlp_bias", default=False),
            qk_norm=family.qk_norm,
            bos_token_id=_first_ids("bos_token_id", generation, fields, family.default_bos_token_id)[0],
            eos_token_ids=tuple(
                token
                for token in _first_ids("eos_token_id", generation, fields, family.default_eos_token_id)
                if token is not None
            ),
            sliding_window=_read_sliding_window(fields, family),
            dtype=_read_dtype(fields),
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
            "hidden_act": "silu",
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
            **({} if self.sliding_window is None else {"sliding_window": self.sliding_window}),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "pretrained_config") -> ModelConfig:
        """Read what to_dict wrote; raises ConfigError for missing or invalid entries."""
        fields = Fields(values, source)
        architecture = fields.text("architecture")
        fields.text("hidden_act", allowed=("silu",))
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
            eos_token_ids=tuple(_token_ids(fields, "eos_token_ids")),
            sliding_window=fields.integer("sliding_window", default=None),
            dtype=fields.text("dtype", allowed=DTYPES),
        )


def rope_frequencies(config: ModelConfig) -> tuple[NDArray[np.float64], float]:
    """Return the inverse frequencies [D/2] of `config`, and the factor on its cosines and sines."""
    return rope.frequencies(config.head_dim, config.rope_theta, config.rope_scaling)


def _unsupported(architecture: Any) -> ConfigError:
    return ConfigError(f"architecture {architecture!r} is not supported; supported are {', '.join(ARCHITECTURES)}")


def _read_family(fields: Fields) -> Family:
    names = fields.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise fields.error("architectures", f"give a list of one name; supported are {', '.join(ARCHITECTURES)}")
    family = FAMILY_OF.get(names[0]) if isinstance(names[0], str) else None
    if family is None:
        raise _unsupported(names[0])
    fields.text("model_type", allowed=(family.name,), default=family.name)
    return family


def _refuse_variants(fields: Fields, family: Family) -> None:
    """Raise ConfigError for what the supported architectures can ask for and the graph does not compute."""
    if fields.get("quantization_config") is not None:
        raise fields.error(
            "quantization_config", "quantised checkpoints are not read: give the float32, float16 or bfloat16 original"
        )
    fields.text("hidden_act", allowed=("silu",), default="silu")
    fields.integer("pretraining_tp", high=1, default=1)


def _read_sliding_window(fields: Fields, family: Family) -> int | None:
    """Return how many tokens the layers with a sliding window attend to, None where none has one."""
    kinds = fields.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or not set(map(str, kinds)) <= set(_LAYER_TYPES)):
        raise fields.error("layer_types", f"every layer must be {' or '.join(map(repr, _LAYER_TYPES))}")
    by_layer = kinds is not None and _SLIDING in kinds
    by_flag = family.sliding_window == "on_request" and fields.flag("use_sliding_window", default=False)
    if by_flag or by_layer or family.sliding_window == "unless_null":
        return fields.integer("sliding_window", default=None if "sliding_window" in fields.values else _DEFAULT_WINDOW)
    return None


def _read_kv_heads(fields: Fields, family: Family, num_heads: int) -> int:
    if family.needs_kv_heads and "num_key_value_heads" not in fields.values:
        raise fields.error("num_key_value_heads", f"give a whole number that divides num_attention_heads = {num_heads}")
    return fields.integer("num_key_value_heads", default=num_heads)


def _read_head_dim(fields: Fields, family: Family, hidden: int, num_heads: int) -> int:
    if family.default_head_dim is not None and "head_dim" not in fields.values:
        return family.default_head_dim
    head_dim = fields.integer("head_dim", default=None)
    if head_dim is not None:
        return head_dim
    if hidden % num_heads:
        raise fields.error(
            "head_dim", f"hidden_size {hidden} does not divide by {num_heads} heads, so it must be given"
        )
    return hidden // num_heads


def _first_ids(key: str, generation: Fields, fields: Fields, default: int | None) -> list[int | None]:
    """Return the token ids under `key` of the first file that has them, else [default]."""
    for source in (generation, fields):
        if source.get(key) is not None:
            return list(_token_ids(source, key)) or [None]
    return [None if key in fields.values else default]


def _token_ids(fields: Fields, key: str) -> list[int]:
    value = fields.get(key)
    tokens = value if isinstance(value, list) else [value]
    if not all(is_integer(token, low=0) for token in tokens):
        raise fields.error(key, "give a token id, or a list of them")
    return tokens


def _read_dtype(fields: Fields) -> str:
    key = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    return fields.text(key, allowed=DTYPES, default="float32")
