"""A Llama-like decoder (Llama, Mistral, Qwen2, Qwen3) and a GPT-like one with learned positions."""

from __future__ import annotations

from typing import Any

from tensorrt_llm._utils import str_dtype_to_trt
from tensorrt_llm.functional import Tensor
from tensorrt_llm.layers.attention import Attention, rotary_tables
from tensorrt_llm.layers.basic import MLP, ColumnLinear, Embedding, GatedMLP, LayerNorm, RmsNorm
from tensorrt_llm.mapping import Mapping
from tensorrt_llm.models.modeling_utils import DecoderLayerList, DecoderModelForCausalLM, PretrainedConfig
from tensorrt_llm.module import Module


class LLaMADecoderLayer(Module):
    def __init__(self, config: PretrainedConfig, number: int) -> None:
        dtype = str_dtype_to_trt(config.dtype)
        self.input_layernorm = RmsNorm(config.hidden_size, config.norm_epsilon, dtype)
        self.attention = Attention(config, number, dtype)
        self.post_layernorm = RmsNorm(config.hidden_size, config.norm_epsilon, dtype)
        self.mlp = GatedMLP(config, dtype, config.mapping)

    def forward(self, hidden: Tensor, use_cache: bool, kv_cache_params: Any, attention_params: Any) -> Tensor:
        attended, _ = self.attention(self.input_layernorm(hidden), use_cache, kv_cache_params, attention_params)
        hidden = hidden + attended
        return hidden + self.mlp(self.post_layernorm(hidden))


class GPTDecoderLayer(Module):
    def __init__(self, config: PretrainedConfig, number: int) -> None:
        dtype = str_dtype_to_trt(config.dtype)
        self.input_layernorm = LayerNorm(config.hidden_size, config.norm_epsilon, dtype)
        self.attention = Attention(config, number, dtype)
        self.post_layernorm = LayerNorm(config.hidden_size, config.norm_epsilon, dtype)
        self.mlp = MLP(config, dtype, config.mapping)

    forward = LLaMADecoderLayer.forward


class Transformer(Module):
    """Everything but the head, of one pipeline stage."""

    def __init__(self, config: PretrainedConfig, layer: type[Module], norm: type[Module], learned: bool) -> None:
        dtype = str_dtype_to_trt(config.dtype)
        self._config = config
        if config.mapping.is_first_pp_rank():
            self.vocab_embedding = Embedding(config.vocab_size, config.hidden_size, dtype)
            if learned:
                self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size, dtype)
        self.layers = DecoderLayerList(layer, config)
        if config.mapping.is_last_pp_rank():
            self.ln_f = norm(config.hidden_size, config.norm_epsilon, dtype)

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        use_cache: bool,
        kv_cache_params: Any,
        attention_params: Any,
        hidden_states: Tensor | None,
    ) -> Tensor:
        if hidden_states is None:
            hidden_states = self.vocab_embedding(input_ids)
            if hasattr(self, "position_embedding"):
                hidden_states = hidden_states + self.position_embedding(position_ids)
        hidden_states = self.layers(hidden_states, use_cache, kv_cache_params, attention_params)
        return self.ln_f(hidden_states) if hasattr(self, "ln_f") else hidden_states


class LLaMAForCausalLM(DecoderModelForCausalLM):
    layer: type[Module] = LLaMADecoderLayer
    norm: type[Module] = RmsNorm
    learned = False

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        if config.position_embedding_type.startswith("rope"):
            self.rotary_inv_freq, self.embed_positions_for_gpt_attention = rotary_tables(config)
        self.transformer = Transformer(config, self.layer, self.norm, self.learned)
        mapping: Mapping = config.mapping
        if mapping.is_last_pp_rank():
            dtype = str_dtype_to_trt(config.dtype)
            self.lm_head = ColumnLinear(config.hidden_size, config.vocab_size, False, dtype, mapping, gather=True)


class QWenForCausalLM(LLaMAForCausalLM):
    pass


class GPTForCausalLM(LLaMAForCausalLM):
    layer, norm, learned = GPTDecoderLayer, LayerNorm, True
