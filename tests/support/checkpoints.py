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
}
# Variants with a SentencePiece-like tokenizer and its special tokens; the others have a byte-level one.
SENTENCEPIECE_VARIANTS = ("llama2", "llama_linear", "mistral")


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
    qwen2, qwen3 = config["model_type"] == "qwen2", config["model_type"] == "qwen3"
    attention_bias = bool(config.get("attention_bias"))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        linears = {
            "self_attn.q_proj": ((queries, hidden), attention_bias or qwen2),
            "self_attn.k_proj": ((keys, hidden), attention_bias or qwen2),
            "self_attn.v_proj": ((keys, hidden), attention_bias or qwen2),
            "self_attn.o_proj": ((hidden, queries), attention_bias),
            "mlp.gate_proj": ((inner, hidden), bool(config.get("mlp_bias"))),
            "mlp.up_proj": ((inner, hidden), bool(config.get("mlp_bias"))),
            "mlp.down_proj": ((hidden, inner), bool(config.get("mlp_bias"))),
        }
        prefix = f"model.layers.{layer}."
        for name, (shape, bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = shape
            if bias:
                shapes[f"{prefix}{name}.bias"] = shape[:1]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{norm}.weight"] = (hidden,)
        if qwen3:
            for norm in ("q_norm", "k_norm"):
                shapes[f"{prefix}self_attn.{norm}.weight"] = (head_dim,)
    return shapes


def random_tensors(config: dict[str, Any], seed: int = 0, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Return random weights for `config`; each tensor depends on `seed` and its own name only."""
    return {
        name: _random_tensor(name, shape, seed).astype(NUMPY_DTYPES[dtype])
        for name, shape in tensor_shapes(config).items()
    }


def _random_tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    # RandomState's uniform stream is frozen and needs no libm, so every machine draws the same bits.
    uniform = np.random.RandomState([seed, zlib.crc32(name.encode())]).random_sample(shape) * 2 - 1
    if "norm" in name:
        values = 1 + 0.4 * uniform
    elif name.endswith(".bias"):
        values = 0.4 * uniform
    elif "embed_tokens" in name or name.startswith("lm_head"):
        values = EMBEDDING_STD * 3**0.5 * uniform
    else:
        gain = QUERY_KEY_GAIN if ".q_proj" in name or ".k_proj" in name else 1.0
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
