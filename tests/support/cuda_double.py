"""libcudart played by host memory: what CudaRuntime calls, with streams that can be captured into graphs.

Copies are memmoves and "device" addresses are host addresses, so whatever runs on them can be NumPy. What is enqueued
on a stream runs when that stream is synchronized, not before: what is read too early is not there yet.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from chunkkv.gpu.cuda_runtime import ALIGNMENT, FUNCTIONS

NO_DEVICE, INVALID, NOT_CAPTURABLE = 100, 1, 900
PAYLOAD = 0xFF  # fresh memory holds NaN in every type, so that nothing may depend on it


class _Function:
    """A callable that takes argtypes and restype like a ctypes function, and counts its calls."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.argtypes: Any = None
        self.restype: Any = None
        self._run = run

    def __call__(self, *arguments: Any) -> Any:
        assert self.argtypes is not None and len(arguments) == len(self.argtypes)
        return self._run(*arguments)


class CudartDouble:
    """Stands for the ctypes library; `devices` GPUs, capture refused where `capturable` is False."""

    def __init__(self, devices: int = 1, capturable: bool = True) -> None:
        self.devices, self.capturable = devices, capturable
        self.free = 1 << 30  # bytes that cudaMemGetInfo tells
        self.memory: dict[int, Any] = {}  # of the device
        self.pinned: dict[int, Any] = {}  # of the host
        self._queues: dict[int, list[Callable[[], None]]] = {}
        self.calls: list[str] = []
        self.launches = 0
        self._handles = iter(range(1, 10**9))
        self._recording: dict[int, list[Callable[[], None]]] = {}
        self._graphs: dict[int, list[Callable[[], None]]] = {}
        self.live_graphs: set[int] = set()
        for name in FUNCTIONS:
            setattr(self, name, _Function(self._counted(name)))
        self.cudaGetErrorString = _Function(lambda code: f"text of {code}".encode())

    def _counted(self, name: str) -> Callable[..., int]:
        run = getattr(self, "_" + name)

        def call(*arguments: Any) -> int:
            self.calls.append(name)
            return run(*arguments) or 0

        return call

    def enqueue(self, stream: int, action: Callable[[], None]) -> None:
        """Queue `action` on `stream`, or record it where the stream is being captured."""
        self._recording.get(stream, self._queues[stream]).append(action)

    def _cudaGetDeviceCount(self, out: Any) -> int:
        out._obj.value = self.devices
        return 0 if self.devices else NO_DEVICE

    def _cudaMalloc(self, out: Any, nbytes: int) -> None:
        self._allocate(self.memory, out, nbytes)

    def _cudaMallocHost(self, out: Any, nbytes: int) -> None:
        self._allocate(self.pinned, out, nbytes)

    def _allocate(self, table: dict[int, Any], out: Any, nbytes: int) -> None:
        block = (ctypes.c_ubyte * (nbytes + ALIGNMENT))()
        address = -(-ctypes.addressof(block) // ALIGNMENT) * ALIGNMENT
        ctypes.memset(ctypes.addressof(block), PAYLOAD, nbytes + ALIGNMENT)
        table[address] = (block, nbytes)
        out._obj.value = address

    def _cudaFree(self, address: int) -> int:
        return 0 if self.memory.pop(address, None) else INVALID

    def _cudaFreeHost(self, address: int) -> int:
        return 0 if self.pinned.pop(address, None) else INVALID

    def _cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: int, stream: int) -> None:
        device, host = (target, source) if kind == 1 else (source, target)
        assert self.contains(device, nbytes), "copy outside device memory"
        if stream in self._recording:
            assert within(self.pinned, host, nbytes), "a captured copy needs pinned memory on its host side"
        self.enqueue(stream, lambda: ctypes.memmove(target, source, nbytes))

    def contains(self, address: int, nbytes: int) -> bool:
        """Return whether the range lies in one live allocation on the device."""
        return within(self.memory, address, nbytes)

    def _cudaMemGetInfo(self, free: Any, total: Any) -> None:
        free._obj.value, total._obj.value = self.free, 2 << 30

    def _cudaStreamCreateWithFlags(self, out: Any, flags: int) -> None:
        out._obj.value = next(self._handles)
        self._queues[out._obj.value] = []

    def _cudaStreamDestroy(self, stream: int) -> None:
        pass

    def _cudaStreamSynchronize(self, stream: int) -> int:
        if stream in self._recording:
            return NOT_CAPTURABLE
        while self._queues[stream]:
            self._queues[stream].pop(0)()
        return 0

    def _cudaStreamBeginCapture(self, stream: int, mode: int) -> int:
        if not self.capturable:
            return NOT_CAPTURABLE
        self._recording[stream] = []
        return 0

    def _cudaStreamEndCapture(self, stream: int, out: Any) -> None:
        out._obj.value = handle = next(self._handles)
        self._graphs[handle] = self._recording.pop(stream)
        self.live_graphs.add(handle)

    def _cudaGraphInstantiateWithFlags(self, out: Any, graph: int, flags: int) -> None:
        out._obj.value = handle = next(self._handles)
        self._graphs[handle] = self._graphs[graph]
        self.live_graphs.add(handle)

    def _cudaGraphLaunch(self, graph: int, stream: int) -> None:
        self.launches += 1
        self._queues[stream].extend(self._graphs[graph])

    def _cudaGraphDestroy(self, graph: int) -> None:
        self.live_graphs.remove(graph)

    _cudaGraphExecDestroy = _cudaGraphDestroy

    def _cudaGetLastError(self) -> None:
        pass


def within(table: dict[int, Any], address: int, nbytes: int) -> bool:
    """Return whether the range lies in one allocation of `table`."""
    return any(start <= address and address + nbytes <= start + size for start, (_, size) in table.items())


def array_at(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return the memory at `address` as an array."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    memory = (ctypes.c_ubyte * nbytes).from_address(address)
    return np.frombuffer(memory, dtype).reshape(shape)
