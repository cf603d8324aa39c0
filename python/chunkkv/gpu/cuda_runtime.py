"""Device memory, streams and CUDA graphs for executors: a thin layer over NVIDIA's cuda.bindings.runtime.

DeviceBuffer owns device memory and PinnedArray owns pinned host memory; each frees it when it is deleted.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol, SupportsInt

import numpy as np
from numpy.typing import DTypeLike

from chunkkv.errors import BackendUnavailableError, EngineRunError

ALIGNMENT = 256  # bytes: TensorRT asks for it at every address that it is given
HOST_TO_DEVICE, DEVICE_TO_HOST = "cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost"
DEVICE_TO_DEVICE = "cudaMemcpyDeviceToDevice"
THREAD_LOCAL_CAPTURE = "cudaStreamCaptureModeThreadLocal"  # other threads may use CUDA meanwhile
_GIB = 1 << 30
_PACKAGE = "the Python package 'cuda-bindings' (pip install 'chunkkv-trt[tensorrt]' or 'chunkkv-trt[rtx]')"


_Done = tuple[int]  # the error of a function that returns nothing else


class DeviceProperties(Protocol):
    """The part of cudaDeviceProp that is used here."""

    @property
    def name(self) -> bytes:
        """Name of the GPU."""

    @property
    def major(self) -> int:
        """First number of its compute capability."""

    @property
    def minor(self) -> int:
        """Second number of its compute capability."""

    @property
    def totalGlobalMem(self) -> int:
        """Its memory in bytes."""


class RuntimeBindings(Protocol):
    """The part of cuda.bindings.runtime that is used here.

    Every function returns a tuple: the error, 0 for success, then what the C function writes through its pointers.
    Where a function takes an address or a handle (stream, graph, executable graph), an int will do.
    """

    cudaStreamNonBlocking: int
    cudaMemcpyKind: Any  # enum
    cudaStreamCaptureMode: Any  # enum

    cudaGetErrorName: Callable[[int], tuple[int, bytes]]
    cudaGetErrorString: Callable[[int], tuple[int, bytes]]
    cudaGetLastError: Callable[[], _Done]
    cudaGetDeviceCount: Callable[[], tuple[int, int]]
    cudaGetDevice: Callable[[], tuple[int, int]]
    cudaGetDeviceProperties: Callable[[int], tuple[int, DeviceProperties]]
    cudaMemGetInfo: Callable[[], tuple[int, int, int]]  # free, total
    cudaMalloc: Callable[[int], tuple[int, int]]
    cudaFree: Callable[[int], _Done]
    cudaMallocHost: Callable[[int], tuple[int, int]]
    cudaFreeHost: Callable[[int], _Done]
    cudaMemcpyAsync: Callable[[int, int, int, Any, int], _Done]  # target, source, bytes, kind, stream
    # target, its pitch, source, its pitch, bytes of a row, rows, kind, stream
    cudaMemcpy2DAsync: Callable[[int, int, int, int, int, int, Any, int], _Done]
    cudaMemsetAsync: Callable[[int, int, int, int], _Done]  # target, value of every byte, bytes, stream
    cudaStreamCreateWithFlags: Callable[[int], tuple[int, SupportsInt]]
    cudaStreamDestroy: Callable[[int], _Done]
    cudaStreamSynchronize: Callable[[int], _Done]
    cudaStreamBeginCapture: Callable[[int, Any], _Done]  # stream, mode
    cudaStreamEndCapture: Callable[[int], tuple[int, SupportsInt]]
    cudaGraphInstantiate: Callable[[int, int], tuple[int, SupportsInt]]  # graph, flags
    cudaGraphLaunch: Callable[[int, int], _Done]  # executable graph, stream
    cudaGraphExecDestroy: Callable[[int], _Done]
    cudaGraphDestroy: Callable[[int], _Done]


@dataclass(frozen=True)
class Gpu:
    """What a GPU is.

    Parameters
    ----------
    name : str
        NVIDIA's name for it.
    compute_capability : str
        For example "8.9".
    memory_bytes : int
        Its memory, used or not.
    """

    name: str
    compute_capability: str
    memory_bytes: int

    @property
    def description(self) -> str:
        """All of it, for people."""
        return f"{self.name}, compute capability {self.compute_capability}, {self.memory_bytes / _GIB:.1f} GiB"


class CudaRuntime:
    """The CUDA runtime of this process, on the current GPU. Thread safe.

    Every function that CUDA refuses raises EngineRunError with the name and the text of the CUDA error.
    """

    def __init__(self, bindings: RuntimeBindings) -> None:
        self.bindings = bindings

    @staticmethod
    @cache
    def load() -> CudaRuntime:
        """Return the CUDA runtime; raises BackendUnavailableError where the package cuda-bindings is missing."""
        try:
            from cuda.bindings import runtime
        except ModuleNotFoundError:
            raise BackendUnavailableError(f"{_PACKAGE}, which is not installed") from None
        except ImportError as error:
            raise BackendUnavailableError(f"{_PACKAGE}, which cannot be loaded ({error})") from None
        return CudaRuntime(runtime)

    def call(self, function: Callable[..., tuple[Any, ...]], *arguments: Any) -> tuple[Any, ...]:
        """Call a function of the bindings and return what follows the error in its result."""
        error, *values = function(*arguments)
        if error != 0:
            name = self.bindings.cudaGetErrorName(error)[1].decode()
            text = self.bindings.cudaGetErrorString(error)[1].decode()
            self.bindings.cudaGetLastError()  # resets it: otherwise the next user of it blames a later call
            raise EngineRunError(f"{function.__name__} failed with {name}: {text}")
        return tuple(values)

    def device_count(self) -> int:
        """Return the number of usable GPUs; 0 where there is no driver, or one too old for the CUDA runtime."""
        return 0 if self.why_no_device() else int(self.call(self.bindings.cudaGetDeviceCount)[0])

    def why_no_device(self) -> str | None:
        """Return None where a GPU can be used, else the reason in CUDA's words."""
        try:
            (count,) = self.call(self.bindings.cudaGetDeviceCount)
        except EngineRunError as error:
            return str(error)
        return None if count > 0 else "cudaGetDeviceCount counts none"

    def gpu(self, number: int | None = None) -> Gpu:
        """Return what GPU `number` is, a number below device_count(); None means the current one."""
        if number is None:
            (number,) = self.call(self.bindings.cudaGetDevice)
        (properties,) = self.call(self.bindings.cudaGetDeviceProperties, number)
        capability = f"{properties.major}.{properties.minor}"
        return Gpu(bytes(properties.name).rstrip(b"\0").decode(), capability, int(properties.totalGlobalMem))

    def free_memory(self) -> tuple[int, int]:
        """Return free and total bytes of the current GPU."""
        free, total = self.call(self.bindings.cudaMemGetInfo)
        return int(free), int(total)

    def device_memory(self, nbytes: int) -> DeviceBuffer:
        """Allocate `nbytes` on the GPU; the contents are undefined."""
        (address,) = self.call(self.bindings.cudaMalloc, max(nbytes, 1))
        return DeviceBuffer(self, int(address), nbytes)

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> PinnedArray:
        """Allocate a zeroed NumPy array in pinned host memory, which copies inside a CUDA graph need."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        (address,) = self.call(self.bindings.cudaMallocHost, max(nbytes, 1))
        return PinnedArray(self, int(address), nbytes, shape, dtype)

    def stream(self) -> Stream:
        """Return a new stream that does not wait for the default stream."""
        (handle,) = self.call(self.bindings.cudaStreamCreateWithFlags, self.bindings.cudaStreamNonBlocking)
        return Stream(self, int(handle))

    def free_with(self, owner: object, function: Callable[..., tuple[Any, ...]], handle: int) -> None:
        """Call `function`, which frees `handle`, when `owner` is deleted."""
        weakref.finalize(owner, self._call_quietly, function, handle)

    def _call_quietly(self, function: Callable[..., tuple[Any, ...]], handle: int) -> None:
        with contextlib.suppress(EngineRunError):  # the driver may be gone when the interpreter ends
            self.call(function, handle)


class Pitched(NamedTuple):
    """Pieces of memory that lie `pitch` bytes apart, the first at `address`."""

    address: int
    pitch: int


class Stream:
    """A CUDA stream with what is enqueued on it; `handle` is its cudaStream_t as int."""

    def __init__(self, cuda: CudaRuntime, handle: int) -> None:
        self._cuda, self.handle = cuda, handle
        cuda.free_with(self, cuda.bindings.cudaStreamDestroy, handle)

    def upload(self, target: int, array: np.ndarray) -> None:
        """Copy a contiguous host array to the device address `target`; the array must live until synchronize()."""
        self._copy(target, array.ctypes.data, array, HOST_TO_DEVICE)

    def download(self, array: np.ndarray, source: int) -> None:
        """Copy from the device address `source` into a contiguous host array, complete after synchronize()."""
        self._copy(array.ctypes.data, source, array, DEVICE_TO_HOST)

    def _copy(self, target: int, source: int, array: np.ndarray, kind: str) -> None:
        assert array.flags.c_contiguous
        bindings = self._cuda.bindings
        direction = getattr(bindings.cudaMemcpyKind, kind)
        self._cuda.call(bindings.cudaMemcpyAsync, target, source, array.nbytes, direction, self.handle)

    def copy_rows(self, target: Pitched, source: Pitched, width: int, rows: int, kind: str) -> None:
        """Copy `rows` pieces of `width` bytes from one place to another; `kind` is one of the directions above."""
        bindings = self._cuda.bindings
        places = target.address, target.pitch, source.address, source.pitch
        direction = getattr(bindings.cudaMemcpyKind, kind)
        self._cuda.call(bindings.cudaMemcpy2DAsync, *places, width, rows, direction, self.handle)

    def clear(self, address: int, nbytes: int) -> None:
        """Set `nbytes` bytes on the GPU to zero."""
        self._cuda.call(self._cuda.bindings.cudaMemsetAsync, address, 0, nbytes, self.handle)

    def synchronize(self) -> None:
        """Wait for everything enqueued so far."""
        self._cuda.call(self._cuda.bindings.cudaStreamSynchronize, self.handle)

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        """Return what `enqueue` enqueues on this stream as a CUDA graph; nothing runs meanwhile."""
        cuda, bindings = self._cuda, self._cuda.bindings
        mode = getattr(bindings.cudaStreamCaptureMode, THREAD_LOCAL_CAPTURE)
        cuda.call(bindings.cudaStreamBeginCapture, self.handle, mode)
        try:
            enqueue()
        except BaseException:
            with contextlib.suppress(EngineRunError):  # what failed may have ended the capture
                cuda.call(bindings.cudaGraphDestroy, self._end_capture())
            raise
        graph = self._end_capture()
        try:
            (executable,) = cuda.call(bindings.cudaGraphInstantiate, graph, 0)
        finally:
            cuda.call(bindings.cudaGraphDestroy, graph)
        return Graph(cuda, int(executable))

    def _end_capture(self) -> int:
        (graph,) = self._cuda.call(self._cuda.bindings.cudaStreamEndCapture, self.handle)
        return int(graph)


class Graph:
    """A captured sequence of copies and kernels; shapes and addresses are frozen in it."""

    def __init__(self, cuda: CudaRuntime, handle: int) -> None:
        self._cuda, self._handle = cuda, handle
        cuda.free_with(self, cuda.bindings.cudaGraphExecDestroy, handle)

    def launch(self, stream: Stream) -> None:
        """Enqueue the whole graph."""
        self._cuda.call(self._cuda.bindings.cudaGraphLaunch, self._handle, stream.handle)


class DeviceBuffer:
    """Device memory at `address`, freed with this object."""

    def __init__(self, cuda: CudaRuntime, address: int, nbytes: int) -> None:
        self.address, self.nbytes = address, nbytes
        cuda.free_with(self, cuda.bindings.cudaFree, address)


class PinnedArray:
    """A NumPy array in pinned host memory, which is freed with the last view of it."""

    def __init__(self, cuda: CudaRuntime, address: int, nbytes: int, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        memory = (ctypes.c_byte * nbytes).from_address(address)
        self.array: np.ndarray = np.frombuffer(memoryview(memory), dtype=dtype).reshape(shape)
        self.array[...] = 0
        cuda.free_with(memory, cuda.bindings.cudaFreeHost, address)  # every view keeps `memory` alive, not this object


def gpu_capabilities() -> list[str]:
    """Return the compute capability of every GPU of this machine, none where CUDA has no GPU or cannot be asked."""
    try:
        cuda = CudaRuntime.load()
        return [] if cuda.why_no_device() else [cuda.gpu(n).compute_capability for n in range(cuda.device_count())]
    except (BackendUnavailableError, EngineRunError):
        return []
