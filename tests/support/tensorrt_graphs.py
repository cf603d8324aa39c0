"""What TensorRT makes of an ONNX graph, as far as it is known: which nodes it refuses, how plugins behave."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import TensorProto, helper

from chunkkv_builder.onnx_graph import functions

# Of what onnx-tensorrt's docs/operators.md lists, the operators used here; the last four came with 10.14 and 10.15.
_OLD = (
    "Add Cast Concat Constant Cos Expand Gather Gemm Identity LessOrEqual Max Mul Pad Range Reshape Shape Sigmoid Sin "
    "Squeeze Sub Transpose Unsqueeze"
)
OPERATORS = {*_OLD.split(), "Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"}


def refusal(node: onnx.NodeProto, inputs: dict[str, onnx.ValueInfoProto], outputs: set[str]) -> str | None:
    """Return why TensorRT's parser refuses `node`, None where it takes it."""
    attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    if node.domain == functions.DOMAIN:
        return None
    if node.op_type not in OPERATORS:
        return "No importer registered for op"
    if node.op_type == "Attention":
        return _attention_refusal(node, attributes)
    if node.op_type == "TensorScatter":
        return _scatter_refusal(node, attributes, inputs, outputs)
    return None


def _attention_refusal(node: onnx.NodeProto, attributes: dict[str, Any]) -> str | None:
    if len(node.input) > 4 or len(node.output) != 1:
        return "past_key and past_value are not supported"
    if {"softcap", "softmax_precision"} & set(attributes):
        return "attribute is not supported"
    if attributes.get("is_causal") and len(node.input) > 3:
        return "mask and is_causal exclude each other"
    return None


def _scatter_refusal(
    node: onnx.NodeProto, attributes: dict[str, Any], inputs: dict[str, onnx.ValueInfoProto], outputs: set[str]
) -> str | None:
    cache = inputs.get(node.input[0])
    if attributes.get("axis", -2) not in (2, -2) or attributes.get("mode", b"linear") != b"linear":
        return "only axis -2 and mode linear are supported"
    if cache is None or node.output[0] not in outputs:
        return "the cache must be a network input and the result a network output"
    if cache.type.tensor_type.shape.dim[2].dim_param:
        return "the cache must have a static sequence length"
    return None


def as_plugins(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph as an engine with plugins behaves: kept_indices have S columns, -1 behind N.

    A plugin's shapes are made from shapes, so it cannot know N; the node behind it crops.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        extra = [entry for entry in node.attribute if entry.name == "TRT_decomposable"]
        for entry in extra:
            node.attribute.remove(entry)
    for body in copy.functions:
        if body.name != functions.SELECT:
            continue
        for node in body.node:
            node.output[:] = ["short_indices" if name == "kept_indices" else name for name in node.output]
        make = helper.make_node
        body.node.extend(
            [
                make("Shape", ["key"], ["pad_s"], start=2, end=3),
                make("Shape", ["short_indices"], ["pad_n"], start=1, end=2),
                make("Sub", ["pad_s", "pad_n"], ["pad_spare"]),
                make("Constant", [], ["pad_zeros"], value_ints=[0, 0, 0]),
                make("Concat", ["pad_zeros", "pad_spare"], ["pad_pads"], axis=0),
                make("Constant", [], ["pad_minus"], value=helper.make_tensor("m", TensorProto.INT32, [], [-1])),
                make("Pad", ["short_indices", "pad_pads", "pad_minus"], ["kept_indices"]),
            ]
        )
    return copy
