"""tensorrt.json: what a runtime must know of TensorRT engines, written by the builder and checked on loading."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from chunkkv.engine.fields import LARGEST_OFFSET, Fields
from chunkkv.engine.json_files import read_object
from chunkkv.errors import EngineError

CONTRACT_FILE = "tensorrt.json"
PREFILL_FILE = "prefill.engine"
WEIGHTS_FILE = "weights.safetensors"
_COUNTS = (
    *("num_layers", "num_kv_heads", "head_dim", "vocab_size"),
    *("max_input_len", "prefill_rows", "group_layers"),
)
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def decode_file(capacity: int) -> str:
    """Return the name of the decode engine whose caches have `capacity` slots."""
    return f"decode_{capacity}.engine"


@dataclass(frozen=True)
class Contract:
    """What a runtime must know of the engines of one directory beyond the names of their inputs and outputs.

    Parameters
    ----------
    dtype : str
        Type of weights and KV cache, a key of DTYPES.
    num_layers, num_kv_heads, head_dim, vocab_size : int
        Sizes of the model.
    max_input_len : int
        Longest prompt in tokens.
    prefill_rows : int
        How many prompts are prefilled at once.
    group_layers : int
        Layers of the largest layer-reuse group, whose keys and values are alive together; 1 without ChunkKV.
    leaders : tuple of int
        Layers that score and select, ascending; empty without ChunkKV.
    capacities : tuple of int
        Slots of the decode engines, ascending; a cache has one of these sizes.
    weights : dict
        Offset and size in bytes of every matrix in the weights file; all engines take them as inputs.
    """

    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_input_len: int
    prefill_rows: int
    group_layers: int
    leaders: tuple[int, ...]
    capacities: tuple[int, ...]
    weights: dict[str, tuple[int, int]]

    @property
    def item_bytes(self) -> int:
        """Bytes of one number of the cache."""
        return DTYPES[self.dtype].itemsize

    def row_bytes(self, capacity: int) -> int:
        """Bytes of one row of one layer's keys, or values, in a cache of `capacity` slots."""
        return self.num_kv_heads * capacity * self.head_dim * self.item_bytes

    def write(self, folder: Path) -> None:
        """Write tensorrt.json to `folder`."""
        (folder / CONTRACT_FILE).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Contract:
        """Read tensorrt.json; raises EngineError for an entry that is missing, unknown or out of range."""
        path = folder / CONTRACT_FILE
        fields = Fields(read_object(path, EngineError), str(path), EngineError, "build the engine again")
        fields.allow(field.name for field in dataclasses.fields(cls))
        counts = {name: fields.integer(name) for name in _COUNTS}
        capacities = fields.integers("capacities", low=1)
        if not capacities or list(capacities) != sorted(set(capacities)):
            raise fields.error("capacities", "give at least one, ascending")
        return cls(
            **counts,
            dtype=fields.text("dtype", allowed=tuple(DTYPES)),
            leaders=fields.integers("leaders", high=counts["num_layers"] - 1),
            capacities=capacities,
            weights=_weights(fields.section("weights"), folder / WEIGHTS_FILE),
        )


def _weights(entries: Fields, file: Path) -> dict[str, tuple[int, int]]:
    """Return offset and size of every matrix; raises EngineError for one that lies outside of the weights file."""
    if not file.is_file():
        raise EngineError(f"{file} is missing; build the engine again")
    file_size = file.stat().st_size
    places = {}
    for name in entries.values:
        offset, nbytes = entries.integers(name, high=LARGEST_OFFSET, count=2)
        if offset + nbytes > file_size:
            raise entries.error(name, f"{WEIGHTS_FILE} has {file_size} bytes")
        places[name] = (offset, nbytes)
    return places
