"""The plugin host behind Python: drives a plugin library as TensorRT does, on arrays of a native.memory.Memory."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import POINTER, Structure, byref, c_char_p, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chunkkv.native import RawArray
from native.memory import Memory

TYPES = {"float32": 0, "float16": 1, "int8": 2, "int32": 3, "bool": 4, "float8_e4m3fn": 6, "bfloat16": 7, "int64": 8}
NAMES = {number: name for name, number in TYPES.items()}
INT32, CHAR = 5, 6  # PluginFieldType
MAX_RANK = 8


class Field(NamedTuple):
    """A plugin field: its PluginFieldType, its bytes (None: no data) and the length it claims, in elements."""

    name: str
    type: int
    data: bytes | None
    length: int


class HostError(Exception):
    """A step failed: which one, and what the plugin logged."""


class _PluginField(Structure):
    _fields_ = (("name", c_char_p), ("data", c_char_p), ("type", c_int32), ("length", c_int32))


class _Fields(Structure):
    _fields_ = (("count", c_int32), ("fields", POINTER(_PluginField)))


class _Tensor(Structure):
    _fields_ = (("type", c_int32), ("rank", c_int32), *((name, c_int64 * MAX_RANK) for name in ("min", "opt", "max")))


class _Buffer(Structure):
    _fields_ = (("type", c_int32), ("rank", c_int32), ("dims", c_int64 * MAX_RANK), ("data", c_void_p))


def int_field(name: str, value: int) -> Field:
    """Return what an ONNX INT attribute becomes."""
    return Field(name, INT32, np.int32(value).tobytes(), 1)


def text_field(name: str, value: str) -> Field:
    """Return what an ONNX STRING attribute becomes: the closing NUL counts."""
    return Field(name, CHAR, value.encode() + b"\0", len(value) + 1)


def ints_field(name: str, values: Any) -> Field:
    """Return what an array of 32-bit integers becomes."""
    array = np.asarray(values, np.int32)
    return Field(name, INT32, array.tobytes(), array.size)


def node_fields(attributes: Mapping[str, Any]) -> list[Field]:
    """Return the fields of a node: its attributes but for those by which the plugin is found."""
    made = []
    for name, value in attributes.items():
        if name not in ("plugin_version", "plugin_namespace"):
            make = text_field if isinstance(value, str) else int_field if np.ndim(value) == 0 else ints_field
            made.append(make(name, value))
    return made


class Range(NamedTuple):
    """A tensor of the network: its type, and its sizes at the profile's corners."""

    dtype: str
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


def _collection(fields: Sequence[Field]) -> _Fields:
    array = (_PluginField * max(len(fields), 1))()
    for entry, field in zip(array, fields, strict=False):
        entry.name, entry.data, entry.type, entry.length = field.name.encode(), field.data, field.type, field.length
    return _Fields(len(fields), array)


def _buffer(array: RawArray) -> _Buffer:
    dims = (c_int64 * MAX_RANK)(*array.shape)
    return _Buffer(TYPES[array.dtype], len(array.shape), dims, array.pointer)


def _buffers(arrays: Sequence[RawArray]) -> ctypes.Array[_Buffer]:
    return (_Buffer * len(arrays))(*map(_buffer, arrays))


