"""What a GGUF file says about its model: its configuration, and what its tensors are called here."""

from __future__ import annotations

from collections.abc import Mapping

from chunkkv.engine.fields import Fields, shown
from chunkkv.errors import CheckpointError, ConfigError
from chunkkv_builder.checkpoint.families import FAMILY_OF
from chunkkv_builder.checkpoint.gguf_file import GgufTensor, Value
from chunkkv_builder.checkpoint.gguf_tokenizer import GgufTokenizer
from chunkkv_builder.checkpoint.model_config import ARCHITECTURES, MAX_LAYERS, ModelConfig
from chunkkv_builder.checkpoint.rope import DEFAULT_THETA, RopeScaling
from chunkkv_builder.checkpoint.stored_tensors import stored_shapes

# Mistral's models are "llama" in GGUF: they compute the same.
_FAMILIES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
# Every key of an architecture that is read below, or that says nothing about what is computed. A key beyond them, such
# as a soft cap or experts, could change the results, so it is refused.
_KNOWN_KEYS = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scale_linear"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
    *("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_ext_factor"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scaling.finetuned"),
    *("expert_count", "expert_used_count", "attention.sliding_window", "use_parallel_residual"),
    *("attention.causal", "tensor_data_layout"),
)
# What some of these keys must say, because only that is computed.
_REQUIRED_VALUES: Mapping[str, Value] = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.sliding_window": 0,
    "use_parallel_residual": False,
    "attention.causal": True,
    "tensor_data_layout": "Meta AI original pth",
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
}
_ANY_VALUE = {"phi3": ("attention.sliding_window",)}  # of an architecture, whatever _REQUIRED_VALUES says
ROPE_FACTORS = "rope_freqs.weight"
PLAIN_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SKIPPED = ("attn_rot_embd.weight", "attn_rot_embd")  # recomputed from the configuration; old files store it
_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FUSED_UP = "mlp.gate_up_proj"  # what ffn_up is in a family with fused projections
_OUTSIDE_LAYERS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def tensor_name(name: str, architecture: str) -> str | None:
    """Return what tensor `name` of a GGUF file is called in Hugging Face's checkpoints, None where it has no place."""
    if name in _OUTSIDE_LAYERS:
        return _OUTSIDE_LAYERS[name]
    block, _, rest = name.partition(".")
    layer, _, rest = rest.partition(".")
    module, _, part = rest.partition(".")
    if block != "blk" or not layer.isdecimal() or str(int(layer)) != layer:
        return None
    if module not in _MODULES or part not in ("weight", "bias"):
        return None
    is_fused_up = module == "ffn_up" and FAMILY_OF[architecture].fused_projections
    return f"model.layers.{layer}.{_FUSED_UP if is_fused_up else _MODULES[module]}.{part}"


def is_unused(name: str) -> bool:
    """Return whether a model is complete without tensor `name` of its GGUF file."""
    return name == ROPE_FACTORS or (name.startswith("blk.") and name.split(".", 2)[-1] in _SKIPPED)


