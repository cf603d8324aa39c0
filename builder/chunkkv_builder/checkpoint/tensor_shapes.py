"""Names and shapes of a model's tensors, whatever format its checkpoint has."""

from __future__ import annotations

from chunkkv_builder.checkpoint.model_config import ModelConfig


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of a model, in layer order."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = (
        ("self_attn.q_proj", (queries, hidden), config.attention_bias),
        ("self_attn.k_proj", (keys, hidden), config.attention_bias),
        ("self_attn.v_proj", (keys, hidden), config.attention_bias),
        ("self_attn.o_proj", (hidden, queries), config.attention_out_bias),
        ("mlp.gate_proj", (inner, hidden), config.mlp_bias),
        ("mlp.up_proj", (inner, hidden), config.mlp_bias),
        ("mlp.down_proj", (hidden, inner), config.mlp_bias),
    )
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
        if config.post_norms:
            shapes[f"{prefix}pre_feedforward_layernorm.weight"] = (hidden,)
            shapes[f"{prefix}post_feedforward_layernorm.weight"] = (hidden,)
        if config.qk_norm:
            shapes[f"{prefix}self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"{prefix}self_attn.k_norm.weight"] = (config.head_dim,)
        for name, shape, bias in linears:
            shapes[f"{prefix}{name}.weight"] = shape
            if bias:
                shapes[f"{prefix}{name}.bias"] = shape[:1]
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def norm_before_mlp(config: ModelConfig, prefix: str) -> str:
    """Return the name of the norm's weight whose output the MLP of the layer `prefix` reads."""
    return f"{prefix}.{'pre_feedforward' if config.post_norms else 'post_attention'}_layernorm.weight"
