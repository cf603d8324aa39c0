"""Reads one GGUF file: its header is checked strictly, its tensors are views of one memory map.

A GGUF file is a magic word, a version, two counts, metadata (named values of twelve types), a list of tensors, and the
tensors' data, each aligned. Everything is little endian.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chunkkv.engine.fields import shown
from chunkkv.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
MAX_ALIGNMENT = 2**20
_MAX_NAME_BYTES = 2**16
_DAMAGED = "the file is damaged: download or convert it again"
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SMALLEST_PAIR = 8 + 4 + 1  # bytes: an empty name, a type and the shortest value
_SMALLEST_TENSOR = 8 + 4 + 4 + 8  # an empty name, a scalar's shape, a type and an offset

Value = bool | int | float | str | list[bool] | list[int] | list[float] | list[str]


@dataclass(frozen=True)
class TensorType:
    """A type of tensors: its name in GGUF, and how many bytes a block of how many values takes."""

    name: str
    block: int
    block_bytes: int


# The types that are read, by their number in the file.
TYPES = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    30: TensorType("BF16", 1, 2),
}
# Names of types that are not read, for messages.
_OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies: its type, its shape, fastest axis last, and its bytes start to stop in the file."""

    type: TensorType
    shape: tuple[int, ...]
    start: int
    stop: int


