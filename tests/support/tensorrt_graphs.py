"""How the plugins in a TensorRT engine behave, as a graph that ONNX Runtime runs."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from chunkkv_builder.onnx_graph import functions


def as_plugins(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph as an engine with plugins behaves: kept_indices have S columns, -1 behind N.

    A plugin's shapes are made from shapes, so it cannot know N; the node behind it crops. Nodes that name no plugin are
    functions and stay as they are.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        extra = [entry for entry in node.attribute if entry.name == "TRT_decomposable"]
        for entry in extra:
            node.attribute.remove(entry)
    plugins = {node.op_type for node in copy.graph.node if any(a.name == "plugin_version" for a in node.attribute)}
    for body in copy.functions:
        if body.name != functions.SELECT or body.name not in plugins:
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
