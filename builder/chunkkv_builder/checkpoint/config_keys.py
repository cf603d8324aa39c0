"""What single keys of a Hugging Face config mean for a family, and refusals of what the graphs do not compute."""

from __future__ import annotations

from typing import Any, NamedTuple

from chunkkv.engine.fields import Fields, is_integer
from chunkkv.errors import ConfigError
from chunkkv_builder.checkpoint.families import FAMILIES, FAMILY_OF, Family

DTYPES = ("float32", "float16", "bfloat16")
GLOBAL, LOCAL, UNROTATED = ROTATIONS = ("global", "local", "none")
_FULL, _SLIDING = _LAYER_TYPES = ("full_attention", "sliding_attention")
_DEFAULT_QUERY_SCALAR = 256.0


def unsupported(architecture: Any) -> ConfigError:
    """Return the error for an architecture that is no family's."""
    names = ", ".join(family.architecture for family in FAMILIES)
    return ConfigError(f"architecture {architecture!r} is not supported; supported are {names}")


def read_family(fields: Fields) -> Family:
    """Return the family of a config; raises ConfigError for any other architecture."""
    names = fields.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        listed = ", ".join(family.architecture for family in FAMILIES)
        raise fields.error("architectures", f"give a list of one name; supported are {listed}")
    family = FAMILY_OF.get(names[0]) if isinstance(names[0], str) else None
    if family is None:
        raise unsupported(names[0])
    fields.text("model_type", allowed=(family.name,), default=family.name)
    return family


def refuse_variants(fields: Fields, family: Family) -> None:
    """Raise ConfigError for what the supported architectures can ask for and the graph does not compute."""
    if fields.get("quantization_config") is not None:
        raise fields.error(
            "quantization_config", "quantised checkpoints are not read: give the float32, float16 or bfloat16 original"
        )
    for key in dict.fromkeys((family.activation_key, "hidden_act", "hidden_activation")):
        # A key that the family does not read may only repeat what is computed, because versions of transformers differ.
        fields.text(key, allowed=(family.activation,), default=family.activation)
    fields.integer("pretraining_tp", high=1, default=1)
    if fields.flag("use_bidirectional_attention", default=False):
        raise fields.error("use_bidirectional_attention", "only false is supported: a token sees those before it")


def read_layer_types(fields: Fields, family: Family, num_layers: int) -> tuple[str, ...] | None:
    """Return "full_attention" or "sliding_attention" for every layer, None where they are not told apart."""
    advice = f"give a list of {num_layers} entries, each {' or '.join(map(repr, _LAYER_TYPES))}"
    kinds = fields.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or not set(map(str, kinds)) <= set(_LAYER_TYPES) or len(kinds) != num_layers:
            raise fields.error("layer_types", advice)
        return tuple(kinds)
    if family.sliding_window != "by_layer":
        return None
    every = family.full_attention_every
    if family.rotated_layers == "two_bases":
        every = fields.integer("sliding_window_pattern", default=every)
    assert every is not None
    return tuple(_SLIDING if (layer + 1) % every else _FULL for layer in range(num_layers))


def read_sliding_window(fields: Fields, family: Family, kinds: tuple[str, ...] | None, num_layers: int) -> int | None:
    """Return how many tokens the layers with a sliding window attend to, None where none has one."""
    if kinds is not None and family.sliding_window != "always":
        has_window = _SLIDING in kinds
    elif family.sliding_window == "on_request":
        has_window = fields.flag("use_sliding_window", default=False)
        if has_window and family.default_max_window_layers is not None:
            full_layers = fields.integer("max_window_layers", low=0, default=family.default_max_window_layers)
            has_window = full_layers < num_layers
    else:
        has_window = family.sliding_window == "always"
    default = None if "sliding_window" in fields.values else family.default_window
    return fields.integer("sliding_window", default=default) if has_window else None


