"""Decoders of one rank: a checkpoint's configuration, the inputs of their networks, and their layers."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tensorrt as trt
from safetensors.numpy import load_file
from support.tensorrt_llm_double.graph import numpy_dtype

from chunkkv.engine.fields import Fields
from chunkkv_builder.checkpoint import rope
from tensorrt_llm import functional as f
from tensorrt_llm._utils import str_dtype_to_trt
from tensorrt_llm.functional import Tensor, network_input
from tensorrt_llm.layers.attention import Attention
from tensorrt_llm.quantization import QuantMode

POSITIONS = "transformer.position_embedding.weight"


@dataclass
class Mapping:
    """Which rank is which part of a model."""

    world_size: int = 1
    tp_size: int = 1
    pp_size: int = 1
    cp_size: int = 1
    gpus_per_node: int = 8
    rank: int = 0

    tp_rank = property(lambda self: self.rank % self.tp_size)
    pp_rank = property(lambda self: self.rank // self.tp_size)
    tp_group = property(lambda self: [self.pp_rank * self.tp_size + rank for rank in range(self.tp_size)])

    def pp_layers(self, num_layers: int) -> list[int]:
        each = num_layers // self.pp_size
        return list(range(self.pp_rank * each, (self.pp_rank + 1) * each))


class PretrainedConfig:
    """config.json of a TensorRT-LLM checkpoint; its keys become attributes."""

    def __init__(self, mapping: dict[str, int], **values: Any) -> None:
        vars(self).update(values)
        self.mapping = Mapping(**mapping)
        algorithm = self.quantization["kv_cache_quant_algo"]
        self._mode = QuantMode[f"{algorithm}_KV_CACHE"] if algorithm else QuantMode(0)

    quant_mode = property(lambda self: self._mode)

    def to_dict(self) -> dict[str, Any]:
        return {**{name: value for name, value in vars(self).items() if name != "_mode"}, "mapping": vars(self.mapping)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PretrainedConfig:
        return cls(**copy.deepcopy(values))

    @classmethod
    def from_json_file(cls, path: str) -> PretrainedConfig:
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


class PretrainedModel:
    """A decoder like Llama; with learned positions where the checkpoint has them."""

    def __init__(self, config: PretrainedConfig, weights: dict[str, np.ndarray]) -> None:
        self.config = config
        self._weights = {name: SimpleNamespace(raw_value=array) for name, array in weights.items()}
        if POSITIONS not in weights:
            self.rotary_inv_freq, self.embed_positions_for_gpt_attention = rotary_tables(config)

    @classmethod
    def from_checkpoint(cls, ckpt_dir: str, config: PretrainedConfig) -> PretrainedModel:
        return cls(config, load_file(Path(ckpt_dir) / f"rank{config.mapping.rank}.safetensors"))

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        yield from self._weights.items()
        yield from ((name, value) for name, value in vars(self).items() if hasattr(value, "raw_value"))

    def weight(self, name: str, dtype: trt.DataType | None = None) -> Tensor:
        """Return a weight in the network that is being built."""
        chosen = (dtype or str_dtype_to_trt(self.config.dtype)).value
        return f.constant(self._weights[name].raw_value.astype(numpy_dtype(chosen)))

    def row_linear(self, x: Tensor, name: str) -> Tensor:
        """Columns of the weight are split over the ranks, whose sums are added up."""
        out, mapping = f.matmul(x, self.weight(name)), self.config.mapping
        return f.allreduce(out, mapping.tp_group) if mapping.tp_size > 1 else out

    def prepare_inputs(self, max_input_len: int, use_cache: bool) -> dict[str, Any]:
        """Return the network's inputs by forward's parameters."""
        mapping = self.config.mapping
        inputs: dict[str, Any] = {"use_cache": use_cache}
        if mapping.pp_rank == 0:
            inputs |= {name: network_input(name, [-1]) for name in ("input_ids", "position_ids")}
        else:
            dtype = str_dtype_to_trt(self.config.dtype)
            inputs["hidden_states"] = network_input("hidden_states_input", [-1, self.config.hidden_size], dtype)
        if mapping.pp_rank == mapping.pp_size - 1:
            inputs["last_token_ids"] = network_input("last_token_ids", [-1])
        layers = len(mapping.pp_layers(self.config.num_hidden_layers))
        shapes: dict[str, list[int]] = {name: [-1] for name in ("sequence_length", "context_lengths")}
        shapes |= {name: [-1] for name in ("host_context_lengths", "host_request_types", "host_past_key_value_lengths")}
        shapes |= {f"{host}kv_cache_block_offsets": [-1, -1, 2, -1] for host in ("", "host_")}
        shapes |= {"host_max_attention_window_sizes": [layers], "host_sink_token_length": [1]}
        shapes |= {"host_kv_cache_pool_mapping": [layers, 2], "cache_indirection": [-1, -1, -1]}
        longs = {"host_kv_cache_pool_pointers": [-1, 2], "host_runtime_perf_knobs": [16], "host_context_progress": [1]}
        params = {name: network_input(name, shape) for name, shape in shapes.items()}
        params |= {name: network_input(name, shape, trt.int64) for name, shape in longs.items()}
        return {**inputs, "attention_params": SimpleNamespace(max_context_length=max_input_len, **params)}

    def forward(
        self,
        use_cache: bool,
        attention_params: Any,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        hidden_states: Tensor | None = None,
        last_token_ids: Tensor | None = None,
    ) -> None:
        """Add embedding or the previous stage's output, layers, and logits or the output for the next stage."""
        mapping, hidden = self.config.mapping, hidden_states
        if POSITIONS not in self._weights:
            attention_params.rotary_inv_freq = f.constant(self.rotary_inv_freq.raw_value)
            attention_params.rotary_cos_sin = f.constant(self.embed_positions_for_gpt_attention.raw_value)
        if hidden is None:
            hidden = f.embedding(input_ids, self.weight("transformer.vocab_embedding.weight"))
            if POSITIONS in self._weights:
                hidden = hidden + f.embedding(position_ids, self.weight(POSITIONS))
        for layer in range(len(mapping.pp_layers(self.config.num_hidden_layers))):
            own = f"transformer.layers.{layer}."
            normed = self._normed(hidden, own + "input_layernorm.weight")
            hidden = hidden + Attention(self, layer).forward(normed, use_cache, attention_params)[0]
            normed = self._normed(hidden, own + "post_layernorm.weight")
            gate, inner = (f.matmul(normed, self.weight(f"{own}mlp.{name}.weight")) for name in ("fc", "gate"))
            hidden = hidden + self.row_linear(f.record("silu", gate) * inner, own + "mlp.proj.weight")
        if last_token_ids is None:
            return hidden.mark_output("hidden_states_output", self.config.dtype)
        last = f.record("gather_last", hidden, last_token_ids)
        logits = f.matmul(self._normed(last, "transformer.ln_f.weight"), self.weight("lm_head.weight"))
        if mapping.tp_size > 1:
            logits = f.allgather(logits, mapping.tp_group, gather_dim=1)
        return logits.mark_output("logits", "float32")

    def _normed(self, x: Tensor, name: str) -> Tensor:
        return f.record("rms_norm", x, self.weight(name), eps=self.config.norm_epsilon)


def rotary_tables(config: PretrainedConfig) -> tuple[Any, Any]:
    """Return inverse frequencies [dim/2], and cos and sin interleaved [1, positions*dim], scaling baked in."""
    count, scaling = config.max_position_embeddings, None
    if config.rotary_scaling:
        scaling = rope.read_scaling(Fields(config.rotary_scaling, "rotary_scaling"), Fields({}, "config"), count)
    inverse, factor = rope.frequencies(config.head_size, config.rotary_base, scaling)
    angles = np.arange(count, dtype=np.float64)[:, None] * inverse
    table = factor * np.stack([np.cos(angles), np.sin(angles)], axis=2)
    arrays = inverse.astype(np.float32), table.astype(np.float32).reshape(1, -1)
    return SimpleNamespace(raw_value=arrays[0]), SimpleNamespace(raw_value=arrays[1])


MODEL_MAP = {"LlamaForCausalLM": PretrainedModel, "GPTForCausalLM": PretrainedModel}
