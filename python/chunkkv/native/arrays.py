"""Arrays of any library as pointer, type, shape and strides: torch, CuPy, NumPy, DLPack, or a raw pointer.

Nothing is copied, and no array library is imported. The caller owns the memory and keeps it alive until the stream has
finished the work.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Protocol

from chunkkv.errors import NativeArgumentError

ITEM_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int8": 1,
    "float8_e4m3fn": 1,
    "int32": 4,
    "uint32": 4,
    "int64": 8,
    "uint8": 1,
}
_TYPE_STRINGS = {"<f4": "float32", "<f2": "float16", "|i1": "int8", "|u1": "uint8", "<i4": "int32", "<u4": "uint32"}
_TYPE_STRINGS |= {"<i8": "int64"}
_DLPACK_TYPES = {(2, 32): "float32", (2, 16): "float16", (4, 16): "bfloat16", (10, 8): "float8_e4m3fn"}
_DLPACK_TYPES |= {(0, 8): "int8", (0, 32): "int32", (0, 64): "int64", (1, 8): "uint8", (1, 32): "uint32"}
_DLPACK_CUDA = (2, 3, 13)  # device, host memory pinned by CUDA, managed


@dataclass(frozen=True)
class RawArray:
    """An array given by its address.

    Parameters
    ----------
    pointer : int
        Address of the first element.
    dtype : str
        A key of ITEM_BYTES, such as "float16".
    shape : tuple of int
        Sizes of the axes.
    strides : tuple of int, default None
        Bytes from one entry of each axis to the next. None: dense, row-major.
    on_device : bool, default None
        Whether the memory is on the GPU (or host memory that the GPU can read). None: not known, not checked.
    """

    pointer: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    on_device: bool | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise NativeArgumentError(f"dtype is {self.dtype!r}; allowed are {', '.join(ITEM_BYTES)}")
        if self.strides is None:
            object.__setattr__(self, "strides", dense_strides(self.shape, ITEM_BYTES[self.dtype]))

    @property
    def is_dense(self) -> bool:
        """Whether the elements lie back to back in row-major order."""
        dense = dense_strides(self.shape, ITEM_BYTES[self.dtype])
        assert self.strides is not None
        axes = zip(self.shape, self.strides, dense, strict=True)
        return 0 in self.shape or all(size == 1 or stride == expected for size, stride, expected in axes)


class SupportsDLPack(Protocol):
    """An array that describes its memory by DLPack: NumPy's, torch's, CuPy's, JAX's."""

    def __dlpack__(self, *, stream: int | None = None) -> Any: ...

    def __dlpack_device__(self) -> tuple[Any, Any]: ...


class SupportsCudaArrayInterface(Protocol):
    """An array that describes its memory by the CUDA array interface: Numba's, CuPy's."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


Array = RawArray | SupportsDLPack | SupportsCudaArrayInterface


def dense_strides(shape: tuple[int, ...], item_bytes: int) -> tuple[int, ...]:
    """Return the byte strides of a row-major array."""
    strides: list[int] = []
    for size in reversed(shape):
        strides.insert(0, item_bytes)
        item_bytes *= size
    return tuple(strides)


def as_raw(array: Array) -> RawArray:
    """Return address, type, shape and strides of `array`.

    Raises NativeArgumentError for an object that is no array, or whose type is no key of ITEM_BYTES.
    """
    if isinstance(array, RawArray):
        return array
    if hasattr(array, "data_ptr"):
        return _from_torch(array)
    if hasattr(array, "__cuda_array_interface__"):
        return _from_interface(array.__cuda_array_interface__, on_device=True, name=str(getattr(array, "dtype", "")))
    if hasattr(array, "__array_interface__"):
        return _from_interface(array.__array_interface__, on_device=False, name=str(getattr(array, "dtype", "")))
    if hasattr(array, "__dlpack__"):
        return _from_dlpack(array)
    raise NativeArgumentError(
        f"{type(array).__name__} is not an array; pass a torch, CuPy, NumPy or DLPack array, or a RawArray"
    )


def expect(array: Array, name: str, dtype: str | None, shape: tuple[int | None, ...]) -> RawArray:
    """Return a dense array as as_raw() does, if it has this type (None: any) and shape (None: any size).

    Raises NativeArgumentError, which calls the array `name`, where it has not.
    """
    raw = as_raw(array)
    fits = len(raw.shape) == len(shape) and all(
        allowed is None or size == allowed for size, allowed in zip(raw.shape, shape, strict=True)
    )
    if (dtype is not None and raw.dtype != dtype) or not fits or not raw.is_dense:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise NativeArgumentError(
            f"{name} is {raw.dtype} {list(raw.shape)} with strides {raw.strides} bytes; "
            f"pass {dtype or 'an array'} [{sizes}], dense and row-major"
        )
    return raw


def _from_torch(tensor: Any) -> RawArray:
    dtype = str(tensor.dtype).removeprefix("torch.")
    item = ITEM_BYTES.get(dtype, 0)
    strides = tuple(stride * item for stride in tensor.stride())
    return RawArray(tensor.data_ptr(), dtype, tuple(tensor.shape), strides, tensor.device.type == "cuda")


def _from_interface(interface: dict[str, Any], *, on_device: bool, name: str) -> RawArray:
    """Read the (CUDA) array interface; `name` is the type where the interface cannot spell it (bfloat16, fp8)."""
    dtype = _TYPE_STRINGS.get(interface["typestr"], name)
    strides = interface.get("strides")
    return RawArray(interface["data"][0], dtype, tuple(interface["shape"]), strides, on_device)


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("type_code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def _from_dlpack(array: Any) -> RawArray:
    """Read an unversioned DLPack capsule; its deleter runs when the capsule goes, since nobody consumes it."""
    on_device = array.__dlpack_device__()[0] in _DLPACK_CUDA
    # -1: the producer must not synchronise; ordering on streams is the caller's, as for every other kind of array.
    capsule = array.__dlpack__(stream=-1) if on_device else array.__dlpack__()
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    tensor = _DLTensor.from_address(get_pointer(capsule, b"dltensor"))
    kind = (tensor.type_code, tensor.bits)
    if kind not in _DLPACK_TYPES or tensor.lanes != 1:
        raise NativeArgumentError(f"DLPack type {kind} is not supported; allowed are {', '.join(ITEM_BYTES)}")
    dtype = _DLPACK_TYPES[kind]
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(stride * ITEM_BYTES[dtype] for stride in tensor.strides[: tensor.ndim]) if tensor.strides else None
    return RawArray((tensor.data or 0) + tensor.byte_offset, dtype, shape, strides, on_device)
