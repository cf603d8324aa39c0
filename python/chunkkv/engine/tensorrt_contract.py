"""tensorrt.json: what the engines of one directory are, written by the builder and checked on loading."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from chunkkv.engine.json_files import read_object
from chunkkv.errors import EngineError

CONTRACT_FILE = "tensorrt.json"
PREFILL_FILE = "prefill.engine"
WEIGHTS_FILE = "weights.safetensors"
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def decode_file(capacity: int) -> str:
    """Return the name of the decode engine whose caches have `capacity` slots."""
    return f"decode_{capacity}.engine"


@dataclass(frozen=True)
class Contract:
    """The engines' inputs and outputs, as far as their names do not say them.

    `capacities` are the slots of the decode engines, ascending: a cache has one of these sizes. `prefill_rows` prompts
    of up to `max_input_len` tokens are prefilled at once. `group_layers` is the size of the largest layer-reuse group,
    whose keys and values are alive together, 1 without ChunkKV. `weights` gives offset and size in bytes of every
    matrix in the weights file; all engines take them as inputs of the same names.
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
        """Read tensorrt.json; raises EngineError where an entry is missing, foreign or makes no sense."""
        path = folder / CONTRACT_FILE
        values = read_object(path, EngineError)
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names:
            wrong = sorted(set(values) ^ names)[0]
            raise EngineError(f"{path}: entry {wrong!r} is missing or foreign; build the engine again")
        counts = [name for name in names if name not in ("dtype", "leaders", "capacities", "weights")]
        lists_fit = all(
            isinstance(values[name], list) and all(_is_count(entry, low) for entry in values[name])
            for name, low in (("leaders", 0), ("capacities", 1))
        )
        sensible = (
            values["dtype"] in DTYPES
            and all(_is_count(values[name], 1) for name in counts)
            and lists_fit
            and values["capacities"]
            and sorted(set(values["capacities"])) == values["capacities"]
            and all(leader < values["num_layers"] for leader in values["leaders"])
            and _weights_fit(values["weights"], folder / WEIGHTS_FILE)
        )
        if not sensible:
            raise EngineError(f"{path} makes no sense; build the engine again")
        values["weights"] = {name: tuple(place) for name, place in values["weights"].items()}
        return cls(**{**values, "leaders": tuple(values["leaders"]), "capacities": tuple(values["capacities"])})


def _is_count(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < 2**62


def _weights_fit(weights: Any, path: Path) -> bool:
    """Return whether every entry lies inside the weights file."""
    if not isinstance(weights, dict) or not path.is_file():
        return False
    size = path.stat().st_size
    return all(
        isinstance(place, list)
        and len(place) == 2
        and all(_is_count(number, 0) for number in place)
        and place[0] + place[1] <= size
        for place in weights.values()
    )
