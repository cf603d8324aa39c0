"""Write a trained model as a Hugging Face directory: bfloat16 safetensors, tokenizer, chat template."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM
from vocabulary import BOS, BOS_ID, EOS, EOS_ID, PAD, PAD_ID, UNK, build_tokenizer

CHAT_TEMPLATE: Final = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' %}{{- ' ' + message.content + eos_token }}"
    "{%- else %}{{- ' ' + message.content + ' answer:' }}{%- endif %}"
    "{%- endfor %}"
)

CONFIG_KEYS: Final = {
    *("hidden_act", "hidden_size", "intermediate_size", "initializer_range", "vocab_size", "model_type"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias"),
    *("max_position_embeddings", "rope_parameters", "rms_norm_eps", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}


def tokenizer_settings(longest: int) -> dict[str, object]:
    """What tokenizer_config.json says."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNK,
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def write_model(model: LlamaForCausalLM, out: Path) -> None:
    """Write the directory under a temporary name and put it in the place of an older one."""
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = {name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
    config = {key: value for key, value in model.config.to_dict().items() if key in CONFIG_KEYS}
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "use_cache": True}
    generation = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID, "do_sample": False}
    longest = model.config.max_position_embeddings
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer_settings(longest)),
    ):
        (temporary / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    build_tokenizer().save(str(temporary / "tokenizer.json"))
    (temporary / "model.safetensors").chmod(0o644)  # save_file lets only the owner read
    older = out.with_name(f".{out.name}.old")
    shutil.rmtree(older, ignore_errors=True)
    if out.exists():
        os.replace(out, older)
    os.replace(temporary, out)
    shutil.rmtree(older, ignore_errors=True)
