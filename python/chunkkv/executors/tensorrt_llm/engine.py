"""A TensorRT-LLM engine on the current GPU as a step engine: deserialised and run by TensorRT itself.

TensorRT-LLM is imported for its plugins only; its runtimes take no part.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from chunkkv.errors import BackendUnavailableError, EngineMismatchError, EngineRunError
from chunkkv.executors.tensorrt_llm.paged_inputs import LOGITS
from chunkkv.executors.tensorrt_llm.step_engine import HOST_PREFIX, StepTensor
from chunkkv.gpu.cuda_runtime import ALIGNMENT, CudaRuntime, DeviceBuffer, PinnedArray
from chunkkv.gpu.tensorrt_errors import ErrorLog, start
from chunkkv.gpu.tensorrt_library import TensorRT, import_tensorrt
from chunkkv.gpu.tensorrt_plugins import TENSORRT_LLM_PLUGINS, load_plugins

_PIECE = 64 << 20  # bytes that are zeroed at once
_TYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64}


class TensorRTLLMStepEngine:
    """One engine file with one execution context. TensorRT's own objects are `Any`: the package has no types.

    Raises BackendUnavailableError where TensorRT-LLM, a GPU or the plugins are missing, EngineMismatchError for an
    engine of another TensorRT or GPU.

    Parameters
    ----------
    path : Path
        The engine file.
    versions : mapping of str to str
        Versions of the libraries that it was built with, from its directory's manifest.
    """

    def __init__(self, path: Path, versions: Mapping[str, str]) -> None:
        self._trt = import_tensorrt_llm(path)
        if (built := versions.get("tensorrt")) != self._trt.__version__:
            raise EngineMismatchError(
                f"{path} was built with TensorRT {built}, installed is {self._trt.__version__}: install that version "
                "or build the engine again"
            )
        try:
            self._cuda = CudaRuntime.load()
        except BackendUnavailableError as error:
            raise BackendUnavailableError(f"{path} was built for TensorRT-LLM and needs {error}") from None
        self._messages = ErrorLog()
        self._logger = self._messages.logger(self._trt)
        library = TensorRT.of(self._trt)
        self._runtime = start(library, self._trt.Runtime, self._logger, self._messages)
        load_plugins(library, self._trt.get_plugin_registry(), self._messages, TENSORRT_LLM_PLUGINS)
        self._engine = self._deserialize(path)
        self._inputs, self._outputs = self._tensors("INPUT"), self._tensors("OUTPUT")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise EngineRunError(f"TensorRT cannot make an execution context{self._messages.explanation()}")
        self._stream = self._cuda.stream()
        self._staging: PinnedArray | None = None  # the inputs of one step, each at an aligned place
        self._device = self._cuda.device_memory(0)  # the same layout, for what the GPU reads
        self._zeros = self._cuda.device_memory(0)
        self._logits = self._cuda.device_memory(0)

    @property
    def inputs(self) -> Mapping[str, StepTensor]:
        """Return what run() must be given, by name."""
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, StepTensor]:
        """Return what the engine computes, by name."""
        return self._outputs

    def free_memory(self) -> int:
        """Return the free bytes of the GPU."""
        return self._cuda.free_memory()[0]

    def allocate(self, nbytes: int) -> DeviceBuffer:
        """Return zeroed device memory."""
        buffer = self._cuda.device_memory(nbytes)
        zeros = np.zeros(min(nbytes, _PIECE), np.uint8)
        for done in range(0, nbytes, _PIECE):
            self._stream.upload(buffer.address + done, zeros[: nbytes - done])
        self._stream.synchronize()
        return buffer

    def run(self, arrays: Mapping[str, np.ndarray], zeros: Mapping[str, tuple[int, ...]]) -> np.ndarray:
        """Run one step and return the logits; raises EngineRunError where TensorRT or a plugin refuses it."""
        self._messages.errors.clear()
        self._bind_arrays(arrays)
        for name, shape in zeros.items():
            self._bind(name, self._zeroed(int(np.prod(shape)) * self._inputs[name].dtype.itemsize), shape)
        logits = self._new_logits()
        self._logits = self._grown(self._logits, logits.nbytes)
        if not self._context.set_tensor_address(LOGITS, self._logits.address):
            raise EngineRunError(f"TensorRT does not take an address for {LOGITS!r}")
        if not self._context.execute_async_v3(self._stream.handle):
            raise EngineRunError(f"TensorRT could not run the engine{self._messages.explanation()}")
        self._stream.download(logits, self._logits.address)
        self._stream.synchronize()
        return logits

    def _bind_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Lay the inputs side by side in pinned memory; the GPU's are copied, the host's are bound where they lie."""
        ends = np.cumsum([-(-max(array.nbytes, 1) // ALIGNMENT) * ALIGNMENT for array in arrays.values()])
        starts = dict(zip(arrays, [0, *ends[:-1].tolist()], strict=True))
        total = int(ends[-1])
        if self._staging is None or self._staging.array.nbytes < total:
            self._staging = self._cuda.pinned((2 * total,), np.uint8)
        self._device = self._grown(self._device, total)
        staged = self._staging.array
        for name, array in arrays.items():
            staged[starts[name] : starts[name] + array.nbytes] = array.reshape(-1).view(np.uint8)
        self._stream.upload(self._device.address, staged[:total])
        for name, array in arrays.items():
            base = staged.ctypes.data if name.startswith(HOST_PREFIX) else self._device.address
            self._bind(name, base + starts[name], array.shape)

    def _bind(self, name: str, address: int, shape: tuple[int, ...]) -> None:
        if not self._context.set_input_shape(name, shape):
            raise EngineRunError(f"TensorRT does not take {name} of shape {shape}: it is outside the engine's limits")
        if not self._context.set_tensor_address(name, address):
            raise EngineRunError(f"TensorRT does not take an address for {name!r}")

    def _zeroed(self, nbytes: int) -> int:
        if self._zeros.nbytes < nbytes:
            self._zeros = self.allocate(2 * nbytes)
        return self._zeros.address

    def _grown(self, buffer: DeviceBuffer, nbytes: int) -> DeviceBuffer:
        return buffer if buffer.nbytes >= nbytes else self._cuda.device_memory(2 * nbytes)

    def _new_logits(self) -> np.ndarray:
        """Return an array of the shape that the output has with the inputs bound now."""
        if problem := self._context.infer_shapes():
            raise EngineRunError(f"TensorRT does not know the shape of {', '.join(problem)}")
        return np.empty(tuple(self._context.get_tensor_shape(LOGITS)), self._outputs[LOGITS].dtype)

    def _deserialize(self, path: Path) -> Any:
        self._messages.errors.clear()
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise EngineMismatchError(
                f"{path} does not load in TensorRT {self._trt.__version__} on this GPU{self._messages.explanation()}; "
                "build it on this machine"
            )
        if engine.num_optimization_profiles != 1:
            raise EngineMismatchError(
                f"{path} has {engine.num_optimization_profiles} optimization profiles; build it with "
                "--multiple_profiles disable"
            )
        return engine

    def _tensors(self, mode: str) -> dict[str, StepTensor]:
        engine = self._engine
        tensors: dict[str, StepTensor] = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            if engine.get_tensor_mode(name) != getattr(self._trt.TensorIOMode, mode):
                continue
            dtype = engine.get_tensor_dtype(name).name
            if dtype not in _TYPES:
                raise EngineMismatchError(f"{name} of the engine is {dtype}; supported are {', '.join(_TYPES)}")
            tensors[name] = StepTensor(tuple(engine.get_tensor_shape(name)), np.dtype(_TYPES[dtype]))
        return tensors


def import_tensorrt_llm(path: Path | str) -> Any:
    """Return the module tensorrt with TensorRT-LLM's plugins registered; `path` is what needs them.

    Raises BackendUnavailableError where one of the packages cannot be imported.
    """
    try:
        trt = import_tensorrt()
        import tensorrt_llm  # noqa: F401  importing it loads its plugin library
    except (BackendUnavailableError, ImportError) as error:
        raise BackendUnavailableError(
            f"{path} needs the Python packages 'tensorrt' and 'tensorrt_llm', which cannot be imported here ({error})"
        ) from None
    return trt
