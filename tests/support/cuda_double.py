"""cuda.bindings.runtime played by host memory, with streams that can be captured into graphs. A contract as read.

Copies are memmoves and "device" addresses are host addresses, so whatever runs on them can be NumPy. What is enqueued
on a stream runs when that stream is synchronized, not before: what is read too early is not there yet.
Its functions have the parameters of the real ones; tests/test_cuda_runtime.py compares them.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from chunkkv.gpu.cuda_runtime import ALIGNMENT

PAYLOAD = 0xFF  # fresh memory holds NaN in every type, so that nothing may depend on it


class cudaError_t(enum.IntEnum):
    """The errors that the double returns."""

    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100
    cudaErrorStreamCaptureUnsupported = 900


class cudaMemcpyKind(enum.IntEnum):
    """Directions of a copy, named as in the bindings."""

    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(enum.IntEnum):
    """What other threads may do while a stream is captured."""

    cudaStreamCaptureModeThreadLocal = 1


SUCCESS = cudaError_t.cudaSuccess
Action = Callable[[], None]


class CudartDouble:
    """Stands for the module; `devices` GPUs, capture refused where `capturable` is False."""

    cudaStreamNonBlocking = 1
    cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode = cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode

    def __init__(self, devices: int = 1, capturable: bool = True) -> None:
        self.devices, self.capturable = devices, capturable
        self.free = 1 << 30  # bytes that cudaMemGetInfo tells; a larger allocation fails
        self.memory: dict[int, Any] = {}  # of the device
        self.pinned: dict[int, Any] = {}  # of the host
        self.launches = 0
        self.gpu_name = b"NVIDIA Double"
        self.live_graphs: set[int] = set()
        self._last_error = SUCCESS
        self._handles = iter(range(1, 10**9))
        self._queues: dict[int, list[Action]] = {}
        self._recording: dict[int, list[Action]] = {}
        self._graphs: dict[int, list[Action]] = {}

    def enqueue(self, stream: int, action: Action) -> None:
        """Queue `action` on `stream`, or record it where the stream is being captured."""
        self._recording.get(stream, self._queues[stream]).append(action)

    def contains(self, address: int, nbytes: int) -> bool:
        """Return whether the range lies in one live allocation on the device."""
        return within(self.memory, address, nbytes)

    def _done(self, error: cudaError_t, *values: Any) -> tuple[Any, ...]:
        if error:
            self._last_error = error
            return (error, *(None for _ in values))
        return (error, *values)

    def cudaGetErrorName(self, error: cudaError_t) -> tuple[Any, ...]:
        return SUCCESS, error.name.encode()

    def cudaGetErrorString(self, error: cudaError_t) -> tuple[Any, ...]:
        return SUCCESS, f"text of {int(error)}".encode()

    def cudaGetLastError(self) -> tuple[Any, ...]:
        error, self._last_error = self._last_error, SUCCESS
        return (error,)

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return self._done(SUCCESS if self.devices else cudaError_t.cudaErrorNoDevice, self.devices)

    def cudaGetDevice(self) -> tuple[Any, ...]:
        return self._done(SUCCESS if self.devices else cudaError_t.cudaErrorNoDevice, 0)

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        properties = SimpleNamespace(name=self.gpu_name, major=8, minor=9, totalGlobalMem=2 << 30)
        return self._done(SUCCESS if device < self.devices else cudaError_t.cudaErrorInvalidValue, properties)

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return self._done(SUCCESS, self.free, 2 << 30)

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        return self._allocate(self.memory, size)

    def cudaMallocHost(self, size: int) -> tuple[Any, ...]:
        return self._allocate(self.pinned, size)

    def _allocate(self, table: dict[int, Any], size: int) -> tuple[Any, ...]:
        if size > 1 << 30:
            return self._done(cudaError_t.cudaErrorMemoryAllocation, None)
        block = (ctypes.c_ubyte * (size + ALIGNMENT))()
        address = -(-ctypes.addressof(block) // ALIGNMENT) * ALIGNMENT
        ctypes.memset(ctypes.addressof(block), PAYLOAD, size + ALIGNMENT)
        table[address] = (block, size)
        return self._done(SUCCESS, address)

    def cudaFree(self, devPtr: int) -> tuple[Any, ...]:
        return self._done(SUCCESS if self.memory.pop(devPtr, None) else cudaError_t.cudaErrorInvalidValue)

    def cudaFreeHost(self, ptr: int) -> tuple[Any, ...]:
        return self._done(SUCCESS if self.pinned.pop(ptr, None) else cudaError_t.cudaErrorInvalidValue)

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: cudaMemcpyKind, stream: int) -> tuple[Any, ...]:
        device, host = (dst, src) if kind is cudaMemcpyKind.cudaMemcpyHostToDevice else (src, dst)
        assert self.contains(device, count), "copy outside device memory"
        if stream in self._recording:
            assert within(self.pinned, host, count), "a captured copy needs pinned memory on its host side"
        self.enqueue(stream, lambda: ctypes.memmove(dst, src, count) and None)
        return self._done(SUCCESS)

    def cudaMemcpy2DAsync(
        self, dst: int, dpitch: int, src: int, spitch: int, width: int, height: int, kind: cudaMemcpyKind, stream: int
    ) -> tuple[Any, ...]:
        if width > dpitch or width > spitch:
            return self._done(cudaError_t.cudaErrorInvalidValue)
        if kind is not cudaMemcpyKind.cudaMemcpyHostToDevice:
            assert self.contains(src, spitch * (height - 1) + width), "copy from outside device memory"
        if kind is not cudaMemcpyKind.cudaMemcpyDeviceToHost:
            assert self.contains(dst, dpitch * (height - 1) + width), "copy to outside device memory"
        for row in range(height):
            places = dst + row * dpitch, src + row * spitch
            self.enqueue(stream, lambda places=places: ctypes.memmove(*places, width) and None)
        return self._done(SUCCESS)

    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: int) -> tuple[Any, ...]:
        assert self.contains(devPtr, count), "memory outside the device is set"
        self.enqueue(stream, lambda: ctypes.memset(devPtr, value, count) and None)
        return self._done(SUCCESS)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        handle = next(self._handles)
        self._queues[handle] = []
        return self._done(SUCCESS, handle)

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        return self._done(SUCCESS)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        if stream in self._recording:
            return self._done(cudaError_t.cudaErrorStreamCaptureUnsupported)
        while self._queues[stream]:
            self._queues[stream].pop(0)()
        return self._done(SUCCESS)

    def cudaStreamBeginCapture(self, stream: int, mode: cudaStreamCaptureMode) -> tuple[Any, ...]:
        if not self.capturable:
            return self._done(cudaError_t.cudaErrorStreamCaptureUnsupported)
        self._recording[stream] = []
        return self._done(SUCCESS)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        return self._done(SUCCESS, self._new_graph(self._recording.pop(stream)))

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:
        return self._done(SUCCESS, self._new_graph(self._graphs[graph]))

    def _new_graph(self, actions: list[Action]) -> int:
        handle = next(self._handles)
        self._graphs[handle] = actions
        self.live_graphs.add(handle)
        return handle

    def cudaGraphLaunch(self, graphExec: int, stream: int) -> tuple[Any, ...]:
        self.launches += 1
        self._queues[stream].extend(self._graphs[graphExec])
        return self._done(SUCCESS)

    def cudaGraphDestroy(self, graph: int) -> tuple[Any, ...]:
        self.live_graphs.remove(graph)
        return self._done(SUCCESS)

    def cudaGraphExecDestroy(self, graphExec: int) -> tuple[Any, ...]:
        return self.cudaGraphDestroy(graphExec)


def within(table: dict[int, Any], address: int, nbytes: int) -> bool:
    """Return whether the range lies in one allocation of `table`."""
    return any(start <= address and address + nbytes <= start + size for start, (_, size) in table.items())


def array_at(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return the memory at `address` as an array."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    memory = (ctypes.c_ubyte * nbytes).from_address(address)
    return np.frombuffer(memory, dtype).reshape(shape)
