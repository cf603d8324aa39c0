"""The few calls of the CUDA runtime that an executor needs, through ctypes: memory, streams, graphs.

No Python package is needed beside the libcudart that comes with TensorRT or CUDA. Device memory is owned by
DeviceBuffer, pinned host memory by PinnedArray; both free themselves.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import sys
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from chunkkv.errors import BackendUnavailableError, EngineRunError

ALIGNMENT = 256  # what TensorRT asks of every address it is given
_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2
_NON_BLOCKING, _THREAD_LOCAL_CAPTURE = 1, 1
_MAJORS = (13, 12)
_POINTER, _SIZE, _INT, _OUT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p)
FUNCTIONS = {
    "cudaGetDeviceCount": (ctypes.POINTER(_INT),),
    "cudaMalloc": (_OUT, _SIZE),
    "cudaFree": (_POINTER,),
    "cudaMallocHost": (_OUT, _SIZE),
    "cudaFreeHost": (_POINTER,),
    "cudaMemcpyAsync": (_POINTER, _POINTER, _SIZE, _INT, _POINTER),
    "cudaMemGetInfo": (ctypes.POINTER(_SIZE), ctypes.POINTER(_SIZE)),
    "cudaStreamCreateWithFlags": (_OUT, ctypes.c_uint),
    "cudaStreamDestroy": (_POINTER,),
    "cudaStreamSynchronize": (_POINTER,),
    "cudaStreamBeginCapture": (_POINTER, _INT),
    "cudaStreamEndCapture": (_POINTER, _OUT),
    "cudaGraphInstantiateWithFlags": (_OUT, _POINTER, ctypes.c_ulonglong),
    "cudaGraphLaunch": (_POINTER, _POINTER),
    "cudaGraphExecDestroy": (_POINTER,),
    "cudaGraphDestroy": (_POINTER,),
    "cudaGetLastError": (),
}


class CudaRuntime:
    """A loaded libcudart; every failing call raises EngineRunError with CUDA's own words. Thread safe."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name, arguments in FUNCTIONS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, _INT
        library.cudaGetErrorString.argtypes, library.cudaGetErrorString.restype = (_INT,), ctypes.c_char_p

    @staticmethod
    @cache
    def load() -> CudaRuntime:
        """Return the CUDA runtime of this process; raises BackendUnavailableError where there is none."""
        for name in _candidates():
            with contextlib.suppress(OSError, AttributeError):
                return CudaRuntime(ctypes.CDLL(name))
        raise BackendUnavailableError(
            f"the CUDA runtime libcudart.so.{' or .'.join(map(str, _MAJORS))}, which was not found"
        )

    def call(self, name: str, *arguments: Any) -> None:
        """Call the CUDA function `name`."""
        code = getattr(self._library, name)(*arguments)
        if code:
            text = (self._library.cudaGetErrorString(code) or b"unknown error").decode()
            self._library.cudaGetLastError()  # a failed call must not be blamed on a later one
            raise EngineRunError(f"{name} failed with CUDA error {code}: {text}")

    def device_count(self) -> int:
        """Return the number of usable GPUs, 0 where there is no driver."""
        count = _INT(0)
        try:
            self.call("cudaGetDeviceCount", ctypes.byref(count))
        except EngineRunError:
            return 0
        return count.value

    def free_memory(self) -> tuple[int, int]:
        """Return free and total bytes of the current GPU."""
        free, total = _SIZE(0), _SIZE(0)
        self.call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def _new(self, name: str, *arguments: Any) -> int:
        made = _POINTER()
        self.call(name, ctypes.byref(made), *arguments)
        return made.value or 0

    def end_capture(self, stream: int) -> int:
        """End the capture on `stream` and return its graph, which the caller destroys."""
        made = _POINTER()
        self.call("cudaStreamEndCapture", stream, ctypes.byref(made))
        return made.value or 0

    def device_memory(self, nbytes: int) -> DeviceBuffer:
        """Allocate `nbytes` on the GPU; contents are undefined."""
        return DeviceBuffer(self, self._new("cudaMalloc", max(nbytes, 1)), nbytes)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> PinnedArray:
        """Allocate a zeroed NumPy array in pinned host memory, which copies inside a CUDA graph need."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        return PinnedArray(self, self._new("cudaMallocHost", max(nbytes, 1)), nbytes, shape, dtype)

    def stream(self) -> Stream:
        """Return a new stream that does not wait for the default stream."""
        return Stream(self, self._new("cudaStreamCreateWithFlags", _NON_BLOCKING))


class Stream:
    """A CUDA stream with what is enqueued on it."""

    def __init__(self, cuda: CudaRuntime, handle: int) -> None:
        self._cuda, self.handle = cuda, handle
        weakref.finalize(self, _quietly, cuda, "cudaStreamDestroy", handle)

    def upload(self, target: int, array: np.ndarray) -> None:
        """Copy a contiguous host array to the device address `target`; the array must live until synchronize()."""
        assert array.flags.c_contiguous
        self._cuda.call("cudaMemcpyAsync", target, array.ctypes.data, array.nbytes, _HOST_TO_DEVICE, self.handle)

    def download(self, array: np.ndarray, source: int) -> None:
        """Copy from the device address `source` into a contiguous host array, complete after synchronize()."""
        assert array.flags.c_contiguous
        self._cuda.call("cudaMemcpyAsync", array.ctypes.data, source, array.nbytes, _DEVICE_TO_HOST, self.handle)

    def synchronize(self) -> None:
        """Wait for everything enqueued so far."""
        self._cuda.call("cudaStreamSynchronize", self.handle)

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        """Return what `enqueue` enqueues on this stream as a CUDA graph; nothing runs meanwhile."""
        self._cuda.call("cudaStreamBeginCapture", self.handle, _THREAD_LOCAL_CAPTURE)
        try:
            enqueue()
        except BaseException:
            with contextlib.suppress(EngineRunError):  # the capture is already invalid
                self._cuda.call("cudaGraphDestroy", self._cuda.end_capture(self.handle))
            raise
        graph = self._cuda.end_capture(self.handle)
        try:
            made = _POINTER()
            self._cuda.call("cudaGraphInstantiateWithFlags", ctypes.byref(made), graph, 0)
        finally:
            self._cuda.call("cudaGraphDestroy", graph)
        return Graph(self._cuda, made.value or 0)


class Graph:
    """A captured sequence of copies and kernels; shapes and addresses are frozen in it."""

    def __init__(self, cuda: CudaRuntime, handle: int) -> None:
        self._cuda, self._handle = cuda, handle
        weakref.finalize(self, _quietly, cuda, "cudaGraphExecDestroy", handle)

    def launch(self, stream: Stream) -> None:
        """Enqueue the whole graph."""
        self._cuda.call("cudaGraphLaunch", self._handle, stream.handle)


class DeviceBuffer:
    """Device memory, freed with this object."""

    def __init__(self, cuda: CudaRuntime, address: int, nbytes: int) -> None:
        self.address, self.nbytes = address, nbytes
        weakref.finalize(self, _quietly, cuda, "cudaFree", address)


class PinnedArray:
    """A NumPy array in pinned host memory, which is freed with the last view of it."""

    def __init__(self, cuda: CudaRuntime, address: int, nbytes: int, shape: tuple[int, ...], dtype: Any) -> None:
        memory = (ctypes.c_byte * nbytes).from_address(address)
        self.array: np.ndarray = np.frombuffer(memory, dtype=dtype).reshape(shape)
        self.array[...] = 0
        weakref.finalize(memory, _quietly, cuda, "cudaFreeHost", address)


def _quietly(cuda: CudaRuntime, name: str, handle: int) -> None:
    with contextlib.suppress(EngineRunError):  # the driver may be gone when the interpreter ends
        cuda.call(name, handle)


def _candidates() -> list[str]:
    """Return where libcudart may be: the loader's own path, then the wheels in site-packages."""
    names = [f"libcudart.so.{major}" for major in _MAJORS]
    wheels = [
        found
        for entry in sys.path
        for name in names
        for found in sorted(glob.glob(str(Path(entry or ".") / "nvidia" / "*" / "lib" / name)))
    ]
    return names + wheels
