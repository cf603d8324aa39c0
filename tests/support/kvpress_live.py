"""Runs the real kvpress in float32 and records what it was given, how it scored and which tokens it kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from kvpress import ChunkKVPress, SnapKVPress
from kvpress.utils import get_prerope_query_states
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import rotate_half
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

from support.kvpress_restatement import PressSettings, Recording

MODEL_CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config}


class RecordingPress(ChunkKVPress):
    """ChunkKVPress that also notes its inputs and its choice, one recording per layer."""

    recordings: list[Recording]

    def compress(self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any) -> Any:
        window = self.press.window_size
        cos, sin = (table[:, None, -window:] for table in kwargs["position_embeddings"])
        query = get_prerope_query_states(module, hidden_states[:, -window:])
        query = query * cos + rotate_half(query) * sin
        scores = None
        if self.press.compression_ratio > 0:
            scores = self.press.score(module, hidden_states, keys, values, attentions, kwargs).numpy()
        token_numbers = torch.arange(keys.shape[2], dtype=torch.float32)[:, None].expand_as(keys)
        _, kept = super().compress(module, hidden_states, keys, token_numbers, attentions, kwargs)
        kept = np.sort(kept[..., 0].numpy().astype(np.int64), axis=-1)
        self.recordings.append(Recording(query.numpy(), keys.numpy(), scores, kept))
        return super().compress(module, hidden_states, keys, values, attentions, kwargs)


def make_press(press: PressSettings) -> RecordingPress:
    """Return a recording press with the given settings."""
    snapkv = SnapKVPress(press.compression_ratio, press.window_size, press.kernel_size)
    made = RecordingPress(press=snapkv, chunk_length=press.chunk_length)
    made.recordings = []
    return made


@torch.no_grad()
def run_press(query: NDArray[Any], key: NDArray[Any], press: PressSettings) -> Recording:
    """Run kvpress on query [B,Hq,w,D] and key [B,Hkv,T,D] as they are: projection and rotation are the identity."""
    batch, heads, window, head_dim = query.shape
    kv_heads, length = key.shape[1:3]
    module = torch.nn.Module()
    module.q_proj = torch.nn.Identity()
    module.head_dim = head_dim
    module.config = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=kv_heads)
    hidden = torch.zeros(batch, length, heads * head_dim)
    flat = np.swapaxes(query, 1, 2).astype(np.float32).reshape(batch, window, heads * head_dim)
    hidden[:, length - window :] = torch.from_numpy(flat)
    keys = torch.from_numpy(key.astype(np.float32))
    unrotated = (torch.ones(1, length, head_dim), torch.zeros(1, length, head_dim))
    made = make_press(press)
    made.compress(module, hidden, keys, keys, None, {"position_embeddings": unrotated})
    recorded = made.recordings[0]
    assert np.array_equal(recorded.query, query.astype(np.float32))
    return recorded._replace(query=query, key=key)


@torch.no_grad()
def run_model(family: str, length: int, press: PressSettings, seed: int = 0) -> list[Recording]:
    """Prefill a tiny random model under kvpress; return one recording per layer."""
    torch.manual_seed(seed)
    config = MODEL_CONFIGS[family](
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
        initializer_range=0.3,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    made = make_press(press)
    cache = DynamicCache()
    with made(model):
        model(torch.randint(0, 97, (1, length)), past_key_values=cache)
    for layer, recorded in zip(cache.layers, made.recordings, strict=True):
        assert layer.keys.shape[2] == recorded.kept.shape[2]
    return made.recordings
