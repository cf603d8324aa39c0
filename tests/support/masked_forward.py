"""A whole model in plain NumPy that hides from each KV head what it dropped: the oracle of answers on kept tokens.

It reads the checkpoint's tensors, not the engine, and knows models of the llama family without scaled rotations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FloatArray = np.ndarray
Kept = Sequence[Sequence[np.ndarray]]  # per layer and KV head the positions of the prompt that stay


@dataclass(frozen=True)
class Forward:
    """What one pass over a sequence of T tokens gives, all in float64.

    Logits are [T,vocab]; per layer there are rotated queries [Hq,T,D], rotated keys [Hkv,T,D] and values [Hkv,T,D].
    """

    logits: FloatArray
    queries: list[FloatArray]
    keys: list[FloatArray]
    values: list[FloatArray]


def masked_forward(
    config: dict[str, Any], tensors: dict[str, np.ndarray], ids: Sequence[int], prompt: int, kept: Kept | None = None
) -> Forward:
    """Run `ids` at once; tokens from position `prompt` on see of the prompt what `kept` says, None for everything."""
    count, kv_count = config["num_attention_heads"], config["num_key_value_heads"]
    wide = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    hidden = wide["model.embed_tokens.weight"][np.asarray(ids)]
    size = config.get("head_dim") or config["hidden_size"] // count
    turn = _rotations(len(ids), size, config.get("rope_theta", 10_000.0))
    found = Forward(np.empty(0), [], [], [])
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        normed = _norm(hidden, wide[prefix + "input_layernorm.weight"], config["rms_norm_eps"])
        query, key, value = (
            _linear(wide, f"{prefix}self_attn.{name}_proj", normed).reshape(len(ids), -1, size).swapaxes(0, 1)
            for name in "qkv"
        )
        query, key = _rotate(query, turn), _rotate(key, turn)
        found.queries.append(query), found.keys.append(key), found.values.append(value)
        mixed = []
        for head in range(count):
            kv_head = head // (count // kv_count)
            logits = query[head] @ key[kv_head].T / np.sqrt(size)
            seen = _visible(len(ids), prompt, None if kept is None else kept[layer][kv_head])
            weights = np.exp(np.where(seen, logits - logits.max(axis=1, keepdims=True), -np.inf))
            mixed.append(weights / weights.sum(axis=1, keepdims=True) @ value[kv_head])
        hidden = hidden + _linear(wide, f"{prefix}self_attn.o_proj", np.concatenate(mixed, axis=1))
        normed = _norm(hidden, wide[prefix + "post_attention_layernorm.weight"], config["rms_norm_eps"])
        gate = _linear(wide, f"{prefix}mlp.gate_proj", normed)
        inner = gate / (1 + np.exp(-gate)) * _linear(wide, f"{prefix}mlp.up_proj", normed)
        hidden = hidden + _linear(wide, f"{prefix}mlp.down_proj", inner)
    normed = _norm(hidden, wide["model.norm.weight"], config["rms_norm_eps"])
    head_weight = wide["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return Forward(normed @ head_weight.T, found.queries, found.keys, found.values)


def _visible(tokens: int, prompt: int, kept: np.ndarray | None) -> np.ndarray:
    """Return which keys [T,T] each token sees: what is not behind it, and of the prompt what is kept."""
    seen = np.tril(np.ones((tokens, tokens), dtype=bool))
    if kept is not None:
        dropped = np.setdiff1d(np.arange(prompt), kept)
        seen[prompt:, dropped] = False
    return seen


def _linear(tensors: dict[str, np.ndarray], name: str, value: FloatArray) -> FloatArray:
    result = value @ tensors[f"{name}.weight"].T
    return result + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else result


def _norm(value: FloatArray, weight: FloatArray, epsilon: float) -> FloatArray:
    return value / np.sqrt((value**2).mean(axis=-1, keepdims=True) + epsilon) * weight


def _rotations(tokens: int, size: int, theta: float) -> tuple[FloatArray, FloatArray]:
    angles = np.arange(tokens)[:, None] * theta ** (-np.arange(0, size, 2) / size)
    return np.cos(angles), np.sin(angles)


def _rotate(heads: FloatArray, turn: tuple[FloatArray, FloatArray]) -> FloatArray:
    first, second = np.split(heads, 2, axis=-1)
    cosines, sines = turn
    return np.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1)
