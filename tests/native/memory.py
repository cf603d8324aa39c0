"""Memory for the native tests: exactly sized, poisoned, guarded on both sides; on the host, or on the GPU by torch."""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from chunkkv.native.arrays import ITEM_BYTES, RawArray

GUARD_BYTES, GUARD, POISON = 256, 0xA5, 0xFF  # 0xFF...: NaN as a float, -1 as an integer
_ML_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float8_e4m3fn": ml_dtypes.float8_e4m3fn}
_LIBC = ctypes.CDLL(None)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy type of that name, bfloat16 and fp8 included."""
    return np.dtype(_ML_DTYPES.get(name, name))


class Memory:
    """Buffers that native ops work on; `release` raises where anything beside them was written."""

    def __init__(self, device: str) -> None:
        self.on_device = device == "cuda"
        # AddressSanitizer guards allocations itself, reads included, if they end where the array ends.
        self._guard = 0 if hasattr(_LIBC, "__asan_init") else GUARD_BYTES
        self._buffers: dict[int, tuple[Any, int, int]] = {}  # pointer: whole allocation, first byte, bytes

    def put(self, values: NDArray[Any], misalign: int = 0) -> RawArray:
        """Return a copy of `values`, 256-byte aligned, or `misalign` bytes behind that."""
        raw = self.empty(values.shape, values.dtype.name, misalign)
        self.write(raw, values)
        return raw

    def empty(self, shape: tuple[int, ...], dtype: str, misalign: int = 0) -> RawArray:
        """Return poisoned memory."""
        size = int(np.prod(shape, dtype=np.int64)) * ITEM_BYTES[dtype]
        first = self._guard + misalign
        whole, base = self._allocate(first + size + self._guard)
        whole[:] = GUARD
        whole[first : first + size] = POISON
        self._buffers[base + first] = whole, first, size
        return RawArray(base + first, dtype, shape, on_device=self.on_device)

    def write(self, raw: RawArray, values: NDArray[Any]) -> None:
        """Fill a buffer of this memory."""
        whole, first, size = self._buffers[raw.pointer]
        content = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        whole[first : first + size] = self._torch().from_numpy(content.copy()) if self.on_device else content

    def get(self, raw: RawArray) -> NDArray[Any]:
        """Return a copy of what a buffer holds now."""
        whole, first, size = self._buffers[raw.pointer]
        return self._host(whole[first : first + size]).view(numpy_dtype(raw.dtype)).reshape(raw.shape)

    def release(self) -> None:
        """Free all buffers; raises AssertionError where a byte in front of or behind one was written."""
        buffers, self._buffers = self._buffers, {}
        try:
            for whole, first, size in buffers.values():
                content = self._host(whole)
                assert (content[:first] == GUARD).all(), "bytes in front of a buffer were written"
                assert (content[first + size :] == GUARD).all(), "bytes behind a buffer were written"
        finally:
            if not self.on_device:
                for pointer, (_, first, _) in buffers.items():
                    _LIBC.free(ctypes.c_void_p(pointer - first))

    def _allocate(self, size: int) -> tuple[Any, int]:
        if self.on_device:
            torch = self._torch()
            whole = torch.empty(size, dtype=torch.uint8, device="cuda")
            return whole, whole.data_ptr()
        pointer = ctypes.c_void_p()
        status = _LIBC.posix_memalign(ctypes.byref(pointer), ctypes.c_size_t(256), ctypes.c_size_t(max(size, 1)))
        assert status == 0 and pointer.value
        content = (ctypes.c_uint8 * size).from_address(pointer.value)
        return (np.frombuffer(content, dtype=np.uint8) if size else np.empty(0, np.uint8)), pointer.value

    def _host(self, content: Any) -> NDArray[np.uint8]:
        return content.cpu().numpy() if self.on_device else content.copy()

    @staticmethod
    def _torch() -> Any:
        import torch

        return torch
