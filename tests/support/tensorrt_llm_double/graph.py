"""What a recorded network is: typed tensors, constants, and nodes in the order they were added; and its bytes."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

MAGIC = b"tensorrt_llm double engine\n"
_ML_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float8_e4m3fn": ml_dtypes.float8_e4m3fn}


def numpy_dtype(name: str) -> np.dtype:
    """Return the NumPy type of that name, bfloat16 and fp8 included."""
    return np.dtype(_ML_DTYPES.get(name, name))


@dataclass
class Value:
    """One tensor of the network; -1 stands for a size that is known at run time only."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass
class Node:
    """One layer: what it does, on what, and every setting it was given."""

    name: str
    op: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]

    @property
    def plugin(self) -> str | None:
        """The creator's name where this is a version 3 plugin."""
        return self.attributes["plugin"] if self.op == "plugin_v3" else None

    def fields(self) -> dict[str, Any]:
        """Return the plugin's fields: texts as str, arrays of one number as int, longer ones as lists."""
        return {name: field_value(*rest) for name, *rest in self.attributes["fields"]}


def field_value(kind: int, length: int, content: str) -> Any:
    """Return what a plugin field holds: a str for CHAR, an int or a list of them for INT32."""
    data = bytes.fromhex(content)
    if kind == 6:
        return data.rstrip(b"\0").decode()
    values = np.frombuffer(data, {5: np.int32, 1: np.float32, 10: np.int64}[kind]).tolist()
    assert len(values) == length
    return values[0] if length == 1 else values


@dataclass
class Graph:
    """A whole network of one rank."""

    values: dict[str, Value] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)

    def of(self, op: str) -> list[Node]:
        """Return the nodes of one kind, or the plugins of one name, in order."""
        return [node for node in self.nodes if op in (node.op, node.plugin)]

    def producer(self, name: str) -> Node | None:
        """Return the node that writes a tensor; None for inputs and constants."""
        return next((node for node in self.nodes if name in node.outputs), None)

    def widened(self) -> Graph:
        """Return the network with float32 wherever this one has float16, its cache included: no rounding is left."""
        made = copy.deepcopy(self)
        for value in made.values.values():
            value.dtype = "float32" if value.dtype == "float16" else value.dtype
        for name, array in made.constants.items():
            made.constants[name] = array.astype(np.float32) if array.dtype == np.float16 else array
        for node in made.of("plugin_v3"):
            for entry in node.attributes["fields"]:
                if entry[0] == "kv_bytes" and field_value(*entry[1:]) == 2:
                    entry[3] = np.int32(4).tobytes().hex()
        return made

    def to_bytes(self) -> bytes:
        """Return the network as bytes."""
        return MAGIC + pickle.dumps(self)

    @classmethod
    def from_bytes(cls, content: bytes) -> Graph:
        """Return the network that to_bytes wrote."""
        assert content.startswith(MAGIC)
        return pickle.loads(content[len(MAGIC) :])
