"""copy, zero, upload and release of the C ABI."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from chunkkv.native import NativeLibrary
from native.memory import Memory


def message(library: NativeLibrary) -> str:
    return library._lib.chunkkv_last_error().decode()


def copy(library: NativeLibrary, to: int | None, source: int | None, size: int) -> int:
    return library._lib.chunkkv_copy(ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(size), None)


@pytest.mark.parametrize("size", [1, 15, 16, 5000])
@pytest.mark.parametrize("misalign", [0, 3])
def test_copy_and_zero(library: NativeLibrary, memory: Memory, size: int, misalign: int) -> None:
    content = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    source, target = memory.put(content, misalign), memory.empty((size,), "uint8")
    assert copy(library, target.pointer, source.pointer, size) == 0
    assert memory.get(target).tobytes() == content.tobytes() == memory.get(source).tobytes()
    assert library._lib.chunkkv_zero(ctypes.c_void_p(target.pointer), ctypes.c_size_t(size - 1), None) == 0
    assert memory.get(target).tobytes() == bytes(size - 1) + content[-1:].tobytes()


def test_a_copy_onto_itself_is_fine_and_overlap_is_refused(library: NativeLibrary, memory: Memory) -> None:
    buffer = memory.put(np.arange(64, dtype=np.uint8))
    assert copy(library, buffer.pointer, buffer.pointer, 64) == 0
    assert copy(library, buffer.pointer + 32, buffer.pointer, 32) == 0
    for to, source in ((31, 0), (0, 31)):
        assert copy(library, buffer.pointer + to, buffer.pointer + source, 32) == 1
        assert message(library).startswith("chunkkv_copy: to 0x") and "overlap in 32 bytes" in message(library)


def test_missing_pointers_are_named(library: NativeLibrary, memory: Memory) -> None:
    buffer = memory.empty((4,), "uint8")
    assert copy(library, None, buffer.pointer, 4) == 1 and "chunkkv_copy: to is NULL" in message(library)
    assert copy(library, buffer.pointer, None, 4) == 1 and "from is NULL" in message(library)
    assert copy(library, None, None, 0) == 0
    assert library._lib.chunkkv_zero(None, ctypes.c_size_t(4), None) == 1
    assert "chunkkv_zero: to is NULL" in message(library)
    assert library._lib.chunkkv_zero(None, ctypes.c_size_t(0), None) == 0


def test_a_table_is_uploaded_and_released(library: NativeLibrary, memory: Memory) -> None:
    table, device = np.arange(1000, dtype=np.uint32), ctypes.c_void_p()
    size = ctypes.c_size_t(table.nbytes)
    upload, release = library._lib.chunkkv_upload, library._lib.chunkkv_release
    assert upload(ctypes.c_void_p(table.ctypes.data), size, ctypes.byref(device)) == 0
    assert device.value and device.value % 16 == 0
    back = memory.empty(table.shape, "uint32")
    table_bytes = table.tobytes()
    table[:] = 0  # the copy is the library's own
    assert copy(library, back.pointer, device.value, table.nbytes) == 0
    assert memory.get(back).tobytes() == table_bytes
    assert release(device) == 0
    assert release(None) == 0


def test_an_upload_that_cannot_be_leaves_null(library: NativeLibrary) -> None:
    table, upload = np.zeros(4, np.uint32), library._lib.chunkkv_upload
    for host, size in ((None, 16), (table.ctypes.data, 0)):
        device = ctypes.c_void_p(1)
        assert upload(ctypes.c_void_p(host), ctypes.c_size_t(size), ctypes.byref(device)) == 1
        assert device.value is None and message(library).startswith("chunkkv_upload: host is ")
    assert upload(ctypes.c_void_p(table.ctypes.data), ctypes.c_size_t(16), None) == 1