def read_rotations(fields: Fields, family: Family, kinds: tuple[str, ...] | None, num_layers: int) -> tuple[str, ...]:
    """Return one of ROTATIONS for every layer; empty where all are rotated alike."""
    if family.rotated_layers == "two_bases":
        assert kinds is not None
        return tuple(LOCAL if kind == _SLIDING else GLOBAL for kind in kinds)
    if family.rotated_layers != "no_rope_layers":
        return ()
    if fields.get("no_rope_layers") is None:
        interval = fields.integer("no_rope_layer_interval", default=4)
        rotated = [(layer + 1) % interval != 0 for layer in range(num_layers)]
    else:
        flags = fields.integers("no_rope_layers", high=1)
        if len(flags) < num_layers:
            raise fields.error("no_rope_layers", f"give 1 or 0 for each of the {num_layers} layers")
        rotated = [flag == 1 for flag in flags[:num_layers]]
    return () if all(rotated) else tuple(GLOBAL if each else UNROTATED for each in rotated)


def read_attention_scale(fields: Fields, family: Family) -> float | None:
    """Return what queries times keys are multiplied by, None for head_dim ** -0.5."""
    if family.attention_scale == "query_pre_attn_scalar":
        return fields.number("query_pre_attn_scalar", default=_DEFAULT_QUERY_SCALAR) ** -0.5
    if family.attention_scale == "attention_multiplier":
        return fields.number("attention_multiplier", default=1.0)
    return None


def read_multipliers(fields: Fields, family: Family, hidden_size: int) -> dict[str, float]:
    """Return what embeddings and the outputs of a layer's halves are multiplied by, and logits divided by."""
    if family.scales_embedding:
        return {"embedding_scale": hidden_size**0.5}
    if not family.reads_multipliers:
        return {}
    names = {
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_divisor",
    }
    return {name: fields.number(key, default=1.0) for key, name in names.items()}


class SoftCaps(NamedTuple):
    """Bounds of the logits of attention and of the vocabulary, None for none."""

    attention: float | None
    logits: float | None


def read_soft_caps(fields: Fields, family: Family) -> SoftCaps:
    """Return the soft caps of a family that has them."""
    if family.default_soft_caps is None:
        return SoftCaps(None, None)
    keys = ("attn_logit_softcapping", "final_logit_softcapping")
    attention, final = (
        fields.number(key, default=None if key in fields.values else missing)
        for key, missing in zip(keys, family.default_soft_caps, strict=True)
    )
    if attention is not None and family.default_soft_caps[0] is None:
        raise fields.error(keys[0], "only null is supported: transformers reads this key and does not apply it")
    return SoftCaps(attention, final)


def read_kv_heads(fields: Fields, family: Family, num_heads: int) -> int:
    """Return the number of KV heads of a layer."""
    if family.needs_kv_heads and "num_key_value_heads" not in fields.values:
        raise fields.error("num_key_value_heads", f"give a whole number that divides num_attention_heads = {num_heads}")
    return fields.integer("num_key_value_heads", default=num_heads)


def read_head_dim(fields: Fields, family: Family, hidden: int, num_heads: int) -> int:
    """Return the width of a head."""
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


def read_first_ids(key: str, generation: Fields, fields: Fields, default: int | None) -> list[int | None]:
    """Return the token ids under `key` of the first file that has them, else [default]."""
    for source in (generation, fields):
        if source.get(key) is not None:
            return list(read_token_ids(source, key)) or [None]
    return [None if key in fields.values else default]


def read_token_ids(fields: Fields, key: str) -> list[int]:
    """Return the token id, or the list of them, under `key`."""
    value = fields.get(key)
    tokens = value if isinstance(value, list) else [value]
    if not all(is_integer(token, low=0) for token in tokens):
        raise fields.error(key, "give a token id, or a list of them")
    return tokens


def read_dtype(fields: Fields) -> str:
    """Return the type that the config says its tensors have."""
    key = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    return fields.text(key, allowed=DTYPES, default="float32")
