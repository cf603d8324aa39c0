"""A context as a file: safetensors, whose metadata holds one JSON object that says what the tensors are.

The layout of the file follows from that object and from the engine, so a file is read only where its header is exactly
the one that would be written. Nothing in it is executed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from chunkkv.contexts.origin import Origin
from chunkkv.engine.fields import Fields
from chunkkv.errors import RequestError
from chunkkv.files import whole_file

FORMAT, FORMAT_VERSION = "chunkkv-context", 1
KEY = "chunkkv_context"  # of the metadata
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_CODES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.int8): "I8",
}
_AGAIN = "compress the prompt and save it again"
Layout = Mapping[str, tuple[np.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class SavedContext:
    """What the file says of the tensors.

    Parameters
    ----------
    engine_sha256 : str
        Digest of the engine's files.
    token_ids : numpy.ndarray
        Every token that the context stands for [L] int64.
    slots : tuple of int
        Filled slots, one number for each length class.
    origin : Origin
        What the context was made from.
    scorer : str
        What chose the tokens that stay.
    created_at : float
        When it was made, in seconds since 1970.
    """

    engine_sha256: str
    token_ids: np.ndarray
    slots: tuple[int, ...]
    origin: Origin
    scorer: str
    created_at: float

    def write(self, path: str | os.PathLike[str], layout: Layout, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the file, whole or not at all; `arrays` have the types and shapes that `layout` says."""
        digest = hashlib.sha256()
        for piece in _pieces(layout, arrays):
            digest.update(piece)
        header = _header(self._to_json(digest.hexdigest()), layout)
        with whole_file(path) as file:
            file.write(len(header).to_bytes(_LENGTH_BYTES, "little"))
            file.write(header)
            for piece in _pieces(layout, arrays):
                file.write(piece)

    @classmethod
    def read(cls, path: str | os.PathLike[str], engine_sha256: str, max_seq_len: int, vocab_size: int) -> SavedContext:
        """Read what a file says, checked against the engine; raises RequestError for what does not fit."""
        fields = Fields(_metadata(Path(path)), str(path), RequestError, _AGAIN)
        if fields.get("format") != FORMAT or fields.get("format_version") != FORMAT_VERSION:
            raise RequestError(
                f"{path} has format {fields.get('format')!r}, version {fields.get('format_version')!r}; this program "
                f"reads {FORMAT!r}, version {FORMAT_VERSION}: {_AGAIN}"
            )
        if not engine_sha256 or fields.text("engine_sha256") != engine_sha256:
            raise RequestError(f"{path} was made by another engine; compress the prompt again with this one")
        ids = fields.integers("token_ids", high=vocab_size - 1)
        if not 1 <= len(ids) <= max_seq_len:
            raise RequestError(f"{path}: token_ids has {len(ids)} tokens; this engine takes 1 to {max_seq_len}")
        slots = fields.integers("slots", low=1, high=len(ids))
        text, messages = fields.text("text", default=None), fields.get("messages")
        if messages is not None and (
            not isinstance(messages, list)
            or not messages
            or not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages)
        ):
            raise fields.error("messages", "give a list of messages with a role")
        origin = Origin(text, None if messages is None else tuple(messages))
        created = fields.number("created_at")
        return cls(engine_sha256, np.array(ids, np.int64), slots, origin, fields.text("scorer"), created)

    def arrays(self, path: str | os.PathLike[str], layout: Layout) -> dict[str, np.ndarray]:
        """Return the tensors as views of the mapped file; raises RequestError where one byte of it is not as written.

        `layout` is that of the engine for `slots`.
        """
        data = np.memmap(path, np.uint8, "r")
        length = int.from_bytes(data[:_LENGTH_BYTES].tobytes(), "little")
        start = _LENGTH_BYTES + length
        stated = Fields(_metadata(Path(path)), str(path), RequestError, _AGAIN).text("data_sha256")
        if data[_LENGTH_BYTES:start].tobytes() != _header(self._to_json(stated), layout):
            raise RequestError(f"{path} has other tensors than this engine's contexts: {_AGAIN}")
        sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in layout.items()}
        if data.size - start != sum(sizes.values()):
            raise RequestError(
                f"{path} holds {data.size - start} bytes of tensors; expected {sum(sizes.values())}: it was cut off or "
                f"changed, {_AGAIN}"
            )
        if hashlib.sha256(data[start:].data).hexdigest() != stated:
            raise RequestError(f"{path} was changed: its tensors do not have the sha256 that it says; {_AGAIN}")
        arrays = {}
        for name, (dtype, shape) in layout.items():
            arrays[name] = data[start : start + sizes[name]].view(dtype).reshape(shape)
            start += sizes[name]
        return arrays

    def _to_json(self, data_sha256: str) -> str:
        values = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "engine_sha256": self.engine_sha256,
            "data_sha256": data_sha256,
            "scorer": self.scorer,
            "created_at": self.created_at,
            "slots": list(self.slots),
            "text": self.origin.text,
            "messages": None if self.origin.messages is None else [dict(message) for message in self.origin.messages],
            "token_ids": self.token_ids.tolist(),
        }
        try:
            return json.dumps(values, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise RequestError(f"the messages of the context are no plain JSON values: {error}") from None


def _pieces(layout: Layout, arrays: Mapping[str, np.ndarray]) -> Iterator[memoryview]:
    """Return the bytes of the tensors in order, one tensor in memory at a time."""
    for name, (dtype, shape) in layout.items():
        array = np.ascontiguousarray(arrays[name])
        assert (array.dtype, array.shape) == (dtype, shape), name
        yield array.reshape(-1).view(np.uint8).data


def _header(metadata: str, layout: Layout) -> bytes:
    """Return the header of the file, padded so that the tensors begin at a multiple of eight bytes."""
    header: dict[str, Any] = {"__metadata__": {KEY: metadata}}
    place = 0
    for name, (dtype, shape) in layout.items():
        end = place + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    return text + b" " * (-len(text) % _LENGTH_BYTES)


def _metadata(path: Path) -> object:
    """Return the JSON object in the metadata of a safetensors file; reads no more than its header."""
    try:
        with path.open("rb") as file:
            room = os.fstat(file.fileno()).st_size - _LENGTH_BYTES
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if not 0 < length <= min(room, _MAX_HEADER_BYTES):
                raise RequestError(f"{path} is no saved context, or was cut off; {_AGAIN}")
            header = json.loads(file.read(length))
            return json.loads(header["__metadata__"][KEY])
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise RequestError(f"{path} is no saved context: its header has no {KEY}; {_AGAIN}") from None
