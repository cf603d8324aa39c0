"""Tensors and the functions that models are written with; each records one node."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorrt as trt
from support.tensorrt_llm_double.signatures import gpt_attention_signature

from tensorrt_llm._common import default_net, default_trtnet


class PositionEmbeddingType(enum.IntEnum):
    learned_absolute, rope_gptj, rope_gpt_neox, long_rope, alibi, alibi_with_scale, relative, chatglm = range(8)
    yarn, mrope = 8, 9

    def is_rope(self) -> bool:
        return self.name in ("rope_gptj", "rope_gpt_neox", "long_rope", "mrope", "yarn")

    def is_mrope(self) -> bool:
        return self.name == "mrope"


class RotaryScalingType(enum.IntEnum):
    none, linear, dynamic, longrope, llama3, yarn, mrope = range(7)

    @staticmethod
    def from_string(name: str) -> RotaryScalingType:
        return RotaryScalingType["none" if name == "default" else name]


class AttentionMaskType(enum.IntEnum):
    padding, causal, sliding_window_causal, bidirectional, bidirectionalglm, blocksparse, custom_mask = range(7)


class AllReduceStrategy(enum.IntEnum):
    NCCL, ONESHOT, TWOSHOT, AUTO = range(4)


class AllReduceParams:
    def __init__(self, strategy: AllReduceStrategy = AllReduceStrategy.AUTO) -> None:
        self.strategy = strategy


class Tensor:
    """A tensor of a network; one with a name and no producer is a network input."""

    def __init__(
        self,
        name: str | None = None,
        dtype: trt.DataType | None = None,
        shape: Sequence[int] | None = None,
        dim_range: Any = None,
        is_network_input: bool = True,
        location: trt.TensorLocation = trt.TensorLocation.DEVICE,
        network: Any = None,
        trt_tensor: trt.ITensor | None = None,
    ) -> None:
        self.producer: trt.ILayer | None = None
        self.is_network_input, self.location = is_network_input, location
        self.network = network or default_net()
        self.trt_tensor = trt_tensor
        if is_network_input:
            self.network._add_input(self, name, dtype, shape, dim_range)

    @property
    def name(self) -> str:
        return self.trt_tensor.name

    @property
    def dtype(self) -> trt.DataType:
        return self.trt_tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.trt_tensor.shape

    def ndim(self) -> int:
        return len(self.shape)

    rank = ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def mark_output(self, name: str, dtype: Any = None) -> None:
        from tensorrt_llm._utils import str_dtype_to_trt

        chosen = str_dtype_to_trt(dtype) if isinstance(dtype, str) else dtype or self.dtype
        out = self if chosen is self.dtype else cast(self, chosen)
        self.network._mark_output(out, name, chosen)

    def __add__(self, other: Tensor) -> Tensor:
        return _like("add", [self, other])

    def __mul__(self, other: Tensor) -> Tensor:
        return _like("mul", [self, other])

    def __truediv__(self, other: Tensor) -> Tensor:
        return _like("div", [self, other])


def _create_tensor(trt_tensor: trt.ITensor, producer: trt.ILayer) -> Tensor:
    net = default_net()
    assert isinstance(trt_tensor, trt.ITensor) and trt_tensor.network is net.trt_network
    tensor = Tensor(is_network_input=False, trt_tensor=trt_tensor)
    tensor.producer = producer
    net._set_layer_name(producer)
    return tensor


def _add_plugin_info(layer: trt.ILayer, plugin_creator: Any, plugin_name: str, pfc: Any) -> None:
    assert isinstance(pfc, trt.PluginFieldCollection)
    default_net()._plugin_info[id(layer)] = (plugin_creator, plugin_name)


def record(
    op: str, inputs: Sequence[Tensor], outputs: Sequence[tuple[trt.DataType, Sequence[int]]], **settings: Any
) -> list[Tensor]:
    """Add a node that is no plugin."""
    shapes = [(dtype.value, tuple(shape)) for dtype, shape in outputs]
    layer = default_trtnet().record(op, [tensor.trt_tensor for tensor in inputs], shapes, settings)
    return [_create_tensor(layer.get_output(place), layer) for place in range(layer.num_outputs)]


def _like(op: str, inputs: Sequence[Tensor], **settings: Any) -> Tensor:
    return record(op, inputs, [(inputs[0].dtype, inputs[0].shape)], **settings)[0]


def constant(ndarray: np.ndarray, as_dtype: trt.DataType | None = None) -> Tensor:
    array = np.ascontiguousarray(ndarray)
    assert array.dtype != np.float64, "TensorRT has no float64"
    assert as_dtype is None or as_dtype.value == array.dtype.name
    tensor = Tensor(is_network_input=False, trt_tensor=default_trtnet().add_array(array))
    return tensor


def cast(input: Tensor, dtype: Any) -> Tensor:
    from tensorrt_llm._utils import str_dtype_to_trt

    chosen = str_dtype_to_trt(dtype) if isinstance(dtype, str) else dtype
    return record("cast", [input], [(chosen, input.shape)])[0]


def embedding(input: Tensor, weight: Tensor) -> Tensor:
    return record("embedding", [input, weight], [(weight.dtype, (*input.shape, weight.shape[1]))])[0]


def matmul(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input [T,in] times weight [out,in] transposed, plus bias [out]."""
    tensors = [input, weight, *([bias] if bias else [])]
    return record("linear", tensors, [(weight.dtype, (*input.shape[:-1], weight.shape[0]))])[0]


