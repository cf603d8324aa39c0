"""Tiny random checkpoints in Hugging Face's layout, one variant per model feature; the same bytes on every machine."""

from __future__ import annotations

import copy
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from support.tiny_tokenizers import write_tokenizer

NUMPY_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
EMBEDDING_STD = 0.3
QUERY_KEY_GAIN = 1.6  # attention far from uniform, so a wrong mask or rotation shows in the logits

_SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_LLAMA = {**_SIZES, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
    "long_factor": [1.0, 1.5, 3.0, 6.0, 12.0, 24.0],
}
_GEMMA = {
    **_SIZES,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0, "beta_slow": 1.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama2": {**_LLAMA, "num_key_value_heads": 4},
    "llama3": {**_LLAMA, "rope_theta": 50000.0, "rope_scaling": _LLAMA3_ROPE, "attention_bias": False},
    "llama_linear": {**_LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "llama_yarn": {**_LLAMA, "rope_theta": 10000.0, "rope_scaling": _YARN},
    "llama_tied": {**_LLAMA, "tie_word_embeddings": True, "head_dim": 16},
    "llama_bias": {**_LLAMA, "attention_bias": True, "mlp_bias": True},
    "mistral": {
        **_SIZES,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": None,
        "rope_theta": 1000000.0,
    },
    "qwen2": {
        **_SIZES,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": False,
        "sliding_window": 256,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "qwen3": {
        **_SIZES,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 32,
        "num_hidden_layers": 2,
        "attention_bias": False,
        "use_sliding_window": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "tie_word_embeddings": True,
    },
    "phi3": {
        **_SIZES,
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "partial_rotary_factor": 0.75,
        "rope_theta": 10000.0,
        "rope_scaling": _LONGROPE,
        "max_position_embeddings": 8192,
        "original_max_position_embeddings": 4096,
        "pad_token_id": 0,
    },
    "granite": {
        **_SIZES,
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "attention_bias": True,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.5,
    },
    "smollm3": {
        **_SIZES,
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "no_rope_layers": [1, 0, 1],
        "use_sliding_window": False,
        "pad_token_id": 0,
    },
    "gemma": {**_GEMMA, "architectures": ["GemmaForCausalLM"], "model_type": "gemma"},
    "gemma2": {
        **_GEMMA,
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 4.0,
        "sliding_window": 4096,
    },
    "gemma3": {
        **_GEMMA,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 20,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
}
# Variants with a SentencePiece-like tokenizer and its special tokens; the others have a byte-level one.
SENTENCEPIECE_VARIANTS = ("llama2", "llama_linear", "mistral")
_ADDS_ONE = ("gemma", "gemma2", "gemma3_text")  # model types whose norms multiply by 1 + their weight


def variant_config(variant: str, dtype: str = "float32", **overrides: Any) -> dict[str, Any]:
    """Return the config.json of `variant` with `overrides` of its keys."""
    config = copy.deepcopy(VARIANTS[variant])
    bos, eos = (1, 2) if variant in SENTENCEPIECE_VARIANTS else (0, 1)
    dtype_key = "dtype" if "rope_parameters" in config else "torch_dtype"
    return {**config, dtype_key: dtype, "bos_token_id": bos, "eos_token_id": eos, **overrides}


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor that a model of `config` has, as transformers stores them.

    Written from transformers, whose loader confirms it when golden files are made; the builder has its own list
    (chunkkv_builder.checkpoint.tensor_shapes), and a test compares the two.
    """
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = (config[f"num_{kind}_heads"] * head_dim for kind in ("attention", "key_value"))
    kind = config["model_type"]
    attention_bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    qkv_bias = attention_bias or kind == "qwen2"
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    linears = {
        "self_attn.q_proj": ((queries, hidden), qkv_bias),
        "self_attn.k_proj": ((keys, hidden), qkv_bias),
        "self_attn.v_proj": ((keys, hidden), qkv_bias),
        "self_attn.o_proj": ((hidden, queries), attention_bias),
        "mlp.gate_proj": ((inner, hidden), mlp_bias),
        "mlp.up_proj": ((inner, hidden), mlp_bias),
        "mlp.down_proj": ((hidden, inner), mlp_bias),
    }
    if kind == "phi3":
        linears = {
            "self_attn.qkv_proj": ((queries + 2 * keys, hidden), False),
            "self_attn.o_proj": ((hidden, queries), False),
            "mlp.gate_up_proj": ((2 * inner, hidden), False),
            "mlp.down_proj": ((hidden, inner), False),
        }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if kind in ("gemma2", "gemma3_text"):
        norms |= {"pre_feedforward_layernorm": hidden, "post_feedforward_layernorm": hidden}
    if kind in ("qwen3", "gemma3_text"):
        norms |= {"self_attn.q_norm": head_dim, "self_attn.k_norm": head_dim}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, (shape, bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = shape
            if bias:
                shapes[f"{prefix}{name}.bias"] = shape[:1]
        for name, width in norms.items():
            shapes[f"{prefix}{name}.weight"] = (width,)
    return shapes


def random_tensors(config: dict[str, Any], seed: int = 0, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Return random weights for `config`; each tensor depends on `seed` and its own name only."""
    norm = 0.0 if config["model_type"] in _ADDS_ONE else 1.0
    return {
        name: _random_tensor(name, shape, seed, norm).astype(NUMPY_DTYPES[dtype])
        for name, shape in tensor_shapes(config).items()
    }


def as_read(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors of a checkpoint as a reader names and gives them: fused ones apart, norms as they are used.

    Whole norms are float32 where 1 is added to them.
    """
    inner = config["intermediate_size"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    queries, keys = (config[f"num_{kind}_heads"] * head_dim for kind in ("attention", "key_value"))
    parts = {"qkv_proj": {"q_proj": queries, "k_proj": keys, "v_proj": keys}, "gate_up_proj": dict(gate_proj=inner)}
    parts["gate_up_proj"]["up_proj"] = inner
    result = {}
    for name, tensor in tensors.items():
        whole = name.split(".")[-2]
        if config["model_type"] in _ADDS_ONE and "norm" in name:
            result[name] = tensor.astype(np.float32) + 1
        elif whole not in parts:
            result[name] = tensor
        else:
            first = 0
            for part, rows in parts[whole].items():
                result[name.replace(whole, part)] = tensor[first : first + rows]
                first += rows
    return result


def _random_tensor(name: str, shape: tuple[int, ...], seed: int, norm: float) -> np.ndarray:
    # RandomState's uniform stream is frozen and needs no libm, so every machine draws the same bits.
    uniform = np.random.RandomState([seed, zlib.crc32(name.encode())]).random_sample(shape) * 2 - 1
    if "norm" in name:
        values = norm + 0.4 * uniform
    elif name.endswith(".bias"):
        values = 0.4 * uniform
    elif "embed_tokens" in name or name.startswith("lm_head"):
        values = EMBEDDING_STD * 3**0.5 * uniform
    else:
        gain = QUERY_KEY_GAIN if any(part in name for part in (".q_proj", ".k_proj", ".qkv_proj")) else 1.0
        values = gain * (3 / shape[1]) ** 0.5 * uniform
    return values.astype(np.float32)


def write_checkpoint(
    directory: Path | str,
    variant: str,
    *,
    seed: int = 0,
    dtype: str = "float32",
    shards: int = 1,
    with_tokenizer: bool = True,
    **overrides: Any,
) -> Path:
    """Write the checkpoint `variant` to `directory` and return that; `overrides` replace keys of its config.json."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = variant_config(variant, dtype, **overrides)
    _write_json(directory / "config.json", config)
    _write_json(
        directory / "generation_config.json",
        {"bos_token_id": config["bos_token_id"], "eos_token_id": [config["eos_token_id"]]},
    )
    write_tensors(directory, random_tensors(config, seed, dtype), shards)
    if with_tokenizer:
        write_tokenizer(directory, "sentencepiece" if variant in SENTENCEPIECE_VARIANTS else "byte_level")
    return directory


def write_tensors(directory: Path, tensors: dict[str, np.ndarray], shards: int = 1) -> None:
    """Write `tensors` as model.safetensors, or as an index and that many shards."""
    if shards == 1:
        save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, str(directory / file), metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)


def weights_sha256(tensors: dict[str, np.ndarray]) -> str:
    """Return one digest over the names, shapes and bytes of all tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].shape} {tensors[name].dtype}\n".encode())
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
