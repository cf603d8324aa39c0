"""What TensorRT for RTX adds to the double of TensorRT at run time: compiled kernels, their cache, memory of contexts.

Names and parameters are those of NVIDIA's bindings; tests/real_tensorrt/test_runtime_api.py holds them against these.
What a kernel is, is made up: one name for each engine and set of shapes. Engines are built by the other double and
marked in their manifest.
"""

from __future__ import annotations

import enum
import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

from chunkkv.engine.backends import TENSORRT
from chunkkv.engine.directory import MANIFEST_FILE, EngineFiles
from chunkkv.engine.tensorrt_build import RTX, STANDARD
from chunkkv_builder.manifest import write_manifest
from chunkkv_builder.progress import Progress
from support import tensorrt_double as double

MODULE, VERSION = "tensorrt_rtx", "1.7.1.116"
FOREIGN_CACHE = b"kernels of another driver"  # deserialize() does not take it
CONTEXT_BYTES = 4096
HEADER_BYTES = 64


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY, EAGER, NONE = range(3)


class CudaGraphStrategy(enum.Enum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


ComputeCapability = enum.Enum("ComputeCapability", "NONE CURRENT SM75 SM80 SM86 SM89 SM120 SM121")


class EngineValidity(enum.Enum):
    VALID, SUBOPTIMAL, INVALID = range(3)


class EngineInvalidityDiagnostics(enum.IntEnum):
    VERSION_MISMATCH, UNSUPPORTED_CC, OLD_CUDA_DRIVER, OLD_CUDA_RUNTIME = 1, 2, 4, 8
    INSUFFICIENT_GPU_MEMORY, MALFORMED_ENGINE, CUDA_ERROR = 16, 32, 64


ENUMS = (
    *(ExecutionContextAllocationStrategy, DynamicShapesKernelSpecializationStrategy, CudaGraphStrategy),
    *(ComputeCapability, EngineValidity, EngineInvalidityDiagnostics),
)


class IBuilderConfig:
    """Only tells that engines can be built for a GPU that is not there."""

    def set_compute_capability(self, compute_capability: ComputeCapability, index: int = 0) -> bool:
        raise NotImplementedError


class IRuntimeCache:
    """The names of the compiled kernels."""

    def __init__(self) -> None:
        self.kernels: set[str] = set()

    def serialize(self) -> bytes:
        return json.dumps(sorted(self.kernels)).encode()

    def deserialize(self, blob: bytes) -> bool:
        if blob == FOREIGN_CACHE:
            return False
        self.kernels |= set(json.loads(blob))
        return True


class IRuntimeConfig:
    """Of one engine."""

    def __init__(self) -> None:
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
        self.allocation = ExecutionContextAllocationStrategy.STATIC
        self.cache: IRuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.allocation = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self.cache = cache
        return True


class Context(double.Context):
    """Runs in memory that it is given, and compiles kernels for its shapes."""

    def __init__(self, engine: Engine, config: IRuntimeConfig) -> None:
        super().__init__(engine)
        self.config, self._memory = config, (0, 0)
        machine(self).contexts.append(self)

    def set_device_memory(self, memory: int, size: int) -> None:
        self._memory = (memory, size)

    def is_stream_capturable(self, stream: int) -> bool:
        return machine(self).stream_capturable

    def execute_async_v3(self, stream_handle: int) -> bool:
        address, size = self._memory
        assert size >= self._engine.device_memory_size_v2 and double.DOUBLES[-1].cuda.contains(address, size)
        kernel = f"{self._engine.names} {sorted(self._shapes.items())}"
        assert self.config.cache is not None
        if kernel not in self.config.cache.kernels:
            machine(self).compiled.append(kernel)
            self.config.cache.kernels.add(kernel)
        return super().execute_async_v3(stream_handle)


class Engine(double.Engine):
    """ICudaEngine of TensorRT for RTX."""

    @property
    def device_memory_size_v2(self) -> int:
        return CONTEXT_BYTES

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, runtime_config: IRuntimeConfig) -> Context:
        assert runtime_config.allocation is ExecutionContextAllocationStrategy.USER_MANAGED
        return Context(self, runtime_config)


class Runtime(double.Runtime):
    """Runtime of TensorRT for RTX; an engine of the other double runs on every GPU."""

    @property
    def engine_header_size(self) -> int:
        return HEADER_BYTES

    def get_engine_validity(self, buffer: bytes) -> tuple[EngineValidity, int]:
        if not buffer.startswith(double.MAGIC):
            return EngineValidity.INVALID, int(EngineInvalidityDiagnostics.MALFORMED_ENGINE)
        return EngineValidity.VALID, 0

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
        plain = super().deserialize_cuda_engine(serialized_engine)
        return None if plain is None else Engine(serialized_engine)


class RtxMachine:
    """A module tensorrt_rtx for a machine of the other double.

    `contexts` are those made so far, `compiled` the kernels that no cache held; `stream_capturable` is what contexts
    say of themselves.
    """

    def __init__(self, plain: double.Double) -> None:
        self.plain = plain
        self.contexts: list[Context] = []
        self.compiled: list[str] = []
        self.stream_capturable = True
        module = self.module = types.ModuleType(MODULE)
        vars(module).update({name: value for name, value in vars(plain.module).items() if not name.startswith("__")})
        module.__version__ = VERSION
        module.Runtime, module.IBuilderConfig = Runtime, IBuilderConfig
        for item in ENUMS:
            setattr(module, item.__name__, item)

    def install(self, monkeypatch: Any, folder: Path) -> None:
        """Make `import tensorrt_rtx` mean this module, with its plugin library in `folder`."""
        monkeypatch.setitem(sys.modules, MODULE, self.module)
        (folder / "libchunkkv_tensorrt_rtx.so.1").touch()
        MACHINES[self.plain] = self

    def mark(self, engine_dir: Path) -> Path:
        """Make an engine directory of the other double one of TensorRT for RTX; return it."""
        files = EngineFiles.load(engine_dir)
        assert files.tensorrt is not None and files.tensorrt.flavour == STANDARD
        record = replace(files.tensorrt, flavour=RTX, version=VERSION)
        (engine_dir / MANIFEST_FILE).unlink()
        write_manifest(engine_dir, TENSORRT, {MODULE: VERSION}, Progress("error"), record)
        return engine_dir


MACHINES: dict[double.Double, RtxMachine] = {}


def machine(_: Context) -> RtxMachine:
    """Return the machine of the test that runs now."""
    return MACHINES[double.DOUBLES[-1]]
