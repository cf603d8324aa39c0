"""A network: TensorRT's, its inputs by name, and the plugin configuration."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import tensorrt as trt

from tensorrt_llm import _common


class Network:
    def __init__(self) -> None:
        self._inputs: dict[str, Any] = {}
        self._outputs: dict[str, Any] = {}
        self.plugin_config: Any = None
        self.strongly_typed = True
        self._module_path: list[str] = []
        self._plugin_info: dict[str, tuple[Any, str]] = {}

    def _init(self, trt_network: trt.INetworkDefinition) -> Network:
        self._trt_network = trt_network
        return self

    @property
    def trt_network(self) -> trt.INetworkDefinition:
        return self._trt_network

    def _add_input(self, tensor: Any, name: str, dtype: trt.DataType, shape: list[int], dim_range: Any = None) -> None:
        tensor.trt_tensor = self.trt_network.add_input(name, dtype, shape)
        self._inputs[name] = tensor

    def _mark_output(self, tensor: Any, name: str, dtype: trt.DataType) -> None:
        self.trt_network.rename(tensor.trt_tensor, name, dtype.value)
        self.trt_network.mark_output(tensor.trt_tensor)
        self._outputs[name] = tensor

    def get_inputs(self) -> list[Any]:
        return list(self._inputs.values())

    def _set_layer_name(self, layer: trt.ILayer) -> None:
        kind = "PLUGIN_V3" if layer.type is trt.LayerType.PLUGIN_V3 else layer.node.op.upper()
        layer.name = "/".join([*self._module_path, f"{kind}_{self.trt_network.layers.index(layer)}"])
        layer.metadata = layer.name


@contextlib.contextmanager
def net_guard(network: Network) -> Iterator[None]:
    _common.set_network(network)
    try:
        yield
    finally:
        _common._NETWORK.pop()
