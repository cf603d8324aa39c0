"""Built networks in TensorRT's classes: an engine is the recorded network, a context runs it on addresses."""

from __future__ import annotations

from typing import Any

import numpy as np

from support.cuda_double import array_at
from support.tensorrt_llm_double import machine
from support.tensorrt_llm_double.attention import Pools
from support.tensorrt_llm_double.graph import MAGIC, Graph, numpy_dtype
from support.tensorrt_llm_double.oracle import oracle_plugins
from support.tensorrt_llm_double.run import Execution

ALIGNMENT = 256


class DevicePools(Pools):
    """Pools that lie in allocations of the machine's CUDA double."""

    def load(self, address: int) -> np.ndarray:
        return array_at(address, (machine().cuda.memory[address][1],), np.uint8)

    def store(self, address: int, content: np.ndarray) -> None:
        assert content.ctypes.data == address


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
            assert trt.get_plugin_registry().get_creator(node.plugin, "1", "chunkkv"), f"no plugin {node.plugin}"
        return ICudaEngine(graph)


class ICudaEngine:
    num_optimization_profiles = 1

    def __init__(self, graph: Graph) -> None:
        self.graph, self.names = graph, [*graph.inputs, *graph.outputs]
        self.num_io_tensors = len(self.names)

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
        self._names, self._graph = engine.names, engine.graph
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        pools = DevicePools()
        self._execute = Execution(engine.graph, machine().plugins or oracle_plugins(pools), pools)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._names or (not name.startswith("host_") and memory % ALIGNMENT):
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
        """Return the shape of an output, which has a row for every last token."""
        rows = self._shapes["last_token_ids"][0]
        return tuple(rows if size == -1 else size for size in self._graph.values[name].shape)

    def execute_async_v3(self, stream_handle: int) -> bool:
        absent = [name for name in self._names if name not in self._addresses] + self.infer_shapes()
        assert not absent, f"no address or shape for {absent}"
        host = {name: self._read(name).copy() for name in self._graph.inputs if name.startswith("host_")}
        machine().cuda.enqueue(stream_handle, lambda: self._run(host))
        return True

    def _read(self, name: str) -> np.ndarray:
        value = self._graph.values[name]
        shape, dtype = self._shapes.get(name, value.shape), numpy_dtype(value.dtype)
        nbytes, address = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize, self._addresses[name]
        on_device = machine().cuda.contains(address, nbytes)
        assert on_device != name.startswith("host_"), f"{name} lies in the wrong memory"
        return array_at(address, shape, dtype)

    def _run(self, host: dict[str, np.ndarray]) -> None:
        feeds = {name: host[name] if name in host else self._read(name).copy() for name in self._graph.inputs}
        for name, found in self._execute(feeds).items():
            assert machine().cuda.contains(self._addresses[name], found.nbytes), f"{name} does not fit its memory"
            array_at(self._addresses[name], found.shape, found.dtype)[...] = found