def read_config(
    metadata: Mapping[str, Value],
    tensors: Mapping[str, GgufTensor],
    rope_factors: tuple[float, ...] | None,
    tokenizer: GgufTokenizer | None,
    source: str,
) -> ModelConfig:
    """Return the model that a GGUF file describes.

    Parameters
    ----------
    metadata : mapping
        The file's metadata.
    tensors : mapping
        Its tensors, by their names in the file.
    rope_factors : tuple of float or None
        The values of the tensor rope_freqs.weight, None where there is none.
    tokenizer : GgufTokenizer or None
        Its tokenizer, which knows the tokens that begin a text and end an answer; None where it has none.
    source : str
        What the file is called in errors.

    Raises
    ------
    ConfigError
        For an architecture or a feature of one that is not supported, and for missing or invalid values.
    """
    name, model = _architecture(Fields(metadata, source))
    hidden, heads = model.integer("embedding_length"), model.integer("attention.head_count")
    head_dim = _head_dim(model, hidden, heads)
    positions = model.integer("context_length")
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{source}: tensor 'token_embd.weight' is missing; it is needed by every model")
    config = ModelConfig(
        architecture=_FAMILIES[name],
        family=ARCHITECTURES[_FAMILIES[name]],
        vocab_size=tensors["token_embd.weight"].shape[0],
        hidden_size=hidden,
        intermediate_size=model.integer("feed_forward_length"),
        num_layers=model.integer("block_count", high=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=model.integer("attention.head_count_kv", default=heads),
        head_dim=head_dim,
        rms_norm_eps=model.number("attention.layer_norm_rms_epsilon"),
        rope_theta=model.number("rope.freq_base", above=1.0, default=DEFAULT_THETA),
        rope_scaling=_rope_scaling(model, positions, rope_factors, head_dim),
        max_position_embeddings=positions,
        tie_word_embeddings="output.weight" not in tensors,
        attention_bias=name == "qwen2" or "blk.0.attn_q.bias" in tensors,
        attention_out_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        qk_norm=name == "qwen3",
        bos_token_id=None if tokenizer is None else tokenizer.bos_token_id,
        eos_token_ids=() if tokenizer is None else tokenizer.eos_token_ids,
        sliding_window=model.integer("attention.sliding_window", low=0, default=0) or None,
        rotary_dim=_rotary_dim(model, name, head_dim),
        dtype=PLAIN_TYPES.get(tensors["token_embd.weight"].type.name, "float32"),
    )
    _check_tensors(config, tensors, source)
    return config


def _architecture(general: Fields) -> tuple[str, Fields]:
    """Return the architecture's name, and the values under "NAME.", which must all be known."""
    name, source = general.text("general.architecture"), general.source
    if name not in _FAMILIES:
        raise ConfigError(
            f"{source}: architecture {shown(name)} is not supported; supported GGUF architectures are "
            f"{', '.join(_FAMILIES)} (Mistral's models are 'llama')"
        )
    values = {
        key.removeprefix(f"{name}."): value for key, value in general.values.items() if key.startswith(f"{name}.")
    }
    for key, value in values.items():
        if key in _ANY_VALUE.get(name, ()):
            continue
        if key not in _KNOWN_KEYS or value != _REQUIRED_VALUES.get(key, value):
            raise ConfigError(
                f"{source}: '{name}.{key}' is {shown(value)}, a feature that is not supported: results without it "
                "would be wrong, give a model that does not use it"
            )
    return name, Fields(values, f"{source}: {name}")


def _head_dim(model: Fields, hidden: int, heads: int) -> int:
    if hidden % heads and "attention.key_length" not in model.values:
        raise model.error("attention.key_length", f"{hidden} does not divide by {heads} heads, so it must be given")
    head_dim = model.integer("attention.key_length", default=hidden // heads)
    if model.integer("attention.value_length", default=head_dim) != head_dim:
        raise model.error("attention.value_length", f"only {head_dim}, the width of a key head, is supported")
    return head_dim


def _rotary_dim(model: Fields, name: str, head_dim: int) -> int | None:
    """Return how many dimensions of a head are rotated, None for all."""
    rotary_dim = model.integer("rope.dimension_count", default=head_dim)
    if rotary_dim == head_dim:
        return None
    if not FAMILY_OF[_FAMILIES[name]].reads_partial_rotary:
        raise model.error("rope.dimension_count", f"only {head_dim}, the width of a key head, is supported")
    if rotary_dim % 2 or rotary_dim > head_dim:
        raise model.error("rope.dimension_count", f"give an even number of at most {head_dim}, the width of a head")
    return rotary_dim


def _rope_scaling(
    model: Fields, positions: int, rope_factors: tuple[float, ...] | None, head_dim: int
) -> RopeScaling | None:
    """Return the rotary scaling; rope_freqs.weight has one divisor per frequency, as Llama 3.1 needs them."""
    kind = model.text("rope.scaling.type", ("none", "linear", "yarn"), default="linear")
    factor = model.number("rope.scaling.factor", default=model.number("rope.scale_linear", default=1.0))
    if kind == "none":
        factor = 1.0
    if rope_factors is not None:
        if kind == "yarn":
            raise model.error("rope.scaling.type", f"it cannot be combined with the tensor {ROPE_FACTORS!r}")
        if len(rope_factors) != head_dim // 2 or not all(1e-6 < value < 1e6 for value in rope_factors):
            raise CheckpointError(
                f"{model.source}: the tensor {ROPE_FACTORS!r} must have {head_dim // 2} positive numbers, one per "
                "rotary frequency: the file is damaged, download or convert it again"
            )
        return RopeScaling("factors", factor, factors=rope_factors)
    if kind == "yarn":
        original = model.integer("rope.scaling.original_context_length", default=positions)
        return RopeScaling(
            "yarn",
            factor,
            original,
            beta_fast=model.number("rope.scaling.yarn_beta_fast", default=32.0),
            beta_slow=model.number("rope.scaling.yarn_beta_slow", default=1.0),
        )
    return None if factor == 1.0 else RopeScaling("linear", factor)


def _check_tensors(config: ModelConfig, tensors: Mapping[str, GgufTensor], source: str) -> None:
    """Raise CheckpointError unless `tensors` are exactly those of `config`, with the right shapes."""
    expected = stored_shapes(config)
    ours = {name: tensor_name(name, config.architecture) for name in tensors}
    for name, our_name in ours.items():
        if our_name not in expected and not is_unused(name):
            raise CheckpointError(
                f"{source}: tensor {name!r} is extra; {config.architecture} has none of that name, so it would be left "
                "out of every result"
            )
    theirs = {our_name: name for name, our_name in ours.items() if our_name is not None}
    if missing := [name for name in expected if name not in theirs]:
        raise CheckpointError(
            f"{source}: the tensor for {missing[0]!r} is missing ({len(missing)} in all); the metadata describes "
            f"{config.architecture} with {config.num_layers} layers"
        )
    for our_name, shape in expected.items():
        stored = tensors[theirs[our_name]].shape
        if stored != shape:
            raise CheckpointError(
                f"{source}: tensor {theirs[our_name]!r} has shape {list(stored)}; the metadata expects {list(shape)}"
            )