class PluginHost:
    """A plugin library in the hands of the host built with the same headers; raises HostError where a step fails."""

    def __init__(self, host: Path, plugins: Path) -> None:
        self.lib = ctypes.CDLL(str(host))
        for name, result in (
            ("open", c_void_p),
            ("build", c_void_p),
            ("deserialise", c_void_p),
            ("attach", c_void_p),
            ("error", c_char_p),
            ("take_log", c_char_p),
            ("creators", c_char_p),
            ("built_workspace", c_size_t),
        ):
            getattr(self.lib, f"host_{name}").restype = result
        self.handle = c_void_p(self._checked(self.lib.host_open(str(plugins).encode())))

    def creators(self) -> list[str]:
        """Return one line per creator: its key and its fields with their types."""
        return self.lib.host_creators(self.handle).decode().splitlines()

    def take_log(self) -> list[str]:
        """Return and forget what was logged, each line after its severity."""
        return self.lib.host_take_log(self.handle).decode("ascii").splitlines()

    def build(self, key: str, fields: Sequence[Field], inputs: Sequence[Range]) -> Built:
        """Run the build phase of a node."""
        tensors = (_Tensor * len(inputs))()
        for tensor, given in zip(tensors, inputs, strict=True):
            tensor.type, tensor.rank = TYPES[given.dtype], len(given.max)
            tensor.min[:], tensor.opt[:], tensor.max[:] = (
                (*sizes, *[0] * (MAX_RANK - len(sizes))) for sizes in (given.min, given.opt, given.max)
            )
        collection = _collection(fields)
        built = self.lib.host_build(self.handle, key.encode(), byref(collection), tensors, c_int32(len(inputs)))
        return Built(self, key, c_void_p(self._checked(built)))

    def deserialise(self, key: str, fields: Sequence[Field]) -> Engine:
        """Return an engine's plugin, made of the fields."""
        collection = _collection(fields)
        engine = self.lib.host_deserialise(self.handle, key.encode(), byref(collection))
        return Engine(self, c_void_p(self._checked(engine)))

    def attach(self, key: str, fields: Sequence[Field]) -> Running:
        """Return the plugin of the one context of an engine of its own."""
        return self.deserialise(key, fields).attach()

    def create_bare(self, key: str) -> None:
        """Create the plugin without a collection of fields, once for building and once for running."""
        self._checked(self.lib.host_create_bare(self.handle, key.encode()))

    def fuzz(self, key: str, fields: Sequence[Field], seed: int, rounds: int) -> int:
        """Deserialise damaged copies of the fields; returns how many were accepted."""
        collection = _collection(fields)
        accepted = self.lib.host_fuzz(self.handle, key.encode(), byref(collection), c_uint32(seed), c_int32(rounds))
        return self._checked(accepted)

    def _checked(self, result: int | None) -> int:
        if result is None or result == -1:
            log = self.take_log() if hasattr(self, "handle") else []
            raise HostError("\n".join([self.lib.host_error().decode(), *log]))
        return result


class Built:
    """What the build phase leaves: an engine's bytes, a workspace size and shape expressions."""

    def __init__(self, host: PluginHost, key: str, handle: c_void_p) -> None:
        self._host, self.key, self._handle = host, key, handle
        self.workspace = int(host.lib.host_built_workspace(handle))
        stored = _Fields()
        host.lib.host_built_fields(handle, byref(stored))
        sizes = {INT32: 4, CHAR: 1}
        self.fields = [
            Field(
                field.name.decode(),
                field.type,
                ctypes.string_at(address, field.length * sizes[field.type]),
                field.length,
            )
            for field in stored.fields[: stored.count]
            for address in [ctypes.c_void_p.from_buffer(field, _PluginField.data.offset).value]
        ]

    def output_shapes(self, inputs: Sequence[RawArray]) -> list[tuple[str, tuple[int, ...]]]:
        """Return type and shape of every output for these inputs."""
        outputs = (_Buffer * self._host.lib.host_built_outputs(self._handle))()
        given = _buffers(inputs)
        self._host._checked(self._host.lib.host_built_shapes(self._handle, given, c_int32(len(given)), outputs))
        return [(NAMES[output.type], tuple(output.dims[: output.rank])) for output in outputs]

    def __del__(self) -> None:
        self._host.lib.host_built_free(self._handle)


class Engine:
    """A deserialised plugin, to which any number of contexts may attach."""

    def __init__(self, host: PluginHost, handle: c_void_p) -> None:
        self._host, self._handle = host, handle

    def attach(self) -> Running:
        """Return the plugin of a new execution context."""
        return Running(self._host, self, c_void_p(self._host._checked(self._host.lib.host_attach(self._handle))))

    def __del__(self) -> None:
        self._host.lib.host_engine_free(self._handle)


class Running:
    """The plugin of one execution context; it keeps the engine alive."""

    def __init__(self, host: PluginHost, engine: Engine, handle: c_void_p) -> None:
        self._host, self._engine, self._handle = host, engine, handle

    def run(self, inputs: Sequence[RawArray], outputs: Sequence[RawArray], workspace: RawArray | None) -> None:
        """onShapeChange, then enqueue on the default stream."""
        a, b = _buffers(inputs), _buffers(outputs)
        address = c_void_p(workspace.pointer if workspace else None)
        done = self._host.lib.host_run(self._handle, a, c_int32(len(a)), b, c_int32(len(b)), address, None)
        self._host._checked(done)

    def __del__(self) -> None:
        self._host.lib.host_running_free(self._handle)


def run_node(
    built: Built, running: Running, memory: Memory, values: Sequence[NDArray[Any]], workspace_bytes: int | None = None
) -> list[NDArray[Any]]:
    """Run a node on copies of `values` in `memory` and return its outputs."""
    inputs = [memory.put(value) for value in values]
    outputs = [memory.empty(shape, dtype) for dtype, shape in built.output_shapes(inputs)]
    size = built.workspace if workspace_bytes is None else workspace_bytes
    running.run(inputs, outputs, memory.empty((size,), "int8") if size else None)
    return [memory.get(output) for output in outputs]
