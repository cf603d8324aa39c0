"""Loads the TensorRT engines of one directory and runs them: weights lie once on the GPU, bound to every engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from chunkkv.engine.tensorrt_build import PLUGIN, TensorRTBuild
from chunkkv.engine.tensorrt_contract import WEIGHTS_FILE, Contract
from chunkkv.errors import BackendUnavailableError, EngineError, EngineMismatchError, EngineRunError
from chunkkv.gpu.cuda_runtime import ALIGNMENT, CudaRuntime, DeviceBuffer, Stream
from chunkkv.gpu.tensorrt_errors import ErrorLog, start
from chunkkv.gpu.tensorrt_library import tensorrt_of_engine
from chunkkv.gpu.tensorrt_plugins import load_plugins

_PIECE = 64 << 20  # bytes of weights copied at once: bounds the host memory of loading


class TensorRTEngines:
    """The engine files of one directory on the current GPU.

    TensorRT's own objects are `Any` here and in what uses them: the package has no types.

    Raises BackendUnavailableError where TensorRT, GPU or plugins are missing, EngineMismatchError for engines of
    another TensorRT or GPU.

    Parameters
    ----------
    engine_dir : Path
        The engine directory.
    built_with : TensorRTBuild
        What its manifest says of the TensorRT that built it.
    """

    def __init__(self, engine_dir: Path, built_with: TensorRTBuild) -> None:
        self.contract = Contract.read(engine_dir)
        self._dir = engine_dir
        trt = self._library = tensorrt_of_engine(engine_dir, built_with)
        try:
            self.cuda = CudaRuntime.load()
        except BackendUnavailableError as error:
            raise BackendUnavailableError(f"{engine_dir} was built with {trt.title} and needs {error}") from None
        self._messages = ErrorLog()
        self._logger = self._messages.logger(trt.module)
        self._runtime = start(trt, trt.module.Runtime, self._logger, self._messages)
        if built_with.chunkkv_ops == PLUGIN:
            load_plugins(trt, trt.module.get_plugin_registry(), self._messages)
        self._weights, self._weights_buffer = self._load_weights()

    def new_context(self, engine: Any) -> Any:
        """Return an execution context with the weights bound."""
        context = engine.create_execution_context()
        if context is None:
            raise EngineRunError(f"TensorRT cannot make an execution context{self._messages.explanation()}")
        for name, address in self._weights.items():
            bind(context, name, address)
        return context

    def run(self, context: Any, stream: Stream) -> None:
        """Enqueue `context` on `stream`."""
        if not context.execute_async_v3(stream.handle):
            raise EngineRunError(f"TensorRT could not run an engine{self._messages.explanation()}")

    def load(self, name: str) -> Any:
        """Deserialise the engine file `name`; raises EngineMismatchError for one that does not load on this GPU."""
        self._messages.errors.clear()
        engine = self._runtime.deserialize_cuda_engine((self._dir / name).read_bytes())
        if engine is None:
            raise EngineMismatchError(
                f"{self._dir / name} does not load in {self._library.title} on this GPU"
                f"{self._messages.explanation()}; build it on this machine"
            )
        names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        if absent := sorted(set(self._weights) - names):
            raise EngineError(f"{self._dir / name} takes no weight {absent[0]!r}; build the engine again")
        return engine

    def _load_weights(self) -> tuple[dict[str, int], DeviceBuffer]:
        """Copy the matrices to the GPU, once, each at an address that TensorRT accepts."""
        places, end = {}, 0
        for name, (_, nbytes) in self.contract.weights.items():
            places[name] = end
            end += aligned(nbytes)
        buffer, stream = self.cuda.device_memory(end), self.cuda.stream()
        data = np.memmap(self._dir / WEIGHTS_FILE, np.uint8, "r")
        for name, (offset, nbytes) in self.contract.weights.items():
            for done in range(0, nbytes, _PIECE):
                piece = np.ascontiguousarray(data[offset + done : offset + min(done + _PIECE, nbytes)])
                stream.upload(buffer.address + places[name] + done, piece)
                stream.synchronize()  # the piece must not be freed before it is copied
        return {name: buffer.address + place for name, place in places.items()}, buffer


def bind(context: Any, name: str, address: int) -> None:
    """Give `context` the address of a tensor; raises EngineRunError where it refuses."""
    if address % ALIGNMENT or not context.set_tensor_address(name, address):
        raise EngineRunError(f"TensorRT does not take address {address:#x} for {name!r}; build the engine again")


def set_shape(context: Any, name: str, shape: tuple[int, ...]) -> None:
    """Give `context` the shape of an input; raises EngineRunError outside the engine's limits."""
    if not context.set_input_shape(name, tuple(shape)):
        raise EngineRunError(
            f"TensorRT does not take {name} of shape {tuple(shape)}: it is outside the engine's profile"
        )


def aligned(nbytes: int) -> int:
    """Return `nbytes` rounded up to the alignment of addresses."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
