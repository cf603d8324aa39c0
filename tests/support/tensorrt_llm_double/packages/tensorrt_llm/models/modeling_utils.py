"""Configuration, inputs and outputs that all decoder models share."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import tensorrt as trt

from tensorrt_llm import functional as f
from tensorrt_llm._common import default_net
from tensorrt_llm._utils import str_dtype_to_trt
from tensorrt_llm.functional import Tensor
from tensorrt_llm.layers.attention import AttentionParams, KeyValueCacheParams
from tensorrt_llm.mapping import Mapping
from tensorrt_llm.module import Module
from tensorrt_llm.quantization import QuantMode

_DEFAULTS: dict[str, Any] = {
    "logits_dtype": "float32",
    "hidden_act": "silu",
    "norm_epsilon": 1e-5,
    "position_embedding_type": "rope_gpt_neox",
    "rotary_base": 10000.0,
    "rotary_scaling": None,
    "attn_bias": False,
    "dense_bias": False,
    "mlp_bias": False,
    "qk_layernorm": False,
    "num_key_value_heads": None,
    "head_size": None,
    "quantization": {},
}


class PretrainedConfig:
    """config.json of a TensorRT-LLM checkpoint; unknown keys become attributes."""

    def __init__(self, *, architecture: str, dtype: str, mapping: Mapping | dict | None = None, **values: Any) -> None:
        self.architecture, self.dtype = architecture, dtype
        self.mapping = mapping if isinstance(mapping, Mapping) else Mapping.from_dict(mapping or {})
        for name, value in {**_DEFAULTS, **values}.items():
            setattr(self, name, value)
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_size = self.head_size or self.hidden_size // self.num_attention_heads

    @property
    def quant_mode(self) -> QuantMode:
        algorithms = self.quantization
        return QuantMode.from_quant_algo(algorithms.get("quant_algo"), algorithms.get("kv_cache_quant_algo"))

    @property
    def kv_dtype(self) -> str:
        mode = self.quant_mode
        return "int8" if mode.has_int8_kv_cache() else "fp8" if mode.has_fp8_kv_cache() else self.dtype

    def set_rank(self, rank: int) -> None:
        self.mapping = Mapping.from_dict({**self.mapping.to_dict(), "rank": rank})

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "mapping": self.mapping.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PretrainedConfig:
        return cls(**copy.deepcopy(values))

    @classmethod
    def from_json_file(cls, path: str) -> PretrainedConfig:
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    @classmethod
    def from_checkpoint(cls, ckpt_dir: str) -> PretrainedConfig:
        return cls.from_json_file(str(Path(ckpt_dir) / "config.json"))


class DecoderLayerList(Module):
    """The layers of this rank's pipeline stage, with local numbers."""

    def __init__(self, make: Any, config: PretrainedConfig) -> None:
        self.layer_list = config.mapping.pp_layers(config.num_hidden_layers)
        self._layers = [make(config, number) for number in range(len(self.layer_list))]

    def children(self) -> Any:
        yield from ((str(number), layer) for number, layer in enumerate(self._layers))

    def forward(self, hidden_states: Tensor, use_cache: bool, kv_cache_params: Any, attention_params: Any) -> Tensor:
        for layer, past in zip(self._layers, kv_cache_params.past_key_value, strict=True):
            own = copy.copy(kv_cache_params)
            own.past_key_value = [past]
            hidden_states = layer(hidden_states, use_cache, own, attention_params)
        return hidden_states


