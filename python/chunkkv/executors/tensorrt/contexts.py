"""Execution contexts: the state of one engine while it runs, made differently by each TensorRT."""

from __future__ import annotations

from typing import Any, Protocol

from chunkkv.errors import EngineRunError
from chunkkv.executors.tensorrt.jit_cache import JitCache
from chunkkv.gpu.cuda_runtime import ALIGNMENT, CudaRuntime, DeviceBuffer, Stream
from chunkkv.gpu.tensorrt_errors import ErrorLog
from chunkkv.gpu.tensorrt_library import TensorRT


class EngineContext:
    """A tensorrt.IExecutionContext whose refusals are errors. One thread at a time.

    Parameters
    ----------
    context : tensorrt.IExecutionContext
        What runs.
    errors : ErrorLog
        Where its TensorRT explains failures.
    """

    def __init__(self, context: Any, errors: ErrorLog) -> None:
        if context is None:
            raise EngineRunError(f"TensorRT cannot make an execution context{errors.explanation()}")
        self._context, self._errors = context, errors

    def bind(self, name: str, address: int) -> None:
        """Set the address of a tensor; raises EngineRunError where TensorRT refuses it."""
        if address % ALIGNMENT or not self._context.set_tensor_address(name, address):
            raise EngineRunError(f"TensorRT does not take address {address:#x} for {name!r}; build the engine again")

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Set the shape of an input; raises EngineRunError outside the engine's limits."""
        if not self._context.set_input_shape(name, tuple(shape)):
            raise EngineRunError(
                f"TensorRT does not take {name} of shape {tuple(shape)}: it is outside the engine's profile"
            )

    def enqueue(self, stream: Stream) -> None:
        """Run the engine on `stream`, after what is enqueued there; raises EngineRunError where it cannot start."""
        if not self._context.execute_async_v3(stream.handle):
            raise EngineRunError(f"TensorRT could not run an engine{self._errors.explanation()}")

    def can_be_captured(self, stream: Stream) -> bool:
        """Return whether a run on `stream` may become part of a CUDA graph; call it with all shapes and addresses set.

        The standard TensorRT does not tell: there, capturing is tried.
        """
        return True


class ContextMaker(Protocol):
    """Makes contexts the way one TensorRT wants it."""

    def make(self, engine: Any, shapes_stay: bool = False, graph_inside: bool = False) -> EngineContext:
        """Return a new context of a tensorrt.ICudaEngine; raises EngineRunError where TensorRT cannot make one.

        Parameters
        ----------
        engine : tensorrt.ICudaEngine
            The engine.
        shapes_stay : bool, default False
            Whether the shapes that are set first stay for all runs, so that kernels may be compiled for them at once.
        graph_inside : bool, default False
            Whether TensorRT should capture and replay a CUDA graph of its own, where it can.
        """

    def keep_kernels(self) -> None:
        """Keep for the next process what was compiled so far."""


class StandardContexts:
    """Contexts of the standard TensorRT, which allocates their memory itself and has compiled everything before."""

    def __init__(self, errors: ErrorLog) -> None:
        self._errors = errors

    def make(self, engine: Any, shapes_stay: bool = False, graph_inside: bool = False) -> EngineContext:
        """Return a new context; `shapes_stay` and `graph_inside` make no difference."""
        return EngineContext(engine.create_execution_context(), self._errors)

    def keep_kernels(self) -> None:
        """Do nothing: the engine files hold all kernels."""


class RtxContexts:
    """Contexts of TensorRT for RTX, which compiles kernels when they are needed.

    The contexts work in memory that is allocated here. TensorRT for RTX could not run inside a CUDA graph otherwise:
    it would allocate while it runs.

    Parameters
    ----------
    trt : TensorRT
        The TensorRT for RTX in use.
    cuda : CudaRuntime
        Allocates the memory.
    errors : ErrorLog
        Where TensorRT explains failures.
    cache : JitCache
        The compiled kernels of all contexts.
    """

    def __init__(self, trt: TensorRT, cuda: CudaRuntime, errors: ErrorLog, cache: JitCache) -> None:
        self._trt, self._cuda, self._errors, self._cache = trt.module, cuda, errors, cache

    def make(self, engine: Any, shapes_stay: bool = False, graph_inside: bool = False) -> EngineContext:
        """Return a new context with memory of its own, for the largest shapes that the engine takes."""
        trt, config = self._trt, engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        # Lazily compiled kernels replace the general ones some runs later; a CUDA graph would keep the general ones.
        config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
            if shapes_stay
            else trt.DynamicShapesKernelSpecializationStrategy.LAZY
        )
        config.cuda_graph_strategy = (
            trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE if graph_inside else trt.CudaGraphStrategy.DISABLED
        )
        self._cache.attach(config)
        memory = self._cuda.device_memory(int(engine.device_memory_size_v2))
        return _RtxContext(engine.create_execution_context(config), self._errors, memory)

    def keep_kernels(self) -> None:
        """Write the compiled kernels to their file, where there are new ones."""
        self._cache.save()


class _RtxContext(EngineContext):
    """A context that works in `memory`, which lives as long as the context."""

    def __init__(self, context: Any, errors: ErrorLog, memory: DeviceBuffer) -> None:
        super().__init__(context, errors)
        self._memory = memory
        context.set_device_memory(memory.address, memory.nbytes)

    def can_be_captured(self, stream: Stream) -> bool:
        return bool(self._context.is_stream_capturable(stream.handle))
