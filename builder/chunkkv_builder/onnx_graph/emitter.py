"""A thin layer over onnx.helper: unique names, shared constants, initializers that live in the weights file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from chunkkv_builder.onnx_graph.weights import WeightLocation

NUMPY_TO_ONNX = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "uint8": TensorProto.UINT8,
    "int8": TensorProto.INT8,
    "bool": TensorProto.BOOL,
}


class NodeEmitter:
    """Collects nodes and small constants; values are referred to by name."""

    def __init__(self, prefix: str = "") -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.values: list[onnx.ValueInfoProto] = []
        self._prefix = prefix
        self._count = 0
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def op(
        self,
        op_type: str,
        inputs: Sequence[str],
        outputs: Sequence[str] | None = None,
        *,
        name: str | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Append one node and return the name of its first output."""
        self._count += 1
        if outputs is None:
            outputs = [f"{self._prefix}{op_type.lower()}_{self._count}"]
        node_name = name or f"{self._prefix}{op_type}_{self._count}"
        self.nodes.append(
            helper.make_node(op_type, list(inputs), list(outputs), name=node_name, domain=domain, **attributes)
        )
        return outputs[0]

    def const(self, value: Any, dtype: str) -> str:
        """Return the name of a Constant holding `value`; equal constants are emitted once."""
        array = np.asarray(value, dtype=dtype)
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.op("Constant", [], value=numpy_helper.from_array(array))
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """Return a 1-D int64 constant: axes, shapes, slice bounds."""
        return self.const(list(values), "int64")

    def scalar(self, value: float, dtype: str = "float32") -> str:
        """Return a 0-D constant."""
        return self.const(value, dtype)

    def dim(self, value: str, axis: int) -> str:
        """Return dimension `axis` of `value` as a 1-D int64 tensor of one element."""
        return self.op("Shape", [value], start=axis, end=axis + 1)

    def declare(self, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        """State type and shape of a value between nodes.

        ONNX Runtime lets a node write its result into its input only where both have the same known shape.
        """
        self.values.append(helper.make_tensor_value_info(name, NUMPY_TO_ONNX[dtype], list(shape)))

    def branch(self, outputs: Sequence[tuple[str, str, Sequence[int | str]]]) -> onnx.GraphProto:
        """Return the nodes as a branch of an If; `outputs` are (name, dtype, shape) of what it gives."""
        values = [
            helper.make_tensor_value_info(name, NUMPY_TO_ONNX[dtype], list(shape)) for name, dtype, shape in outputs
        ]
        return helper.make_graph(self.nodes, outputs[0][0], [], values, value_info=self.values)


class GraphEmitter(NodeEmitter):
    """A NodeEmitter with graph inputs, outputs and initializers stored in the engine's weights file."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        """Declare a graph input and return its name."""
        self.inputs.append(helper.make_tensor_value_info(name, NUMPY_TO_ONNX[dtype], list(shape)))
        return name

    def output(self, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        """Declare a graph output."""
        self.outputs.append(helper.make_tensor_value_info(name, NUMPY_TO_ONNX[dtype], list(shape)))

    def weight(self, location: WeightLocation) -> str:
        """Reference a tensor of the weights file as external data and return its name."""
        if location.name not in self.initializers:
            tensor = TensorProto(
                name=location.name,
                data_type=NUMPY_TO_ONNX[location.dtype],
                dims=location.shape,
                data_location=TensorProto.EXTERNAL,
            )
            for key, value in (
                ("location", location.file),
                ("offset", str(location.offset)),
                ("length", str(location.nbytes)),
            ):
                tensor.external_data.add(key=key, value=value)
            self.initializers[location.name] = tensor
        return location.name

    def inline(self, name: str, array: np.ndarray) -> str:
        """Store a small tensor inside the graph file and return its name."""
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def model(
        self,
        graph_name: str,
        *,
        opset: int,
        functions: Sequence[onnx.FunctionProto] = (),
        domains: Sequence[tuple[str, int]] = (),
        metadata: dict[str, str] | None = None,
    ) -> onnx.ModelProto:
        """Return the finished model; extra operator domains are given as (domain, version)."""
        graph = helper.make_graph(
            self.nodes,
            graph_name,
            self.inputs,
            self.outputs,
            initializer=list(self.initializers.values()),
            value_info=self.values,
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", opset), *(helper.make_opsetid(d, v) for d, v in domains)],
            functions=list(functions),
            producer_name="chunkkv-trt",
            ir_version=10 if opset < 24 else 11,
        )
        helper.set_model_props(model, metadata or {})
        return model


class InputWeightsEmitter(GraphEmitter):
    """A GraphEmitter whose matrices are graph inputs, so that several engines run on one copy of them.

    Vectors (norms, biases) are small and stay inside the graph; `load` returns a tensor by name, in its stored dtype.
    """

    def __init__(self, load: Callable[[str], np.ndarray]) -> None:
        super().__init__()
        self._load = load
        self.weight_inputs: list[WeightLocation] = []

    def weight(self, location: WeightLocation) -> str:
        """Declare a matrix as graph input, or store a vector inside the graph, and return its name."""
        if len(location.shape) == 1:
            if location.name not in self.initializers:
                self.inline(location.name, self._load(location.name))
        elif location not in self.weight_inputs:
            self.weight_inputs.append(location)
            self.input(location.name, location.dtype, location.shape)
        return location.name
