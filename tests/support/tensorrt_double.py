"""The standard TensorRT at run time as read from NVIDIA's documentation, played by ONNX Runtime: a contract as read.

No machine without a GPU can show what is left here: engines that run on bound addresses (shapes within the profile,
caches updated in place, host shape inputs read at once), the registry and the timing cache of the standard TensorRT,
and what its major versions differ in. How graphs are parsed and built, what is refused, and Ctrl-C during a build are
tested on TensorRT for RTX itself (tests/real_tensorrt), so this builder takes every graph. Names and parameters are
compared with NVIDIA's bindings (tests/test_tensorrt_api.py).

An "engine" is the ONNX graph itself; a context runs it on the addresses it was given. ChunkKV nodes are taken as
plugins where the registry holds them.
"""

from __future__ import annotations

import enum
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto

from chunkkv_builder.onnx_graph import functions
from support.cuda_double import CudartDouble, array_at
from support.graphs import skip_without_standard_attention
from support.tensorrt_graphs import as_plugins

MAGIC, TIMINGS = b"tensorrt double engine\n", b"tensorrt double timings\n"
ALIGNMENT = 256
FIELDS = ("window", "chunk_size", "sinks", "boundaries", "pooling", "score", "min_tokens", "max_kept")
FIELDS += ("request_window", "head_reduce")
NUMPY = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}
NUMPY |= {TensorProto.INT32: np.int32, TensorProto.INT64: np.int64}


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity

    def __init__(self) -> None: ...

    def log(self, severity: Severity, msg: str) -> None: ...


class IProgressMonitor:
    def __init__(self) -> None: ...

    def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None: ...

    def step_complete(self, phase_name: str, step: int) -> bool: ...

    def phase_finish(self, phase_name: str) -> None: ...


class OnnxParser:
    def __init__(self, network: Any, logger: ILogger) -> None:
        self._network = network

    def parse(self, model: bytes, path: str | None = None) -> bool:
        self._network.take(onnx.ModelProto.FromString(model), self._network.registry)
        return True


class Tensor:
    def __init__(self, value: onnx.ValueInfoProto) -> None:
        self.name = value.name
        self.shape = tuple(dim.dim_value if not dim.dim_param else -1 for dim in value.type.tensor_type.shape.dim)


class Network:
    """INetworkDefinition: the parsed graph, ChunkKV nodes as plugin layers where the registry has them."""

    def __init__(self, flags: int, registry: Registry) -> None:
        self.flags, self.registry = flags, registry
        self.model: onnx.ModelProto | None = None
        self._layers: list[Any] = []

    def take(self, model: onnx.ModelProto, registry: Registry) -> None:
        self.model = model
        for node in model.graph.node:
            attributes = {entry.name for entry in node.attribute}
            creator = registry.get_creator(node.op_type, "1", "chunkkv") if "plugin_namespace" in attributes else None
            kind = LayerType.PLUGIN_V3 if creator else LayerType.IDENTITY
            self._layers.append(types.SimpleNamespace(type=kind, name=node.name))

    @property
    def num_inputs(self) -> int:
        return len(self.model.graph.input)

    def get_input(self, index: int) -> Tensor:
        return Tensor(self.model.graph.input[index])

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def get_layer(self, index: int) -> Any:
        return self._layers[index]


class OptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[tuple[int, ...]]] = {}
        self.values: dict[str, list[list[int]]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self.shapes[input] = [tuple(min), tuple(opt), tuple(max)]

    def set_shape_input(self, input: str, min: list[int], opt: list[int], max: list[int]) -> None:
        self.values[input] = [list(min), list(opt), list(max)]


class TimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return TIMINGS + self.content


class BuilderConfig:
    """IBuilderConfig."""

    progress_monitor: Any = None

    def __init__(self) -> None:
        self.profiles: list[OptimizationProfile] = []
        self._cache: TimingCache | None = None

    def add_optimization_profile(self, profile: OptimizationProfile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache | None:
        if serialized_timing_cache and not serialized_timing_cache.startswith(TIMINGS):
            return None
        return TimingCache(serialized_timing_cache.removeprefix(TIMINGS))

    def set_timing_cache(self, cache: TimingCache | None, ignore_mismatch: bool) -> bool:
        if cache is None:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> TimingCache | None:
        return self._cache

    def clear_flag(self, flag: Any) -> None: ...


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self._logger = DOUBLES[-1].logger = logger
        self.log = DOUBLES[-1].log

    def create_network(self, flags: int = 0) -> Network:
        return Network(flags, DOUBLES[-1].registry)

    def create_builder_config(self) -> BuilderConfig:
        return BuilderConfig()

    def create_optimization_profile(self) -> OptimizationProfile:
        return OptimizationProfile()

    def build_serialized_network(self, network: Network, config: BuilderConfig) -> bytes | None:
        (profile,) = config.profiles
        self.log.append({"network": network, "profile": profile})
        config._cache.content += b"t"
        header = {"version": DOUBLES[-1].version, "shapes": profile.shapes, "values": profile.values}
        return MAGIC + json.dumps(header).encode() + b"\n" + as_plugins(network.model).SerializeToString()


class Context:
    """IExecutionContext."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine.names or memory % ALIGNMENT:
            return False
        self._addresses[name] = memory
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._engine.header["shapes"].get(name, (shape,) * 3)
        fits = len(shape) == len(low) and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
        if fits:
            self._shapes[name] = shape
        return fits

    def execute_async_v3(self, stream_handle: int) -> bool:
        names = self._engine.names
        if missing := [name for name in names if name not in self._addresses]:
            raise AssertionError(f"no address for {missing[0]}")
        capacity = None
        if "capacity" in names:  # a host shape input: read now, not when the stream gets there
            address = self._addresses["capacity"]
            assert not DOUBLES[-1].cuda.contains(address, 8), "a host shape input in device memory"
            low, _, high = self._engine.header["values"]["capacity"]
            capacity = array_at(address, (len(low),), np.int64).copy()
            if not (capacity >= low).all() or not (capacity <= high).all():
                return False
        DOUBLES[-1].cuda.enqueue(stream_handle, lambda: self._run(capacity))
        return True

    def _run(self, capacity: np.ndarray | None) -> None:
        session, feeds = self._engine.session, {}
        for value in self._engine.model.graph.input:
            fixed = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
            shape = fixed if all(fixed) else self._shapes[value.name]
            dtype = NUMPY[value.type.tensor_type.elem_type]
            if value.name != "capacity":
                feeds[value.name] = array_at(self._addresses[value.name], shape, dtype).copy()
                nbytes = feeds[value.name].nbytes
                assert DOUBLES[-1].cuda.contains(self._addresses[value.name], nbytes), f"{value.name} is not on the GPU"
        if capacity is not None:
            feeds["capacity"] = capacity
        wanted = [value.name for value in session.get_outputs()]
        for name, found in zip(wanted, session.run(None, feeds), strict=True):
            address = self._addresses[name]
            alias = self._engine.get_aliased_input_tensor(name)
            assert alias is None or address == self._addresses[alias], "an updated cache must be bound in place"
            assert DOUBLES[-1].cuda.contains(address, found.nbytes), f"{name} does not fit its memory"
            array_at(address, found.shape, found.dtype)[...] = found


class Engine:
    """ICudaEngine."""

    def __init__(self, serialized: bytes) -> None:
        header, _, graph = serialized.removeprefix(MAGIC).partition(b"\n")
        self.header, self.model = json.loads(header), onnx.ModelProto.FromString(graph)
        values = (*self.model.graph.input, *self.model.graph.output)
        self.names = [value.name for value in values]
        self._aliases = {n.output[0]: n.input[0] for n in self.model.graph.node if n.op_type == "TensorScatter"}
        skip_without_standard_attention()
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self._aliases.get(name)

    def create_execution_context(self) -> Context:
        return Context(self)


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = DOUBLES[-1].logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
        if not serialized_engine.startswith(MAGIC):
            self._logger.log(Severity.ERROR, "magic tag does not match")
            return None
        return Engine(serialized_engine)


class Registry:
    """IPluginRegistry; a "library" is any file, and registers both plugins with `fields`."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.fields, self.names = FIELDS, (functions.SELECT, functions.COMPACT)
        self._creators: dict[tuple[str, str, str], Any] = {}

    def load_library(self, plugin_path: str) -> object | None:
        if self._creators or not Path(plugin_path).is_file():
            return None
        self.loaded.append(plugin_path)
        for name in self.names:
            fields = [types.SimpleNamespace(name=field) for field in self.fields if name == functions.SELECT]
            self._creators[name, "1", "chunkkv"] = types.SimpleNamespace(name=name, field_names=fields)
        return object()

    def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> Any:
        return self._creators.get((type, version, plugin_namespace))


LayerType = enum.Enum("LayerType", "IDENTITY PLUGIN_V3 ATTENTION_INPUT KV_CACHE_UPDATE")
DOUBLES: list[Double] = []


class Double:
    """One machine: a module tensorrt of `version`, its registry, what was built with it, and a CUDA runtime."""

    def __init__(self, version: str = "11.4.0.106", capturable: bool = True) -> None:
        self.version, self.registry, self.log = version, Registry(), []
        self.logger: Any = None  # of the Builder or Runtime made last, where the registry complains
        self.cuda = CudartDouble(capturable=capturable)
        module = self.module = types.ModuleType("tensorrt")
        module.__version__ = version
        classes = (ILogger, IProgressMonitor, OnnxParser, Builder, Runtime, LayerType)
        for item in classes:
            setattr(module, item.__name__, item)
        for name in ("IAttention", "IRotaryEmbeddingLayer", "IKVCacheUpdateLayer"):
            setattr(module, name, type(name, (), {}))
        old = version.startswith("10.")
        flags = {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1} if old else {"STRONGLY_TYPED": 0}
        module.NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", flags)
        module.BuilderFlag = enum.IntEnum("BuilderFlag", {"TF32": 7})
        module.get_plugin_registry = lambda: self.registry

    def install(self, monkeypatch: Any, folder: Path) -> None:
        """Make `import tensorrt` and the CUDA runtime mean this machine, with a plugin library in `folder`."""
        from chunkkv.gpu import tensorrt_plugins
        from chunkkv.gpu.cuda_runtime import CudaRuntime

        DOUBLES.append(self)
        runtime = CudaRuntime(self.cuda)
        monkeypatch.setitem(sys.modules, "tensorrt", self.module)
        monkeypatch.setattr(tensorrt_plugins, "PLUGIN_FOLDERS", (folder,))  # not what this checkout may have built
        monkeypatch.setattr(tensorrt_plugins, "KERNEL_HEAD_SIZES", (16, 32, 64))  # the tiny models' own
        monkeypatch.setattr(CudaRuntime, "load", staticmethod(lambda: runtime))
        (folder / f"libchunkkv_tensorrt.so.{self.version.split('.')[0]}").touch()
        monkeypatch.setenv("CHUNKKV_LIB", str(folder / "libchunkkv.so"))


def machine_of(monkeypatch: Any, tmp_path: Path, version: str = "11.4.0.106") -> Iterator[Double]:
    """Yield a machine with TensorRT `version` that is installed for the time of one test."""
    double = Double(version)
    double.install(monkeypatch, tmp_path)
    yield double
    DOUBLES.remove(double)
