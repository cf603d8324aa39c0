"""Built networks in TensorRT's classes: an engine is the recorded network, a context runs it on addresses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from support.tensorrt_llm_double import machine
from support.tensorrt_llm_double.graph import MAGIC, Graph, numpy_dtype

ALIGNMENT = 256


class Builder:
    """tensorrt.Builder: what the double of tensorrt_llm's own Builder serialises with."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def create_network(self, flags: int = 0) -> Any:
        import tensorrt as trt

        return trt.INetworkDefinition()

    def build_serialized_network(self, network: Any, config: Any) -> bytes:
        machine().networks.append(network.graph)
        return network.graph.to_bytes()


class Runtime:
    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        import tensorrt as trt

        content = bytes(serialized_engine)
        if not content.startswith(MAGIC):
            self.logger.log(trt.ILogger.Severity.ERROR, "magic tag does not match")
            return None
        graph = Graph.from_bytes(content)
        for node in graph.of("plugin_v3"):
            if trt.get_plugin_registry().get_creator(node.plugin, "1", "chunkkv") is None:
                self.logger.log(trt.ILogger.Severity.ERROR, f"Cannot find plugin: {node.plugin}")
                return None
        return ICudaEngine(graph)


class ICudaEngine:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.names = [*graph.inputs, *graph.outputs]

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    @property
    def num_layers(self) -> int:
        return len(self.graph.nodes)

    @property
    def num_optimization_profiles(self) -> int:
        return 1

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> Any:
        import tensorrt as trt

        return trt.TensorIOMode.INPUT if name in self.graph.inputs else trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        import tensorrt as trt

        return trt.DataType(self.graph.values[name].dtype)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.graph.values[name].shape

    def create_execution_context(self) -> IExecutionContext:
        return IExecutionContext(self)


class IExecutionContext:
    """Runs a network on the machine's CUDA double: device tensors when the stream gets there, host_* ones now."""

    def __init__(self, engine: ICudaEngine) -> None:
        self.engine, self._graph = engine, engine.graph
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._execute: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] | None = None

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.engine.names or (not name.startswith("host_") and memory % ALIGNMENT):
            return False
        self._addresses[name] = memory
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        declared = self._graph.values[name].shape
        fits = len(shape) == len(declared) and all(b in (-1, a) for a, b in zip(shape, declared, strict=True))
        if fits:
            self._shapes[name] = tuple(shape)
        return fits

    def infer_shapes(self) -> list[str]:
        return [
            name for name in self._graph.inputs if name not in self._shapes and -1 in self._graph.values[name].shape
        ]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an output: as many rows as there are last tokens, or tokens."""
        rows = self._shapes.get("last_token_ids", self._shapes["input_ids"])[0]
        return tuple(rows if size == -1 else size for size in self._graph.values[name].shape)

    def execute_async_v3(self, stream_handle: int) -> bool:
        missing = [name for name in self.engine.names if name not in self._addresses]
        assert not missing, f"no address for {missing[0]}"
        absent = self.infer_shapes()
        assert not absent, f"no shape for {absent[0]}"
        host = {name: self._read(name).copy() for name in self._graph.inputs if name.startswith("host_")}
        machine().cuda.enqueue(stream_handle, lambda: self._run(host))
        return True

    def _read(self, name: str) -> np.ndarray:
        from support.cuda_double import array_at

        value = self._graph.values[name]
        shape, dtype = self._shapes.get(name, value.shape), numpy_dtype(value.dtype)
        nbytes, address = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize, self._addresses[name]
        on_device = machine().cuda.contains(address, nbytes)
        assert on_device != name.startswith("host_"), f"{name} lies in the wrong memory"
        return array_at(address, shape, dtype)

    def _run(self, host: dict[str, np.ndarray]) -> None:
        from support.cuda_double import array_at

        feeds = {name: host[name] if name in host else self._read(name).copy() for name in self._graph.inputs}
        if self._execute is None:
            from support.tensorrt_llm_double.device import execution

            self._execute = execution(self._graph, machine().cuda)
        for name, found in self._execute(feeds).items():
            assert machine().cuda.contains(self._addresses[name], found.nbytes), f"{name} does not fit its memory"
            array_at(self._addresses[name], found.shape, found.dtype)[...] = found
