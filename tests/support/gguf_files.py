"""Tiny GGUF files of the variants of support.checkpoints, written as llama.cpp's converter does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from tokenizers import Tokenizer

from support.checkpoints import (
    SENTENCEPIECE_VARIANTS,
    VARIANTS,
    random_tensors,
    variant_config,
    write_checkpoint,
    write_tensors,
)
from support.tiny_tokenizers import CHAT_TEMPLATE, byte_level, sentencepiece

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3"}
# phi3 has longrope, which GGUF files are refused with: tests give it without.
GGUF_VARIANTS = [name for name, config in VARIANTS.items() if config["model_type"] in ARCHITECTURES and name != "phi3"]
# What the package can make of numbers, and what it only reads: for those blocks are drawn at random.
QUANTISED = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
DRAWN = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
_SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # bytes of float16 numbers
_LARGEST = {"Q2_K": 45, "Q3_K": 128, "Q4_K": 945, "Q5_K": 1953, "Q6_K": 4096}  # of a value whose scales are 1
K_SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}  # K types have blocks of 256


def write_gguf(
    path: Path | str,
    variant: str,
    kind: str = "F32",
    *,
    parts: int = 1,
    metadata: dict[str, Any] | None = None,
    **overrides: Any,
) -> dict[str, np.ndarray]:
    """Write `variant` as a GGUF file with its matrices in type `kind`; return the weights that it stands for.

    `parts` splits it, `metadata` adds or replaces values (None removes one), and `overrides` replace keys of the
    variant's config.json. The weights have Hugging Face's names, shapes and order of rows.
    """
    config = variant_config(variant, **overrides)
    architecture = ARCHITECTURES[config["model_type"]]
    tensors = random_tensors(config)
    per_part = -(-(len(tensors) + 1) // parts) if parts > 1 else 0
    writer = gguf.GGUFWriter(str(path), architecture, split_max_tensors=per_part)
    _add_model(writer, architecture, config)
    add_tokenizer(writer, "sentencepiece" if variant in SENTENCEPIECE_VARIANTS else "byte_level")
    _replace_metadata(writer, metadata or {})
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config["num_hidden_layers"])
    weights = {}
    for name, tensor in tensors.items():
        stored = Type[kind] if tensor.ndim == 2 else Type.F32
        data = _stored(tensor, stored)
        weights[name] = _values(data, stored).reshape(tensor.shape)
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            data = _permuted(data, heads)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=stored)
    if (config.get("rope_scaling") or {}).get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def write_twin(folder: Path, variant: str, weights: dict[str, np.ndarray], **overrides: Any) -> Path:
    """Write the Hugging Face checkpoint of `variant` with `weights` to `folder` and return that."""
    write_checkpoint(folder, variant, **overrides)
    write_tensors(folder, weights)
    return folder


def add_tokenizer(writer: gguf.GGUFWriter, style: str) -> None:
    """Describe a tiny tokenizer of support.tiny_tokenizers in the metadata."""
    tokenizer = tiny_tokenizer(style)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    special = set(tokenizer.get_added_tokens_decoder())
    kinds = [gguf.TokenType.CONTROL if number in special else gguf.TokenType.NORMAL for number in range(len(tokens))]
    writer.add_token_list(tokens)
    if style == "byte_level":
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
    else:
        kinds = [
            gguf.TokenType.BYTE if token.startswith("<0x") else kind for token, kind in zip(tokens, kinds, strict=True)
        ]
        kinds[0] = gguf.TokenType.UNKNOWN
        ranks = {"".join(pair): rank for rank, pair in enumerate(model["merges"])}
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(ranks.get(token, len(ranks))) for token in tokens])
    writer.add_token_types(kinds)
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT_TEMPLATE)


def tiny_tokenizer(style: str) -> Tokenizer:
    """Return the tokenizer that add_tokenizer describes."""
    return byte_level() if style == "byte_level" else sentencepiece()


def _replace_metadata(writer: gguf.GGUFWriter, metadata: dict[str, Any]) -> None:
    for key, value in metadata.items():
        writer.kv_data[0].pop(key, None)
        if value is not None:
            is_large = isinstance(value, int) and value >= 2**31
            kind = gguf.GGUFValueType.UINT32 if is_large else gguf.GGUFValueType.get_type(value)
            writer.add_key_value(key, value, kind)


def random_blocks(shape: tuple[int, ...], kind: str, seed: int = 0) -> np.ndarray:
    """Return random blocks of a type with K: uint8 [rows, bytes], of values like those of a small model's weights."""
    block, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    generator = np.random.RandomState([seed, *shape])
    blocks = generator.randint(0, 256, (shape[0], shape[1] // block, size)).astype(np.uint8)
    for place in _SCALES[kind]:
        scales = generator.uniform(0.1, 0.5, blocks.shape[:2]) / _LARGEST[kind]
        blocks[..., place : place + 2] = scales.astype(np.float16)[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


def _stored(tensor: np.ndarray, kind: Type) -> np.ndarray:
    if kind.name in DRAWN:
        return random_blocks(tensor.shape, kind.name, seed=int(abs(tensor.flat[0]) * 1e6))
    return gguf.quantize(tensor, kind)


def _values(data: np.ndarray, kind: Type) -> np.ndarray:
    return np.ascontiguousarray(gguf.dequantize(data, kind), dtype=np.float32)


def _permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Return rows of a query or key projection as llama.cpp's converter orders them (LlamaModel.permute)."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def _llama3_factors(config: dict[str, Any]) -> np.ndarray:
    """Return what llama.cpp's converter writes for Llama 3.1's scaling (LlamaModel.generate_extra_tensors)."""
    scaling, head_dim = config["rope_scaling"], config["hidden_size"] // config["num_attention_heads"]
    low, high, original = (
        scaling[key] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    factors = []
    for step in range(0, head_dim, 2):
        wavelength = 2 * math.pi * config["rope_theta"] ** (step / head_dim)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(scaling["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, np.float32)


def _add_model(writer: gguf.GGUFWriter, architecture: str, config: dict[str, Any]) -> None:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(config.get("rope_theta") or rope.get("rope_theta", 10000.0)))
    if "partial_rotary_factor" in config:
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        writer.add_rope_dimension_count(int(head_dim * config["partial_rotary_factor"]))
        writer.add_sliding_window(config.get("sliding_window") or 0)
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    kind = rope.get("rope_type", rope.get("type"))
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
