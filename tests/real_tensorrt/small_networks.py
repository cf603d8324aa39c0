"""Networks of one plugin node each, parsed and built by TensorRT, and what its logger said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto, helper

from chunkkv.gpu.tensorrt_errors import ErrorLog, start
from chunkkv.gpu.tensorrt_library import TensorRT
from chunkkv_builder.onnx_graph import functions

from .plugin_nodes import SIZES, Node, Tensor

ONNX_TYPES = {
    "bool": TensorProto.BOOL,
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "fp8": TensorProto.FLOAT8E4M3FN,
    "int8": TensorProto.INT8,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}
OPSET = 23


@dataclass(frozen=True)
class Outcome:
    """What became of one network.

    Parameters
    ----------
    layers : names of the layers' types; empty where the parser refused the graph.
    output_types : type of each network output by name.
    engine : the serialized engine, empty where the network was refused.
    errors : what TensorRT and the plugin logged as errors.
    """

    layers: tuple[str, ...]
    output_types: dict[str, str]
    engine: bytes
    errors: tuple[str, ...]

    def refusal(self) -> str:
        """Return all errors of a network that must have been refused."""
        assert not self.engine and self.errors
        return "\n".join(self.errors)


class SmallNetworks:
    """A builder of `tensorrt` for small networks."""

    def __init__(self, tensorrt: TensorRT) -> None:
        self._trt, self._errors = tensorrt.module, ErrorLog()
        self._logger = self._errors.logger(self._trt)
        self._builder = start(tensorrt, self._trt.Builder, self._logger, self._errors)

    def build(self, node: Node, check_shapes: bool = True) -> Outcome:
        """Build a network of `node`.

        With `check_shapes` each output is added to an input of the shape that the node is said to give: TensorRT
        compares both at the best sizes of the profile, and refuses what cannot be added.
        """
        self._errors.errors.clear()
        partners = [Tensor(f"{o.name}.partner", o.dtype, o.dims) for o in node.outputs] if check_shapes else []
        inputs = (*node.inputs, *partners)
        network = self._builder.create_network(0)
        parser = self._trt.OnnxParser(network, self._logger)
        if not parser.parse(_model(node, inputs, partners).SerializeToString()):
            return Outcome((), {}, b"", tuple(self._errors.errors))
        layers = tuple(network.get_layer(index).type.name for index in range(network.num_layers))
        outputs = [network.get_output(index) for index in range(network.num_outputs)]
        config = self._builder.create_builder_config()
        config.add_optimization_profile(self._profile(inputs))
        engine = self._builder.build_serialized_network(network, config)
        types = {tensor.name: tensor.dtype.name for tensor in outputs}
        return Outcome(layers, types, bytes(engine) if engine is not None else b"", tuple(self._errors.errors))

    def _profile(self, inputs: Sequence[Tensor]) -> Any:
        profile = self._builder.create_optimization_profile()
        for tensor in inputs:
            if any(isinstance(dim, str) for dim in tensor.dims):
                corners = [
                    tuple(SIZES[dim][corner] if isinstance(dim, str) else dim for dim in tensor.dims)
                    for corner in range(3)
                ]
                profile.set_shape(tensor.name, *corners)
        return profile


def _model(node: Node, inputs: Sequence[Tensor], partners: Sequence[Tensor]) -> onnx.ModelProto:
    nodes = [
        helper.make_node(
            node.plugin,
            [tensor.name for tensor in node.inputs],
            [tensor.name for tensor in node.outputs],
            name="/node",
            domain=functions.DOMAIN,
            **node.fields,
            **functions.plugin_attributes(),
        )
    ]
    outputs = list(node.outputs)
    for partner, output in zip(partners, node.outputs, strict=False):
        nodes.append(helper.make_node("Add", [output.name, partner.name], [f"{output.name}.sum"]))
        outputs.append(Tensor(f"{output.name}.sum", output.dtype, output.dims))
    graph = helper.make_graph(nodes, "small", [_value(t) for t in inputs], [_value(t) for t in outputs])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(functions.DOMAIN, functions.DOMAIN_VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _value(tensor: Tensor) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, ONNX_TYPES[tensor.dtype], list(tensor.dims))
