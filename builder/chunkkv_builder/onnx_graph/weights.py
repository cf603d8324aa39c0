"""The one weights file of an engine: written tensor by tensor, and shared by all its graphs.

It is a safetensors file, so any tool can read it. Graphs refer to it by offset (ONNX external data).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes  # noqa: F401 - makes NumPy know "bfloat16"
import numpy as np

from chunkkv.errors import ConfigError

SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8", "int8": "I8"}


@dataclass(frozen=True)
class WeightLocation:
    """Where one tensor lies.

    Parameters
    ----------
    name : str
        Name of the tensor.
    file : str
        Name of the file, relative to the graph's folder.
    offset : int
        Byte offset from the start of the file.
    shape : tuple of int
        Its shape.
    dtype : str
        Name of its NumPy type.
    """

    name: str
    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class WeightSource:
    """One tensor that is to be stored.

    Parameters
    ----------
    name : str
        Its name in the file.
    shape : tuple of int
        Its shape in the file.
    dtype : str
        Its NumPy type in the file, a key of SAFETENSORS_DTYPES.
    load : callable
        Returns the tensor, when its turn comes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], np.ndarray]


def write_weights(
    path: Path, sources: Iterable[WeightSource], advance: Callable[[int], None] = lambda n: None
) -> dict[str, WeightLocation]:
    """Write a safetensors file and return where each tensor lies; only one tensor is in memory at a time.

    Parameters
    ----------
    path : Path
        The file.
    sources : iterable of WeightSource
        The tensors, in the order of the file.
    advance : callable, default nothing
        Called with 1 after each tensor.
    """
    ordered = list(sources)
    entries: dict[str, dict[str, object]] = {}
    offsets: dict[str, int] = {}  # in the data behind the header
    position = 0
    for source in ordered:
        size = int(np.prod(source.shape, dtype=np.int64)) * np.dtype(source.dtype).itemsize
        if size % 4:
            raise ConfigError(f"{source.name} takes {size} bytes; tensors must take a multiple of 4 to stay aligned")
        entries[source.name] = {
            "dtype": SAFETENSORS_DTYPES[source.dtype],
            "shape": list(source.shape),
            "data_offsets": [position, position + size],
        }
        offsets[source.name] = position
        position += size
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % 64)
    start = 8 + len(header)
    locations: dict[str, WeightLocation] = {}
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for source in ordered:
            offset = start + offsets[source.name]
            locations[source.name] = WeightLocation(source.name, path.name, offset, source.shape, source.dtype)
            file.write(_bytes(source))
            advance(1)
    return locations


def overwrite_weights(
    path: Path,
    locations: Mapping[str, WeightLocation],
    sources: Iterable[WeightSource],
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Write tensors to the places of a weights file that they have already.

    Parameters
    ----------
    path : Path
        The file.
    locations : mapping
        What write_weights returned for it.
    sources : iterable of WeightSource
        The tensors, by name among those of the file, with the same shapes and types.
    advance : callable, default nothing
        Called with 1 after each tensor.
    """
    with path.open("r+b") as file:
        for source in sources:
            file.seek(locations[source.name].offset)
            file.write(_bytes(source))
            advance(1)


def _bytes(source: WeightSource) -> memoryview:
    """Return the content of a tensor as bytes, because bfloat16 is no type that NumPy shares with other libraries."""
    array = source.load()
    if array.shape != source.shape or array.dtype != np.dtype(source.dtype):
        raise AssertionError(f"{source.name}: planned {source.shape} {source.dtype}, got {array.shape} {array.dtype}")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