def rms_norm(input: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    return _like("rms_norm", [input, weight], eps=eps, groups=groups)


def layer_norm(input: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _like("layer_norm", [input, weight, bias], eps=eps)


def activation(input: Tensor, kind: str) -> Tensor:
    return _like(kind, [input])


def gather_last_token_logits(hidden_states: Tensor, last_token_ids: Tensor, remove_input_padding: bool) -> Tensor:
    assert remove_input_padding
    shape = (-1, hidden_states.shape[1])
    return record("gather_last", [hidden_states, last_token_ids], [(hidden_states.dtype, shape)])[0]


def split_qk_norm(qkv: Tensor, query: Tensor, key: Tensor, eps: float, sizes: Sequence[int]) -> Tensor:
    """Norm each query and key head of packed qkv; sizes: query heads, KV heads, head size."""
    return _like("qk_norm", [qkv, query, key], eps=eps, sizes=list(sizes))


def allreduce(tensor: Tensor, group: list[int], all_reduce_params: AllReduceParams | None = None) -> Tensor:
    """Sum in the type of the NCCL plugin, whatever the tensor's own."""
    from tensorrt_llm._utils import str_dtype_to_trt

    dtype = str_dtype_to_trt(default_net().plugin_config.nccl_plugin)
    given = tensor if dtype is tensor.dtype else cast(tensor, dtype)
    name = (all_reduce_params or AllReduceParams()).strategy.name
    out = _like("allreduce", [given], group=list(group), dtype=dtype.value, strategy=name)
    return out if dtype is tensor.dtype else cast(out, tensor.dtype)


def allgather(tensor: Tensor, group: list[int], gather_dim: int = 0) -> Tensor:
    shape = list(tensor.shape)
    shape[gather_dim] *= len(group) if shape[gather_dim] > 0 else 1
    return record("allgather", [tensor], [(tensor.dtype, shape)], group=list(group), axis=gather_dim)[0]


class RopeEmbeddingUtils:
    @staticmethod
    def create_sinusoidal_positions_for_attention_plugin(
        num_pos: int,
        dim: int,
        theta: float = 10000.0,
        scale: float = 1.0,
        scale_type: RotaryScalingType = RotaryScalingType.none,
        rope_scaling_config: dict | None = None,
        dtype: type = np.float32,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return inverse frequencies [dim/2] and cos, sin interleaved [1, num_pos*dim], scaling baked in."""
        from chunkkv.engine.fields import Fields
        from chunkkv_builder.checkpoint import rope

        scaling = None
        if rope_scaling_config:
            scaling = rope.read_scaling(Fields(rope_scaling_config, "rotary_scaling"), Fields({}, "config"), num_pos)
        inverse, factor = rope.frequencies(dim, theta, scaling)
        angles = np.arange(num_pos, dtype=np.float64)[:, None] * inverse
        table = factor * np.stack([np.cos(angles), np.sin(angles)], axis=2)
        return inverse.astype(dtype), table.astype(dtype).reshape(1, -1)


def _gpt_attention(**kw: Any) -> tuple[Tensor, Tensor | None]:
    """Record GPTAttention with everything it was given: tensors by keyword, the rest as settings."""
    bound = gpt_attention_signature(PositionEmbeddingType, RotaryScalingType, AttentionMaskType).bind(**kw)
    bound.apply_defaults()
    given, config = bound.arguments, default_net().plugin_config
    kind = given["position_embedding_type"]
    assert kind.is_rope() == (given["rotary_embedding_dim"] != 0), (
        "RoPE needs a rotary dimension, others must have none"
    )
    mrope = given["mrope_rotary_cos_sin"]
    assert (mrope is not None) == kind.is_mrope()
    assert isinstance(given["max_context_length"], int)
    assert kind.is_rope() or (given["rotary_cos_sin"] is None and given["rotary_inv_freq"] is None)
    assert not kind.is_rope() or given["rotary_cos_sin"].shape == (1, given["rotary_cos_sin"].shape[1])
    needed = ("host_past_key_value_lengths", "host_request_types", "host_max_attention_window_sizes")
    for name in (*needed, "host_sink_token_length", "host_context_lengths", "host_runtime_perf_knobs"):
        assert given[name] is not None and given[name].is_network_input, name
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    settings = {name: value for name, value in given.items() if name not in tensors and value is not None}
    settings = {
        name: int(value) if isinstance(value, enum.IntEnum | enum.IntFlag) else value
        for name, value in settings.items()
    }
    paged = config.paged_kv_cache
    fp8 = config.use_fp8_context_fmha and given["attention_output_orig_quant_scale"] is not None
    dtype = trt.fp8 if fp8 else given["qkv"].dtype
    outputs = [(dtype, (-1, given["num_heads"] * given["hidden_size_per_head"]))]
    if not paged:
        outputs.append((given["past_key_value"].dtype, given["past_key_value"].shape))
    settings |= {"tokens_per_block": config.tokens_per_block, "keywords": {n: t.name for n, t in tensors.items()}}
    found = record("gpt_attention", list(tensors.values()), outputs, **settings)
    return found[0], None if paged else found[1]


def gpt_attention(**kw: Any) -> tuple[Tensor, Tensor | None]:
    return _gpt_attention(**kw)


gpt_attention.__signature__ = gpt_attention_signature(PositionEmbeddingType, RotaryScalingType, AttentionMaskType)
