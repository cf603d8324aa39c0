"""Reads one safetensors file: its header is checked strictly, its tensors are views of one memory map."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from chunkkv.engine.fields import shown
from chunkkv.errors import CheckpointError

LENGTH_BYTES = 8
# Some 130,000 tensors, which are read in seconds. The format allows 100 MB, which no model of a supported family needs.
MAX_HEADER_BYTES = 16 * 2**20
MAX_DIMS = 8
READABLE = {"F32": ("float32", np.float32), "F16": ("float16", np.float16), "BF16": ("bfloat16", ml_dtypes.bfloat16)}
ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
    "C64": 64,
}  # fmt: skip
_DAMAGED = "the file is damaged: download or convert it again"


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: the format's dtype code, shape, and bytes start to stop of the data after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """One safetensors file, opened and mapped once; raises CheckpointError where it breaks the format."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            if size < LENGTH_BYTES:
                raise CheckpointError(f"{path} has {size} bytes, less than any safetensors file: {_DAMAGED}")
            self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
        length = header_length(self._bytes[:LENGTH_BYTES].tobytes(), self._bytes.size, str(path))
        self._data = LENGTH_BYTES + length
        header = self._bytes[LENGTH_BYTES : self._data].tobytes()
        self.entries = parse_header(header, self._bytes.size - self._data, str(path))

    def tensor(self, name: str) -> np.ndarray:
        """Return a read-only view of the tensor in the map; its dtype must be one of READABLE."""
        entry = self.entries[name]
        data = self._bytes[self._data + entry.start : self._data + entry.stop]
        return data.view(READABLE[entry.dtype][1]).reshape(entry.shape)


def header_length(prefix: bytes, file_size: int, source: str) -> int:
    """Return the header's length that the first eight bytes state; raises CheckpointError if it cannot be."""
    length = int.from_bytes(prefix, "little")
    room = file_size - LENGTH_BYTES
    if length > room:
        raise CheckpointError(
            f"{source}: the header is said to take {length} bytes; the file has room for {room}: it is truncated or no "
            "safetensors file, download or convert it again"
        )
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{source}: the header takes {length} bytes; at most {MAX_HEADER_BYTES} are read, far more than any "
            "supported model needs: save the model anew, with only its own tensors"
        )
    return length


def parse_header(header: bytes, data_size: int, source: str) -> dict[str, TensorEntry]:
    """Return the tensors that `header` lists for `data_size` bytes of data, in file order.

    Raises CheckpointError unless it is a JSON object of valid entries that cover the data exactly, without gap or
    overlap.
    """
    entries = {}
    for name, value in _load_object(header, source).items():
        if name == "__metadata__":
            if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
                raise CheckpointError(f"{source}: the header's __metadata__ must map strings to strings; {_DAMAGED}")
        else:
            entries[name] = _entry(name, value, source)
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    position = 0
    for name, entry in ordered.items():
        if entry.start != position:
            raise CheckpointError(
                f"{source}: tensor {name!r} starts at byte {entry.start} of the data; expected {position}, where the "
                f"tensor before it ends: {_DAMAGED}"
            )
        if entry.stop > data_size:
            raise CheckpointError(
                f"{source}: tensor {name!r} ends at byte {entry.stop} of the data, but the file has only {data_size}: "
                "it is truncated, download or convert it again"
            )
        position = entry.stop
    if position != data_size:
        raise CheckpointError(
            f"{source}: the tensors take {position} bytes, but {data_size} bytes follow the header: {_DAMAGED}"
        )
    return ordered


def _load_object(header: bytes, source: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise CheckpointError(f"{source}: the header lists {twice!r} twice; {_DAMAGED}")
        return values

    try:
        value = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(
            f"{source}: the header is no valid JSON ({error}): it is damaged or no safetensors file"
        ) from None
    if not isinstance(value, dict) or not header.startswith(b"{"):
        raise CheckpointError(f"{source}: the header is not a JSON object: it is damaged or no safetensors file")
    return value


def _entry(name: str, value: Any, source: str) -> TensorEntry:
    where = f"{source}: tensor {name!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: the header must give exactly dtype, shape and data_offsets; {_DAMAGED}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise CheckpointError(f"{where} has the unknown dtype {shown(dtype)}; expected one of {', '.join(READABLE)}")
    if not _whole_numbers(shape) or len(shape) > MAX_DIMS:
        raise CheckpointError(
            f"{where} has shape {shown(shape)}; expected at most {MAX_DIMS} whole numbers of at least 0"
        )
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has data_offsets {shown(offsets)}; expected a start and an end not before it")
    needed, odd_bits = divmod(math.prod(shape) * ITEM_BITS[dtype], 8)
    span = offsets[1] - offsets[0]
    if odd_bits or needed != span:
        raise CheckpointError(
            f"{where}: shape {shown(shape)} in {dtype} takes {needed} bytes, but its data_offsets span {span}: "
            f"{_DAMAGED}"
        )
    return TensorEntry(dtype, tuple(shape), offsets[0], offsets[1])


def _whole_numbers(values: Any) -> bool:
    # The bound keeps every product and message small; no file is larger than 2**63 bytes.
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 for value in values
    )
