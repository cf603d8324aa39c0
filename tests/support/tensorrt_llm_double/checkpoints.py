"""Hugging Face checkpoints in TensorRT-LLM's own form: config.json and rank{N}.safetensors, split over ranks."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from chunkkv_builder.checkpoint.hugging_face import HuggingFaceCheckpoint
from support.tensorrt_llm_double.graph import numpy_dtype


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
    """Write the checkpoint at `source` for tp_size x pp_size ranks and return `target`; kv_cache: None, INT8, FP8."""
    checkpoint = HuggingFaceCheckpoint.open(source)
    model, world = checkpoint.config, tp_size * pp_size
    quantization = {"quant_algo": None, "kv_cache_quant_algo": kv_cache}
    config: dict[str, Any] = {**model.to_dict(), "dtype": dtype, "logits_dtype": "float32"}
    config |= {"quantization": quantization, "qk_layernorm": model.qk_norm, "dense_bias": model.attention_out_bias}
    config["mapping"] = {"world_size": world, "tp_size": tp_size, "pp_size": pp_size, "cp_size": 1, "rank": 0}
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    load = lambda name: checkpoint.converted(name, "float32")  # noqa: E731
    for rank in range(world):
        tensors = _rank_tensors(model, load, rank % tp_size, tp_size, rank // tp_size, pp_size)
        tensors = {name: np.ascontiguousarray(t.astype(numpy_dtype(dtype))) for name, t in tensors.items()}
        if kv_cache:
            for layer in range(model.num_layers // pp_size):
                name = f"transformer.layers.{layer}.attention.kv_cache_scaling_factor"
                tensors[name] = np.array([kv_scale], np.float32)
        save_file(tensors, str(target / f"rank{rank}.safetensors"))
    return target


def _rank_tensors(model: Any, load: Any, tp: int, tp_size: int, pp: int, pp_size: int) -> dict[str, np.ndarray]:
    """Return the tensors of one rank under TensorRT-LLM's names."""
    tensors = {}
    if pp == 0:
        tensors["transformer.vocab_embedding.weight"] = load("model.embed_tokens.weight")
    if pp == pp_size - 1:
        head = "model.embed_tokens.weight" if model.tie_word_embeddings else "lm_head.weight"
        tensors["transformer.ln_f.weight"] = load("model.norm.weight")
        tensors["lm_head.weight"] = np.split(load(head), tp_size)[tp]
    stage = model.num_layers // pp_size
    for local in range(stage):
        hf, own = f"model.layers.{pp * stage + local}.", f"transformer.layers.{local}."
        tensors[own + "input_layernorm.weight"] = load(hf + "input_layernorm.weight")
        tensors[own + "post_layernorm.weight"] = load(hf + "post_attention_layernorm.weight")
        kinds = ["weight", *(["bias"] if model.attention_bias else [])]
        for kind in kinds:
            parts = [np.split(load(f"{hf}self_attn.{name}_proj.{kind}"), tp_size)[tp] for name in "qkv"]
            tensors[f"{own}attention.qkv.{kind}"] = np.concatenate(parts)
        if model.qk_norm:
            for name in "qk":
                tensors[f"{own}attention.{name}_layernorm"] = load(f"{hf}self_attn.{name}_norm.weight")
        tensors[own + "attention.dense.weight"] = np.split(load(hf + "self_attn.o_proj.weight"), tp_size, axis=1)[tp]
        if model.attention_out_bias:
            tensors[own + "attention.dense.bias"] = load(hf + "self_attn.o_proj.bias")
        tensors |= _mlp_tensors(model, load, hf, own, tp, tp_size)
    return tensors


def _mlp_tensors(model: Any, load: Any, hf: str, own: str, tp: int, tp_size: int) -> dict[str, np.ndarray]:
    tensors = {}
    for kind in ["weight", *(["bias"] if model.mlp_bias else [])]:
        for trt_name, hf_name in (("fc", "gate"), ("gate", "up")):
            whole = load(f"{hf}mlp.{hf_name}_proj.{kind}")
            tensors[f"{own}mlp.{trt_name}.{kind}"] = np.split(whole, tp_size)[tp]
    tensors[own + "mlp.proj.weight"] = np.split(load(hf + "mlp.down_proj.weight"), tp_size, axis=1)[tp]
    if model.mlp_bias:
        tensors[own + "mlp.proj.bias"] = load(hf + "mlp.down_proj.bias")
    return tensors


def write_gpt(target: Path, **sizes: int) -> Path:
    """Write a random GPT with learned positions for one rank and return `target`; needs the double installed."""
    from tensorrt_llm.models import GPTForCausalLM, PretrainedConfig

    config = {"architecture": "GPTForCausalLM", "dtype": "float16", "position_embedding_type": "learned_absolute"}
    config |= {"hidden_act": "gelu", "attn_bias": True, "dense_bias": True, "mlp_bias": True}
    config |= {"mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1, "cp_size": 1, "rank": 0}, **sizes}
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {}
    for name, parameter in GPTForCausalLM(PretrainedConfig.from_dict(config)).named_parameters():
        random = np.random.RandomState(zlib.crc32(name.encode()))
        spread = 0.3 if "embedding" in name or len(parameter.shape) == 1 else 2 / parameter.shape[-1] ** 0.5
        values = spread * random.standard_normal(parameter.shape)
        tensors[name] = (values + name.endswith(("layernorm.weight", "ln_f.weight"))).astype(np.float16)
    save_file(tensors, str(target / "rank0.safetensors"))
    return target