class PretrainedModel(Module):
    """A model of one rank."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config, self._name = config, type(self).__name__

    @classmethod
    def from_checkpoint(cls, ckpt_dir: str, rank: int | None = None, config: Any = None) -> PretrainedModel:
        from safetensors.numpy import load_file

        config = config or PretrainedConfig.from_checkpoint(ckpt_dir)
        if rank is not None:
            config.set_rank(rank)
        model = cls(config)
        weights = load_file(Path(ckpt_dir) / f"rank{config.mapping.rank}.safetensors")
        wanted = {name: each for name, each in model.named_parameters() if not each.is_buffer}
        assert wanted.keys() == weights.keys(), wanted.keys() ^ weights.keys()
        for name, parameter in wanted.items():
            parameter.load(weights[name])
        return model

    def prepare_inputs(
        self,
        max_batch_size: int,
        max_input_len: int,
        max_seq_len: int,
        max_num_tokens: int,
        use_cache: bool,
        max_beam_width: int = 1,
        opt_num_tokens: int | None = None,
        prompt_embedding_table_size: int = 0,
        gather_context_logits: bool = False,
        lora_target_modules: Any = None,
        opt_batch_size: int = 0,
        **more: Any,
    ) -> dict[str, Any]:
        mapping = self.config.mapping
        inputs: dict[str, Any] = {"use_cache": use_cache}
        if mapping.is_first_pp_rank():
            inputs |= {"input_ids": take("input_ids", [-1]), "position_ids": take("position_ids", [-1])}
        else:
            dtype = str_dtype_to_trt(self.config.dtype)
            inputs["hidden_states"] = take("hidden_states_input", [-1, self.config.hidden_size], dtype)
        if mapping.is_last_pp_rank() and not gather_context_logits:
            inputs["last_token_ids"] = take("last_token_ids", [-1])
        inputs["kv_cache_params"] = self._cache_inputs(use_cache)
        inputs["attention_params"] = AttentionParams(
            sequence_length=take("sequence_length", [-1]),
            context_lengths=take("context_lengths", [-1]),
            host_context_lengths=take("host_context_lengths", [-1]),
            max_context_length=max_input_len,
            host_request_types=take("host_request_types", [-1]),
            host_runtime_perf_knobs=take("host_runtime_perf_knobs", [16], trt.int64),
            host_context_progress=take("host_context_progress", [1], trt.int64),
        )
        return inputs

    def _cache_inputs(self, use_cache: bool) -> KeyValueCacheParams:
        layers = len(self.config.mapping.pp_layers(self.config.num_hidden_layers))
        past: list[Tensor | None] = [None] * layers
        paged: dict[str, Tensor] = {}
        if default_net().plugin_config.paged_kv_cache:
            for name in ("kv_cache_block_offsets", "host_kv_cache_block_offsets"):
                paged[name] = take(name, [-1, -1, 2, -1])
            paged["host_kv_cache_pool_pointers"] = take("host_kv_cache_pool_pointers", [-1, 2], trt.int64)
            paged["host_kv_cache_pool_mapping"] = take("host_kv_cache_pool_mapping", [layers, 2])
        elif use_cache:
            heads = -(-self.config.num_key_value_heads // self.config.mapping.tp_size)
            shape, dtype = [-1, 2, heads, -1, self.config.head_size], str_dtype_to_trt(self.config.kv_dtype)
            past = [take(f"past_key_value_{number}", shape, dtype) for number in range(layers)]
        return KeyValueCacheParams(
            past_key_value=past,
            host_past_key_value_lengths=take("host_past_key_value_lengths", [-1]),
            host_max_attention_window_sizes=take("host_max_attention_window_sizes", [layers]),
            host_sink_token_length=take("host_sink_token_length", [1]),
            cache_indirection=take("cache_indirection", [-1, -1, -1]),
            **paged,
        )


def take(name: str, shape: list[int], dtype: trt.DataType = trt.int32) -> Tensor:
    """Return a new network input."""
    return Tensor(name=name, dtype=dtype, shape=shape, dim_range=OrderedDict())


class DecoderModelForCausalLM(PretrainedModel):
    """Embedding or the previous stage's output, layers, and logits or the output for the next stage."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool = False,
        last_token_ids: Tensor | None = None,
        kv_cache_params: Any = None,
        attention_params: Any = None,
        hidden_states: Tensor | None = None,
    ) -> Tensor:
        mapping = self.config.mapping
        if self.config.position_embedding_type.startswith("rope"):
            attention_params.rotary_inv_freq = self.rotary_inv_freq.value
            attention_params.embed_positions_for_gpt_attention = self.embed_positions_for_gpt_attention.value
        hidden = self.transformer(input_ids, position_ids, use_cache, kv_cache_params, attention_params, hidden_states)
        if not mapping.is_last_pp_rank():
            hidden.mark_output("hidden_states_output", self.config.dtype)
            return hidden
        if last_token_ids is not None:
            hidden = f.gather_last_token_logits(
                hidden, last_token_ids, default_net().plugin_config.remove_input_padding
            )
        logits = self.lm_head(hidden)
        logits.mark_output("logits", self.config.logits_dtype)
        return logits
