"""Hugging Face checkpoints in TensorRT-LLM's own form: config.json and rank{N}.safetensors, split over ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from chunkkv_builder.checkpoint.hugging_face import HuggingFaceCheckpoint
from support.tensorrt_llm_double.graph import numpy_dtype

POSITIONS = "transformer.position_embedding.weight"


def convert(
    source: Path,
    target: Path,
    dtype: str = "float16",
    *,
    tp_size: int = 1,
    pp_size: int = 1,
    kv_cache: str | None = None,
    kv_scale: float = 1.0,
) -> Path:
    """Write the Llama at `source` for tp_size x pp_size ranks and return `target`; kv_cache: None, INT8, FP8."""
    checkpoint = HuggingFaceCheckpoint.open(source)
    model, world = checkpoint.config, tp_size * pp_size
    assert not (model.qk_norm or model.attention_bias or model.attention_out_bias or model.mlp_bias)
    config: dict[str, Any] = {**model.to_dict(), "dtype": dtype}
    config["quantization"] = {"quant_algo": None, "kv_cache_quant_algo": kv_cache}
    config["mapping"] = {"world_size": world, "tp_size": tp_size, "pp_size": pp_size, "cp_size": 1, "rank": 0}
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    stage = model.num_layers // pp_size
    for rank in range(world):
        pp = rank // tp_size
        tensors = _rank_tensors(checkpoint, rank % tp_size, tp_size, range(pp * stage, (pp + 1) * stage))
        tensors = {name: np.ascontiguousarray(t.astype(numpy_dtype(dtype))) for name, t in tensors.items()}
        for layer in range(stage if kv_cache else 0):
            tensors[f"transformer.layers.{layer}.attention.kv_cache_scaling_factor"] = np.array([kv_scale], np.float32)
        save_file(tensors, str(target / f"rank{rank}.safetensors"))
    return target


def _rank_tensors(checkpoint: HuggingFaceCheckpoint, tp: int, tp_size: int, stage: range) -> dict[str, np.ndarray]:
    """Return the tensors of one rank under TensorRT-LLM's names."""
    model = checkpoint.config
    load: Callable[[str], np.ndarray] = lambda name: checkpoint.converted(name, "float32")  # noqa: E731
    rows: Callable[[str], np.ndarray] = lambda name: np.split(load(name), tp_size)[tp]  # noqa: E731
    columns: Callable[[str], np.ndarray] = lambda name: np.split(load(name), tp_size, axis=1)[tp]  # noqa: E731
    tensors = {}
    if stage[0] == 0:
        tensors["transformer.vocab_embedding.weight"] = load("model.embed_tokens.weight")
    if stage[-1] == model.num_layers - 1:
        tensors["transformer.ln_f.weight"] = load("model.norm.weight")
        tensors["lm_head.weight"] = rows("model.embed_tokens.weight" if model.tie_word_embeddings else "lm_head.weight")
    for local, layer in enumerate(stage):
        hf, own = f"model.layers.{layer}.", f"transformer.layers.{local}."
        tensors[own + "input_layernorm.weight"] = load(hf + "input_layernorm.weight")
        tensors[own + "post_layernorm.weight"] = load(hf + "post_attention_layernorm.weight")
        parts = [rows(f"{hf}self_attn.{name}_proj.weight") for name in "qkv"]
        tensors[own + "attention.qkv.weight"] = np.concatenate(parts)
        tensors[own + "attention.dense.weight"] = columns(hf + "self_attn.o_proj.weight")
        for name, hf_name in (("fc", "gate"), ("gate", "up")):
            tensors[f"{own}mlp.{name}.weight"] = rows(f"{hf}mlp.{hf_name}_proj.weight")
        tensors[own + "mlp.proj.weight"] = columns(hf + "mlp.down_proj.weight")
    return tensors


def with_learned_positions(source: Path, target: Path) -> Path:
    """Write the converted checkpoint of one rank at `source` with random learned positions instead of rotation."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config |= {"position_embedding_type": "learned_absolute", "rotary_scaling": None}
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors, size = load_file(source / "rank0.safetensors"), (config["max_position_embeddings"], config["hidden_size"])
    positions = np.random.default_rng(7).normal(size=size, scale=0.3).astype(np.float16)
    save_file({**tensors, POSITIONS: positions}, str(target / "rank0.safetensors"))
    return target
