"""Loads the TensorRT engines of one directory and runs them: weights lie once on the GPU, bound to every engine."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np

from chunkkv.cache_layout import Slots
from chunkkv.engine.tensorrt_build import PLUGIN, RTX, TensorRTBuild
from chunkkv.engine.tensorrt_contract import WEIGHTS_FILE, Contract
from chunkkv.errors import BackendUnavailableError, EngineError, EngineMismatchError
from chunkkv.executors.tensorrt.cache import DeviceKVCache
from chunkkv.executors.tensorrt.contexts import ContextMaker, EngineContext, RtxContexts, StandardContexts
from chunkkv.executors.tensorrt.jit_cache import JitCache, jit_cache_path
from chunkkv.gpu.cuda_runtime import ALIGNMENT, CudaRuntime, DeviceBuffer
from chunkkv.gpu.tensorrt_errors import ErrorLog, start
from chunkkv.gpu.tensorrt_library import TensorRT, missing_gpu, tensorrt_of_engine
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
        if lacking := missing_gpu():
            raise BackendUnavailableError(f"{engine_dir} was built with {trt.title} and needs {'; and '.join(lacking)}")
        self.cuda = CudaRuntime.load()
        self._errors = ErrorLog()
        self._logger = self._errors.logger(trt.module)
        self._runtime = start(trt, trt.module.Runtime, self._logger, self._errors)
        if built_with.chunkkv_ops == PLUGIN:
            load_plugins(trt, trt.module.get_plugin_registry(), self._errors)
        self._contexts, self._decoded = self._context_maker(trt), set[tuple[int, Slots]]()
        self._weights, self._weights_buffer = self._load_weights()

    def _context_maker(self, trt: TensorRT) -> ContextMaker:
        if trt.flavour != RTX:
            return StandardContexts(self._errors)
        cache = JitCache(jit_cache_path(self._dir, trt.version, self.cuda.gpu()))
        # At the end of the process, or of the last user of these engines, too: contexts compile in the background.
        weakref.finalize(self, cache.save)
        return RtxContexts(trt, self.cuda, self._errors, cache)

    def new_context(self, engine: Any, shapes_stay: bool = False, graph_inside: bool = False) -> EngineContext:
        """Return an execution context with the weights bound; see ContextMaker.make for the parameters."""
        context = self._contexts.make(engine, shapes_stay, graph_inside)
        for name, address in self._weights.items():
            context.bind(name, address)
        return context

    def first_step_done(self, rows: int, capacity: Slots) -> None:
        """Keep what the first decode step over `rows` rows of `capacity` slots compiled, for the next process."""
        if (rows, capacity) not in self._decoded:
            self._decoded.add((rows, capacity))
            self._contexts.keep_kernels()

    def load(self, name: str) -> Any:
        """Deserialise the engine file `name`; raises EngineMismatchError for one that does not load on this GPU."""
        self._errors.errors.clear()
        engine = self._runtime.deserialize_cuda_engine((self._dir / name).read_bytes())
        if engine is None:
            raise EngineMismatchError(
                f"{self._dir / name} does not load in {self._library.title} on this GPU"
                f"{self._errors.explanation()}; build it on this machine"
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


def bind_cache(context: EngineContext, contract: Contract, cache: DeviceKVCache, engine: Any = None) -> None:
    """Bind past and present to the same memory, as an engine's cache update wants it.

    Raises EngineMismatchError where `engine`, if it is given, does not update its caches in place.
    """
    for kind, addresses in (("key", cache.keys), ("value", cache.values)):
        for number, (part, address) in enumerate(zip(contract.layout.parts, addresses, strict=True)):
            shape = (cache.row_count, len(part.kv_heads), cache.capacity[part.length_class], contract.head_dim)
            past, present = f"past_{kind}.{number}", f"present_{kind}.{number}"
            if engine is not None and (alias := engine.get_aliased_input_tensor(present)) != past:
                raise EngineMismatchError(
                    f"{present} shares memory with {alias!r}, expected {past!r}: this TensorRT does not update "
                    "caches in place; build the engine with 10.15 or later"
                )
            context.set_shape(past, shape)
            context.bind(past, address)
            context.bind(present, address)


def aligned(nbytes: int) -> int:
    """Return `nbytes` rounded up to the alignment of addresses."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
