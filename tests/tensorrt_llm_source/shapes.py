"""Shapes and types of what layers and plugins give, as far as TensorRT-LLM's Python asks for them.

-1 stands for a size that is known at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from support.tensorrt_llm_double.graph import Value
from support.tensorrt_llm_double.plugins import FIELDS
from support.tensorrt_llm_double.plugins import plugin_outputs as chunkkv_outputs

from chunkkv.gpu.tensorrt_plugins import PLUGIN_NAMESPACE

Output = tuple[tuple[int, ...], Any]  # shape and type
_COMPARISONS = ("EQUAL", "GREATER", "LESS", "AND", "OR", "XOR")
_QUANTISING = ("QuantizePerToken", "RmsnormQuantization", "LayernormQuantization", "QuantizeTensor")


def layer_output(trt: Any, kind: str, inputs: list[Any], values: list[Any], keywords: dict[str, Any]) -> Output:
    """Return shape and type of a layer's output; `values` are the arguments of its add_ function."""
    if kind == "constant":
        return tuple(values[0]), values[1].dtype if hasattr(values[1], "dtype") else trt.float32
    if kind == "fill":
        return tuple(values[0]), keywords.get("output_type", values[-1] if len(values) > 2 else trt.float32)
    rule = _RULES.get(kind)
    return rule(trt, inputs, values) if rule else (inputs[0].shape, inputs[0].dtype)


def _cast(trt: Any, inputs: list[Any], values: list[Any]) -> Output:
    return inputs[0].shape, values[1]


def _shape(trt: Any, inputs: list[Any], values: list[Any]) -> Output:
    return (len(inputs[0].shape),), trt.int64


def _elementwise(trt: Any, inputs: list[Any], values: list[Any]) -> Output:
    rank = max(len(tensor.shape) for tensor in inputs)
    wide = [(1,) * (rank - len(tensor.shape)) + tensor.shape for tensor in inputs]
    sizes = tuple(-1 if -1 in each else max(each) for each in zip(*wide, strict=True))
    return sizes, trt.bool if getattr(values[2], "name", "") in _COMPARISONS else inputs[-1].dtype


def _matrix_multiply(trt: Any, inputs: list[Any], values: list[Any]) -> Output:
    a, op_a, b, op_b = values[:4]
    plain = trt.MatrixOperation.NONE
    batch = a.shape[:-2] if len(a.shape) >= len(b.shape) else b.shape[:-2]
    return (*batch, a.shape[-2 if op_a == plain else -1], b.shape[-1 if op_b == plain else -2]), a.dtype


def _gather(trt: Any, inputs: list[Any], values: list[Any]) -> Output:
    data, index = inputs[:2]
    axis = values[2] if isinstance(values[2], int) else 0
    return (*data.shape[:axis], *index.shape, *data.shape[axis + 1 :]), data.dtype


def _slice(trt: Any, inputs: list[Any], values: list[Any]) -> Output:
    return tuple(int(size) for size in values[2]), inputs[0].dtype


def _reduce(trt: Any, inputs: list[Any], values: list[Any]) -> Output:
    axes, keep = values[2], values[3]
    gone = [axes >> place & 1 for place in range(len(inputs[0].shape))]
    sizes = [1 if out else size for size, out in zip(inputs[0].shape, gone, strict=True) if keep or not out]
    return tuple(sizes), inputs[0].dtype


def _concatenation(trt: Any, inputs: list[Any], values: list[Any]) -> Output:
    return joined([tensor.shape for tensor in inputs], 0), inputs[0].dtype


def _quantize(trt: Any, inputs: list[Any], values: list[Any]) -> Output:
    return inputs[0].shape, values[2] if len(values) > 2 else trt.fp8


def _dequantize(trt: Any, inputs: list[Any], values: list[Any]) -> Output:
    return inputs[0].shape, values[2] if len(values) > 2 else trt.float16


_RULES: dict[str, Callable[[Any, list[Any], list[Any]], Output]] = {
    **{"cast": _cast, "shape": _shape, "elementwise": _elementwise, "select": _elementwise, "gather": _gather},
    **{"matrix_multiply": _matrix_multiply, "slice": _slice, "reduce": _reduce, "concatenation": _concatenation},
    **{"quantize": _quantize, "dequantize": _dequantize},
}


def joined(shapes: list[tuple[int, ...]], axis: int) -> tuple[int, ...]:
    """Return the shape of a concatenation."""
    axis %= len(shapes[0])
    columns = list(zip(*shapes, strict=True))
    return tuple(-1 if -1 in each else sum(each) if place == axis else max(each) for place, each in enumerate(columns))


def plugin_outputs(trt: Any, plugin: Any, inputs: Sequence[Any]) -> list[tuple[Any, tuple[int, ...]]]:
    """Return type and shape of each output of a plugin of TensorRT-LLM or of ChunkKV."""
    kind, fields, first = plugin.plugin_type, plugin.fields, inputs[0]
    outputs = [(first.dtype, first.shape)] * plugin.num_outputs
    if plugin.plugin_namespace == PLUGIN_NAMESPACE:
        outputs = _chunkkv(trt, plugin, inputs)
    elif kind == "GPTAttention":
        width = fields["num_heads"][0] * fields["head_size"][0]
        fp8 = trt.fp8 if fields.get("use_fp8_context_fmha", [0])[0] else first.dtype
        outputs = [(fp8, (*first.shape[:-1], width)), (first.dtype, inputs[10].shape)][: plugin.num_outputs]
    elif "gemm" in kind.lower() or "matmul" in kind.lower():
        dtype = trt.DataType(fields["type_id"][0]) if "type_id" in fields else first.dtype
        outputs = [(dtype, (*first.shape[:-1], _width(kind, fields, inputs[1].shape, first.shape[-1])))]
    elif kind in _QUANTISING:
        dtype = trt.DataType(fields["out_type_id"][0]) if "out_type_id" in fields else trt.int8
        outputs = [(dtype, first.shape), (trt.float32, (*first.shape[:-1], 1))][: plugin.num_outputs]
    elif kind == "Lookup":
        outputs = [(inputs[1].dtype, (*first.shape, inputs[1].shape[-1]))]
    return outputs


def _width(kind: str, fields: dict[str, Any], weight: tuple[int, ...], width: int) -> int:
    """Return the columns of a matrix product; weights of 4 bits are packed in pairs."""
    if kind == "Gemm":
        return weight[-2] if fields["transb"][0] else weight[-1]
    if kind == "WeightOnlyQuantMatmul":
        return weight[-1] * (2 if fields["weight_type_id"][0] == 2 else 1)
    return weight[0] if weight[-1] in (width, width // 2) else weight[-1]


def _chunkkv(trt: Any, plugin: Any, inputs: Sequence[Any]) -> list[tuple[Any, tuple[int, ...]]]:
    name, fields = plugin.plugin_type, plugin.plain_fields
    assert set(fields) <= set(FIELDS[name]), set(fields) - set(FIELDS[name])
    values = [Value(tensor.name, tensor.dtype.name, tensor.shape) for tensor in inputs]
    types = {"int32": trt.int32, "float32": trt.float32}
    made = chunkkv_outputs(name, fields, values)
    return [(types.get(dtype, inputs[0].dtype), shape) for dtype, shape in made]