class GgufFile:
    """One GGUF file, opened and mapped once; raises CheckpointError where it breaks the format.

    Attributes
    ----------
    path : Path
        The file.
    metadata : dict[str, Value]
        Its named values.
    entries : dict[str, GgufTensor]
        Its tensors, in file order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if path.stat().st_size < len(MAGIC):
                raise CheckpointError(f"{path} has {path.stat().st_size} bytes, less than any GGUF file: {_DAMAGED}")
            self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
        self.metadata, self.entries = _Header(self._bytes, str(path)).read()

    def data(self, name: str) -> np.ndarray:
        """Return the bytes of a tensor as a read-only view of the map: uint8 [rows, bytes of a row]."""
        entry = self.entries[name]
        rows = math.prod(entry.shape[:-1])
        return self._bytes[entry.start : entry.stop].reshape(rows, -1)


class _Header:
    """Walks through the header once; no count or length is believed before the file has room for it."""

    def __init__(self, data: np.ndarray, source: str) -> None:
        self._data, self._source = data.data, source
        self._size = len(self._data)
        self._place = 0

    def read(self) -> tuple[dict[str, Value], dict[str, GgufTensor]]:
        if bytes(self._take(4)) != MAGIC:
            raise CheckpointError(f"{self._source} does not begin with {MAGIC.decode()}: it is no GGUF file")
        version = self._number("<I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            kind = f"version {swapped} in big endian" if swapped in VERSIONS else f"version {version}"
            raise CheckpointError(
                f"{self._source} is GGUF {kind}; read are versions 2 and 3 in little endian: convert the model again "
                "with a recent llama.cpp"
            )
        tensors, pairs = self._number("<Q"), self._number("<Q")
        self._check_count("metadata values", pairs, _SMALLEST_PAIR)
        self._check_count("tensors", tensors, _SMALLEST_TENSOR)
        metadata: dict[str, Value] = {}
        for _ in range(pairs):
            name = self._name("metadata value")
            if name in metadata:
                raise CheckpointError(f"{self._source}: the metadata has {name!r} twice; {_DAMAGED}")
            metadata[name] = self._value(name, self._number("<I"))
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise CheckpointError(
                f"{self._source}: 'general.alignment' is {shown(alignment)}; expected a power of two: {_DAMAGED}"
            )
        return metadata, self._tensors(tensors, alignment)

    def _tensors(self, count: int, alignment: int) -> dict[str, GgufTensor]:
        listed: dict[str, tuple[TensorType, tuple[int, ...], int]] = {}
        for _ in range(count):
            name = self._name("tensor")
            if name in listed:
                raise CheckpointError(f"{self._source}: tensor {name!r} is listed twice; {_DAMAGED}")
            listed[name] = self._tensor(name)
        first = -(-self._place // alignment) * alignment
        entries: dict[str, GgufTensor] = {}
        end, before = first, ""
        for name, (kind, shape, offset) in sorted(listed.items(), key=lambda item: item[1][2]):
            start = first + offset
            stop = start + math.prod(shape) // kind.block * kind.block_bytes
            where = f"{self._source}: tensor {name!r}"
            if offset % alignment:
                raise CheckpointError(
                    f"{where} starts at byte {offset}, which is no multiple of {alignment}: {_DAMAGED}"
                )
            if start < end:
                raise CheckpointError(f"{where} overlaps tensor {before!r}: {_DAMAGED}")
            if stop > self._size:
                raise CheckpointError(
                    f"{where} ends at byte {stop}, but the file has only {self._size}: it is truncated, download it "
                    "again"
                )
            entries[name] = GgufTensor(kind, shape, start, stop)
            end, before = stop, name
        return entries

    def _tensor(self, name: str) -> tuple[TensorType, tuple[int, ...], int]:
        where = f"{self._source}: tensor {name!r}"
        dims = self._number("<I")
        if not 1 <= dims <= MAX_DIMS:
            raise CheckpointError(f"{where} has {dims} dimensions; expected 1 to {MAX_DIMS}: {_DAMAGED}")
        shape = tuple(self._number("<Q") for _ in range(dims))[::-1]  # the file has the fastest axis first
        code, offset = self._number("<I"), self._number("<Q")
        kind = TYPES.get(code)
        if kind is None:
            known = ", ".join(entry.name for entry in TYPES.values())
            raise CheckpointError(
                f"{where} has type {_OTHER_TYPES.get(code, code)}, which is not read; read are {known}: give a file "
                "quantised to one of those"
            )
        if 0 in shape or math.prod(shape) > 2**62:
            raise CheckpointError(f"{where} has shape {list(shape)}; {_DAMAGED}")
        if shape[-1] % kind.block:
            raise CheckpointError(
                f"{where} has rows of {shape[-1]} values, no multiple of the {kind.block} of a block of {kind.name}: "
                f"{_DAMAGED}"
            )
        return kind, shape, offset

    def _value(self, name: str, code: int) -> Value:
        if code == _STRING:
            return self._string(name)
        if code != _ARRAY:
            return self._scalars(name, code, 1)[0]
        code, count = self._number("<I"), self._number("<Q")
        if code == _STRING:
            self._check_count(f"strings in {name!r}", count, 8)
            return [self._string(name) for _ in range(count)]
        return self._scalars(name, code, count)

    def _scalars(self, name: str, code: int, count: int) -> list[bool] | list[int] | list[float]:
        if code == _BOOL:
            self._check_count(f"values in {name!r}", count, 1)
            return [byte != 0 for byte in self._take(count)]
        if code not in _SCALARS:
            raise CheckpointError(f"{self._source}: {name!r} has a value of the unknown type {code}; {_DAMAGED}")
        dtype = np.dtype(_SCALARS[code])
        self._check_count(f"values in {name!r}", count, dtype.itemsize)
        return np.frombuffer(self._take(count * dtype.itemsize), dtype).tolist()

    def _name(self, kind: str) -> str:
        start = self._place
        name = self._string(f"a {kind}'s name")
        if self._place - start > _MAX_NAME_BYTES:
            raise CheckpointError(f"{self._source}: a {kind} has a name of {len(name)} characters; {_DAMAGED}")
        return name

    def _string(self, name: str) -> str:
        length = self._number("<Q")
        try:
            return str(self._take(length), "utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{self._source}: {name!r} holds text that is no valid UTF-8; {_DAMAGED}") from None

    def _check_count(self, kind: str, count: int, size: int) -> None:
        if count > (self._size - self._place) // size:
            raise CheckpointError(
                f"{self._source} is said to have {count} {kind}, more than its {self._size} bytes have room for: it is "
                "truncated or damaged, download it again"
            )

    def _number(self, code: str) -> int:
        return int(struct.unpack(code, self._take(struct.calcsize(code)))[0])

    def _take(self, count: int) -> memoryview:
        if count > self._size - self._place:
            raise CheckpointError(
                f"{self._source} ends inside its header, at byte {self._size}: it is truncated or damaged, download it "
                "again"
            )
        self._place += count
        return self._data[self._place - count : self._place]
