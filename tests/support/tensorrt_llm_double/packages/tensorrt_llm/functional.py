"""Tensors and the functions that models are written with; each records one node."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorrt as trt
from support.tensorrt_llm_double.signatures import gpt_attention_signature

from tensorrt_llm._common import default_net, default_trtnet
from tensorrt_llm._utils import str_dtype_to_trt
from tensorrt_llm.quantization import QuantMode


class PositionEmbeddingType(enum.IntEnum):
    learned_absolute, rope_gptj, rope_gpt_neox, long_rope, alibi, alibi_with_scale, relative, chatglm = range(8)
    yarn, mrope = 8, 9

    def is_rope(self) -> bool:
        return self.name in ("rope_gptj", "rope_gpt_neox", "long_rope", "mrope", "yarn")


class RotaryScalingType(enum.IntEnum):
    none, linear, dynamic, longrope, llama3, yarn, mrope = range(7)


class AttentionMaskType(enum.IntEnum):
    padding, causal, sliding_window_causal, bidirectional, bidirectionalglm, blocksparse, custom_mask = range(7)


AllReduceStrategy = enum.IntEnum("AllReduceStrategy", "NCCL ONESHOT TWOSHOT AUTO", start=0)


class AllReduceParams:
    def __init__(self, strategy: AllReduceStrategy = AllReduceStrategy.AUTO) -> None:
        self.strategy = strategy


class Tensor:
    """A tensor of the network that is being built."""

    def __init__(self, trt_tensor: trt.ITensor, is_network_input: bool = False) -> None:
        self.trt_tensor, self.is_network_input = trt_tensor, is_network_input

    name = property(lambda self: self.trt_tensor.name)
    dtype = property(lambda self: self.trt_tensor.dtype)
    shape = property(lambda self: self.trt_tensor.shape)

    def ndim(self) -> int:
        return len(self.shape)

    def mark_output(self, name: str, dtype: str) -> None:
        default_trtnet().record("cast", [self.trt_tensor], [(dtype, self.shape)], {}, name)

    def __add__(self, other: Tensor) -> Tensor:
        return record("add", self, other)

    def __mul__(self, other: Tensor) -> Tensor:
        return record("mul", self, other)


def network_input(name: str, shape: list[int], dtype: trt.DataType = trt.int32) -> Tensor:
    net = default_net()
    net._inputs[name] = Tensor(net.trt_network.add_input(name, dtype, shape), is_network_input=True)
    return net._inputs[name]


def _create_tensor(trt_tensor: trt.ITensor, producer: trt.ILayer) -> Tensor:
    assert isinstance(trt_tensor, trt.ITensor) and isinstance(producer, trt.ILayer)
    return Tensor(trt_tensor)


def _add_plugin_info(layer: trt.ILayer, plugin_creator: Any, plugin_name: str, pfc: Any) -> None:
    assert isinstance(pfc, trt.PluginFieldCollection)
    default_net()._plugin_info[id(layer)] = plugin_name


def record(
    op: str, *inputs: Tensor, as_dtype: trt.DataType | None = None, shape: Sequence[int] | None = None, **settings: Any
) -> Tensor:
    """Add a node that is no plugin; what it gives is like its first input where nothing else is said."""
    made = ((as_dtype or inputs[0].dtype).value, tuple(inputs[0].shape if shape is None else shape))
    layer = default_trtnet().record(op, [tensor.trt_tensor for tensor in inputs], [made], settings)
    return _create_tensor(layer.get_output(0), layer)


def constant(ndarray: np.ndarray) -> Tensor:
    array = np.ascontiguousarray(ndarray)
    assert array.dtype != np.float64, "TensorRT has no float64"
    return Tensor(default_trtnet().add_array(array))


def cast(input: Tensor, dtype: trt.DataType) -> Tensor:
    return input if dtype is input.dtype else record("cast", input, as_dtype=dtype)


def embedding(input: Tensor, weight: Tensor) -> Tensor:
    return record("embedding", input, weight, as_dtype=weight.dtype, shape=(*input.shape, weight.shape[1]))


def matmul(input: Tensor, weight: Tensor) -> Tensor:
    """input [T,in] times weight [out,in] transposed."""
    return record("linear", input, weight, shape=(*input.shape[:-1], weight.shape[0]))


def allreduce(tensor: Tensor, group: list[int], all_reduce_params: AllReduceParams | None = None) -> Tensor:
    """Sum in the type of the NCCL plugin, whatever the tensor's own."""
    dtype = str_dtype_to_trt(default_net().plugin_config.nccl_plugin)
    strategy = (all_reduce_params or AllReduceParams()).strategy.name
    out = record("allreduce", cast(tensor, dtype), group=list(group), dtype=dtype.value, strategy=strategy)
    return cast(out, tensor.dtype)


def allgather(tensor: Tensor, group: list[int], gather_dim: int = 0) -> Tensor:
    shape = list(tensor.shape)
    shape[gather_dim] *= len(group)
    return record("allgather", tensor, shape=shape, group=list(group), axis=gather_dim)


_SIGNATURE = gpt_attention_signature(PositionEmbeddingType, RotaryScalingType, AttentionMaskType, QuantMode)


def gpt_attention(**kw: Any) -> tuple[Tensor, Tensor | None]:
    """Record GPTAttention with everything it was given: tensors by keyword, the rest as settings."""
    bound = _SIGNATURE.bind(**kw)
    bound.apply_defaults()
    given, config = bound.arguments, default_net().plugin_config
    kind = given["position_embedding_type"]
    assert kind.is_rope() == (given["rotary_embedding_dim"] != 0), "rotation has a size, other positions have none"
    assert isinstance(given["max_context_length"], int) and config.paged_kv_cache
    for name in ("rotary_cos_sin", "rotary_inv_freq"):
        assert kind.is_rope() == (given[name] is not None), name
    needed = ("host_past_key_value_lengths", "host_request_types", "host_max_attention_window_sizes")
    for name in (*needed, "host_sink_token_length", "host_context_lengths", "host_runtime_perf_knobs"):
        assert given[name].is_network_input, name
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    settings = {
        name: int(value) if isinstance(value, enum.IntEnum | enum.IntFlag) else value
        for name, value in given.items()
        if name not in tensors and value is not None
    }
    settings |= {"tokens_per_block": config.tokens_per_block, "keywords": {n: t.name for n, t in tensors.items()}}
    width = given["num_heads"] * given["hidden_size_per_head"]
    context = record("gpt_attention", *tensors.values(), as_dtype=given["qkv"].dtype, shape=(-1, width), **settings)
    return context, None


gpt_attention.__signature__ = _SIGNATURE
