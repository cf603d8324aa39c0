"""Checkpoints that say a thing twice, differently, or in an unusual place: through transformers and through this."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import engines
from support.checkpoints import random_tensors, write_checkpoint, write_tensors
from transformers import AutoModelForCausalLM, AutoTokenizer

from chunkkv import ChunkKVSession, SamplingParams
from chunkkv.text.tokenizer import Tokenizer
from chunkkv_builder import build as build_engine
from chunkkv_builder.checkpoint.hugging_face import HuggingFaceCheckpoint
from chunkkv_builder.config import longest_context

pytestmark = pytest.mark.peers
NEW = 12
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
_SU = {
    "type": "su",
    "short_factor": [1.0, 1.5] * 3,
    "long_factor": [2.0] * 6,
    "original_max_position_embeddings": 4096,
}
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "head_dim is not hidden / heads": ("llama3", {"head_dim": 24}),
    "head_dim is null": ("llama3", {"head_dim": None}),
    "linear rope, transformers 5": ("llama3", {"rope_parameters": LINEAR, "rope_scaling": ..., "rope_theta": ...}),
    "yarn rope, transformers 5": ("llama3", {"rope_parameters": YARN, "rope_scaling": ..., "rope_theta": ...}),
    "rope in both styles": ("llama_linear", {"rope_theta": 500.0}),
    "padded vocabulary": ("llama2", {"vocab_size": 448}),
    "several end tokens": ("llama2", {"eos_token_id": [2, 50, 60]}),
    "no end token": ("qwen2", {"eos_token_id": None}),
    "a sliding window that is not reached": ("mistral", {"sliding_window": 128}),
    "a sliding window that is off": ("qwen2", {"sliding_window": 16}),
    "a window behind all layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}),
    "a window in no layer": ("qwen3", {"use_sliding_window": True, "layer_types": ["full_attention"] * 2}),
    "a window in some layers that is not reached": ("gemma2", {"sliding_window": 128}),
    "layers with and without a window": (
        "gemma3",
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 128},
    ),
    "no soft caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "a cap of the vocabulary's logits": ("gemma3", {"final_logit_softcapping": 3.0}),
    "two bases, transformers 5": (
        "gemma3",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
            },
            **dict.fromkeys(("rope_scaling", "rope_theta", "rope_local_base_freq"), ...),
        },
    ),
    "layers without rope by their interval": ("smollm3", {"no_rope_layers": ..., "no_rope_layer_interval": 2}),
    "fused projections with a window": ("phi3", {"sliding_window": 128}),
    "whole heads rotated": ("phi3", {"partial_rotary_factor": ..., "rope_scaling": None}),
    "longrope by its old name": (
        "phi3",
        {"rope_scaling": _SU},
    ),
    "all biases": ("granite", {"mlp_bias": True}),
    "one KV head": ("llama3", {"num_key_value_heads": 1}),
}


def change(path: Path, **values: Any) -> None:
    content = {**(json.loads(path.read_text()) if path.is_file() else {}), **values}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def same_answer(checkpoint: Path, tmp_path: Path) -> None:
    """Check that transformers and an engine give the same greedy tokens for two prompts."""
    output = tmp_path / "engine"
    flags = {"checkpoint_dir": checkpoint, "output_dir": output, "max_seq_len": 128, "log_level": "error"}
    build_engine.main(engines.command_line(flags))
    session = ChunkKVSession.from_dir(output, threads=1)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    for length in (61, 110):
        ids = np.random.default_rng(length).integers(3, 300, length)
        ours = session.generate(ids, SamplingParams(max_new_tokens=NEW, ignore_eos=True)).token_ids
        with torch.no_grad():
            theirs = model.generate(
                torch.from_numpy(ids)[None],
                attention_mask=torch.ones(1, length, dtype=torch.int64),
                max_new_tokens=NEW,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert list(ours) == theirs[0, length:].tolist()


@pytest.mark.parametrize("name", ODD)
def test_odd_configs_give_the_same_tokens(tmp_path: Path, name: str) -> None:
    variant, overrides = ODD[name]
    checkpoint = write_checkpoint(tmp_path / "checkpoint", variant)
    config = json.loads((checkpoint / "config.json").read_text())
    sizes = {key: value for key, value in {**config, **overrides}.items() if value is not ...}
    change(checkpoint / "config.json", **overrides)
    write_tensors(checkpoint, random_tensors(sizes))
    if overrides.get("eos_token_id", 0) != 0:
        change(checkpoint / "generation_config.json", eos_token_id=...)
    same_answer(checkpoint, tmp_path)


@pytest.mark.parametrize("head", ["none", "equal", "different"])
def test_a_tied_config_with_a_head_in_the_file(tmp_path: Path, head: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "llama_tied")
    tensors = random_tensors(json.loads((checkpoint / "config.json").read_text()))
    if head == "equal":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    elif head == "different":
        tensors["lm_head.weight"] = np.random.RandomState(7).standard_normal((384, 64)).astype("f4") * 0.3
    write_tensors(checkpoint, tensors)
    same_answer(checkpoint, tmp_path)


@pytest.mark.parametrize("variant", ["llama3", "llama2"])
@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": {"<|turn|>": None}},
        {"tokenizer_config": {"added_tokens_decoder": "special"}},
        {"tokenizer_config": {"added_tokens_decoder": "plain"}},
    ],
    ids=str,
)
def test_added_tokens_get_the_same_ids(tmp_path: Path, variant: str, files: dict) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", variant)
    size = Tokenizer.from_dir(checkpoint).size
    for name, values in files.items():
        if name == "added_tokens":
            change(checkpoint / f"{name}.json", **{"<|turn|>": size})
        else:
            entry = {"content": "<|turn|>", "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
            kind = values["added_tokens_decoder"]
            change(
                checkpoint / f"{name}.json",
                added_tokens_decoder={str(size): {**entry, "special": kind == "special"}},
            )
    ours, theirs = Tokenizer.from_dir(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    for text in ("<|turn|>hi", "the <|turn|> key", "a<|turn|><|turn|>b"):
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids
        assert size in ids or text[0] == "a"  # SentencePiece normalises some added tokens away, in both
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("variant", ["llama_linear", "llama_yarn", "llama3", "mistral", "granite", "gemma"])
def test_the_longest_context_is_that_of_the_config(variant: str) -> None:
    checkpoint = engines.checkpoint_dir(variant)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert longest_context(HuggingFaceCheckpoint.open(checkpoint).config) == model.config.max_position_embeddings
