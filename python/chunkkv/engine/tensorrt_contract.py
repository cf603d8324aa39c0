"""tensorrt.json: what a runtime must know of TensorRT engines, written by the builder and checked on loading."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from chunkkv.cache_layout import HEAD_CLASSES, CacheLayout, CachePart, Slots
from chunkkv.engine.fields import LARGEST_OFFSET, Fields
from chunkkv.engine.json_files import read_object
from chunkkv.errors import EngineError
from chunkkv.limits import RANGES

CONTRACT_FILE = "tensorrt.json"
PREFILL_FILE = "prefill.engine"
WEIGHTS_FILE = "weights.safetensors"
_COUNTS = (
    *("num_layers", "num_kv_heads", "head_dim", "vocab_size"),
    *("max_input_len", "prefill_rows", "group_layers"),
)
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def decode_file(capacity: Sequence[int]) -> str:
    """Return the name of the decode engine whose caches have `capacity` slots, one number for each length class."""
    return f"decode_{'x'.join(map(str, capacity))}.engine"


def block_file(capacity: Sequence[int]) -> str:
    """Return the name of the engine that appends blocks of tokens to caches of `capacity` slots."""
    return f"block_{'x'.join(map(str, capacity))}.engine"


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
    layout : CacheLayout
        The parts of every cache.
    leaders : tuple of int
        Parts of the cache whose choice is their own, ascending; empty without ChunkKV.
    scored : tuple of int
        Those of the leaders that choose by scores; the others keep sinks and recent tokens, all the same.
    heads_choose : bool
        Whether each KV head of a part that scores has its own choice.
    capacities : tuple of tuples of int
        Slots of the decode engines for each length class, ascending by size; a cache has one of these sizes.
    weights : dict
        Offset and size in bytes of every matrix in the weights file; all engines take them as inputs.
    block_tokens : int, default 0
        Tokens that a block engine appends at most to one row; 0 where the directory has no block engines.
    window : int, default 0
        The longest window of a request, in tokens; 0 where prefill takes no windows of requests.
    """

    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_input_len: int
    prefill_rows: int
    group_layers: int
    layout: CacheLayout
    leaders: tuple[int, ...]
    scored: tuple[int, ...]
    heads_choose: bool
    capacities: tuple[Slots, ...]
    weights: dict[str, tuple[int, int]]
    block_tokens: int = 0
    window: int = 0

    @property
    def item_bytes(self) -> int:
        """Bytes of one number of the cache."""
        return DTYPES[self.dtype].itemsize

    @property
    def choices(self) -> dict[int, int]:
        """For each leader the part whose choice the engine gives for it: its own, or the first of those alike."""
        recent = [part for part in self.leaders if part not in self.scored]
        return {part: part if part in self.scored else recent[0] for part in self.leaders}

    def row_bytes(self, capacity: int) -> int:
        """Bytes of one row of one layer's keys, or values, in all heads of a cache of `capacity` slots."""
        return self.num_kv_heads * self.head_bytes(capacity)

    def head_bytes(self, capacity: int) -> int:
        """Bytes of one row of one head's keys, or values, in a cache of `capacity` slots."""
        return capacity * self.head_dim * self.item_bytes

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
        layout = _layout(fields.section("layout"), counts["num_layers"], counts["num_kv_heads"])
        capacities = _capacities(fields, layout)
        return cls(
            **counts,
            dtype=fields.text("dtype", allowed=tuple(DTYPES)),
            layout=layout,
            leaders=fields.integers("leaders", high=len(layout.parts) - 1),
            scored=fields.integers("scored", high=len(layout.parts) - 1),
            heads_choose=fields.flag("heads_choose"),
            capacities=capacities,
            weights=_weights(fields.section("weights"), folder / WEIGHTS_FILE),
            block_tokens=fields.integer("block_tokens", low=0, high=min(map(min, capacities)), default=0),
            window=fields.integer("window", low=0, high=RANGES["window"][1], default=0),
        )


def _layout(fields: Fields, num_layers: int, num_kv_heads: int) -> CacheLayout:
    """Return the parts of a cache; raises EngineError unless they hold every head of every layer once."""
    fields.allow(("parts", "length_classes"))
    classes = fields.integer("length_classes")
    parts = []
    for part in fields.sections("parts"):
        part.allow(field.name for field in dataclasses.fields(CachePart))
        parts.append(
            CachePart(
                layer=part.integer("layer", low=0, high=num_layers - 1),
                head_class=part.text("head_class", allowed=HEAD_CLASSES),
                kv_heads=part.integers("kv_heads", high=num_kv_heads - 1),
                length_class=part.integer("length_class", low=0, high=classes - 1),
            )
        )
    held = sorted((part.layer, head) for part in parts for head in part.kv_heads)
    if held != [(layer, head) for layer in range(num_layers) for head in range(num_kv_heads)]:
        raise fields.error("parts", "every head of every layer must be in one part")
    return CacheLayout(tuple(parts), classes)


def _capacities(fields: Fields, layout: CacheLayout) -> tuple[Slots, ...]:
    """Return the slots of the decode engines; raises EngineError unless their caches grow from one to the next."""
    listed = fields.integer_lists("capacities", low=1)
    advice = f"give at least one list of {layout.length_classes} numbers, the smallest cache first"
    if not listed or any(len(slots) != layout.length_classes for slots in listed):
        raise fields.error("capacities", advice)
    sizes = [sum(heads * count for heads, count in zip(layout.heads, slots, strict=True)) for slots in listed]
    if sizes != sorted(set(sizes)):
        raise fields.error("capacities", advice)
    return listed


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
