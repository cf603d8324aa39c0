"""Arrays of other libraries, as their protocols describe them: torch, CuPy, DLPack, NumPy."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

from chunkkv.errors import NativeArgumentError
from chunkkv.native.arguments import stream_pointer
from chunkkv.native.arrays import RawArray, as_raw, dense_strides


def fake_torch(dtype: str, device: str) -> Any:
    return SimpleNamespace(
        data_ptr=lambda: 4096,
        dtype=f"torch.{dtype}",
        shape=(2, 3, 4),
        stride=lambda: (24, 4, 1),
        device=SimpleNamespace(type=device),
    )


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("bfloat16", 2), ("float8_e4m3fn", 1), ("int64", 8)])
def test_torch_tensors(dtype: str, item: int, device: str) -> None:
    wanted = RawArray(4096, dtype, (2, 3, 4), (24 * item, 4 * item, item), device == "cuda")
    assert as_raw(fake_torch(dtype, device)) == wanted
    with pytest.raises(NativeArgumentError, match="complex64"):
        as_raw(fake_torch("complex64", device))


def test_the_cuda_array_interface() -> None:
    interface = {"data": (8192, False), "typestr": "<f2", "shape": (5, 64), "strides": None, "version": 3}
    cupy = SimpleNamespace(__cuda_array_interface__=interface, dtype=np.dtype(np.float16))
    assert as_raw(cupy) == RawArray(8192, "float16", (5, 64), (128, 2), True)
    interface["strides"] = (256, 2)
    assert as_raw(cupy).strides == (256, 2) and not as_raw(cupy).is_dense


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int32", "uint32", ml_dtypes.bfloat16])
def test_numpy_arrays(dtype: Any) -> None:
    array = np.zeros((3, 8, 5), dtype)[:, ::2]
    assert as_raw(array) == RawArray(array.ctypes.data, array.dtype.name, (3, 4, 5), array.strides, False)


class OnlyDLPack:
    """Hides every protocol of an array but DLPack, and may claim to be on a device."""

    def __init__(self, array: np.ndarray[Any, Any], device: int = 1) -> None:
        self.array, self.device, self.streams = array, device, []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 0

    def __dlpack__(self, stream: int | None = None) -> Any:
        self.streams.append(stream)
        return self.array.__dlpack__()


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int32", "int64", "uint8", "uint32"])
def test_dlpack(dtype: str) -> None:
    array = np.zeros((4, 6, 8), dtype)[1:, ::3]
    assert as_raw(OnlyDLPack(array)) == RawArray(array.ctypes.data, dtype, array.shape, array.strides, False)


def test_dlpack_on_a_device_is_not_synchronised() -> None:
    array = OnlyDLPack(np.zeros(4, np.float32), device=2)
    assert as_raw(array).on_device is True
    assert array.streams == [-1]
    with pytest.raises(NativeArgumentError, match="DLPack type"):
        as_raw(OnlyDLPack(np.zeros(4, np.float64)))


def test_dense_arrays_are_recognised() -> None:
    assert dense_strides((2, 3, 4), 2) == (24, 8, 2)
    assert RawArray(0, "float16", (2, 1, 4), (8, 999, 2)).is_dense, "the stride of an axis of one element is free"
    assert RawArray(0, "float16", (0, 3), (7, 7)).is_dense
    assert not RawArray(0, "float16", (2, 3), (8, 2)).is_dense


def test_work_goes_to_the_current_stream_of_the_arrays() -> None:
    """None is torch's or CuPy's own stream, so that work on another stream is not overtaken."""
    streams = {"cuda:0": SimpleNamespace(cuda_stream=77), "cuda:1": SimpleNamespace(cuda_stream=78)}
    torch = SimpleNamespace(cuda=SimpleNamespace(current_stream=streams.__getitem__))
    cupy = SimpleNamespace(cuda=SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=99)))
    tensor = type("Tensor", (), {"__module__": "torch", "is_cuda": True, "device": "cuda:1"})()
    on_host = type("Tensor", (), {"__module__": "torch", "is_cuda": False, "device": "cpu"})()
    other = type("ndarray", (), {"__module__": "cupy.core"})()
    with mock.patch.dict(sys.modules, {"torch": torch, "cupy": cupy}):
        assert stream_pointer(None, [np.zeros(1), None, tensor, other]).value == 78
        assert stream_pointer(None, [on_host, other]).value == 99
        assert stream_pointer(None, [on_host, np.zeros(1)]).value in (0, None)
        assert stream_pointer(0, [tensor]).value in (0, None)
        assert stream_pointer(streams["cuda:0"], [tensor]).value == 77
