"""TensorRT plugins driven by the plugin host: the op callable like chunkkv.reference, and any node on any arrays."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkkv.cache_layout import ALL_HEADS
from chunkkv.native.arrays import RawArray, as_raw
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.onnx_graph import functions
from native.build import emulated_library
from native.memory import Memory, numpy_dtype
from native.plugin_build import host_library, plugin_library
from native.plugin_host import Built, Field, PluginHost, Range, Running, node_fields, run_node
from native.tensorrt_headers import Headers, own_headers

FLAVOUR = "asan" if hasattr(ctypes.CDLL(None), "__asan_init") else "plain"
SELECT, COMPACT = (f"{functions.PLUGIN_NAMESPACE}::{name}:1" for name in (functions.SELECT, functions.COMPACT))

# What a ChunkKVSelect node may leave out, and an engine stores.
DEFAULTS = {
    **{"max_kept": 0, "window_reduce": "mean", "head_reduce": "mean", "value_norm": "off", "heads": "shared"},
    **{"request_window": 0, "head_class": "all", "all_heads": 0, "all_reading_heads": 0},
    "reading_share_per_10k": 10_000,
}

# Tensors that TensorRT-LLM binds to host memory, by the plugin that reads them.
HOST_INPUTS = {"ChunkKVPrepare": (2, 3, 4, 5), "ChunkKVScore": (3, 4), "ChunkKVCompress": (5, 6, 8, 9)}


def open_host(headers: Headers | None = None) -> PluginHost:
    """Return the one host of this process for these headers (None: the project's own)."""
    return _open_host(headers or own_headers(11))


def plugins_of(headers: Headers) -> Path:
    """Return the plugin library that the host for these headers drives."""
    return plugin_library(Path(os.environ.get("CHUNKKV_LIB") or emulated_library()), headers, FLAVOUR)


@functools.cache  # a library keeps its first logger, as it would in TensorRT
def _open_host(headers: Headers) -> PluginHost:
    return PluginHost(host_library(headers, FLAVOUR), plugins_of(headers))


class PluginNode:
    """One node of a network, from its fields through the build phase and the engine's bytes; call run per step.

    `fields` holds ints, strings and integer arrays, or lists fields as TensorRT passes them. Without `memory`
    arrays are passed by their own addresses, which needs emulated kernels; with it, inputs are copied there, but
    for the host inputs. Built anew where an input exceeds all before it.
    """

    def __init__(
        self,
        name: str,
        fields: Mapping[str, Any] | Sequence[Field],
        *,
        host: PluginHost | None = None,
        memory: Memory | None = None,
    ) -> None:
        self.host, self.memory = host or open_host(), memory
        self.key = f"{functions.PLUGIN_NAMESPACE}::{name}:1"
        self._fields = node_fields(fields) if isinstance(fields, Mapping) else list(fields)
        self._host_inputs = HOST_INPUTS.get(name, ())
        self._most: list[tuple[int, ...]] = []
        self._scratch = np.empty(0, np.uint8)
        self.built: Built
        self.running: Running

    def run(self, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Return the outputs for these inputs; raises HostError with what the plugin logged where a step fails."""
        arrays = [np.ascontiguousarray(value).reshape(np.shape(value)) for value in inputs]
        self._fit(arrays)
        if self.memory is None:
            given = [as_raw(array) for array in arrays]
            made = [np.empty(shape, numpy_dtype(dtype)) for dtype, shape in self.built.output_shapes(given)]
            self.running.run(given, [as_raw(array) for array in made], self._workspace())
            return made
        places = enumerate(arrays)
        given = [as_raw(array) if i in self._host_inputs else self.memory.put(array) for i, array in places]
        outputs = [self.memory.empty(shape, dtype) for dtype, shape in self.built.output_shapes(given)]
        size = self.built.workspace
        self.running.run(given, outputs, self.memory.empty((size,), "int8") if size else None)
        return [self.memory.get(output) for output in outputs]

    def _fit(self, arrays: Sequence[NDArray[Any]]) -> None:
        shapes = [array.shape for array in arrays]
        known = self._most or shapes
        if [len(shape) for shape in known] == [len(shape) for shape in shapes]:
            most = [tuple(map(max, a, b)) for a, b in zip(known, shapes, strict=True)]
        else:
            most = shapes
        if most == self._most:
            return
        ranges = [
            Range(array.dtype.name, (0,) * array.ndim, array.shape, sizes)
            for array, sizes in zip(arrays, most, strict=True)
        ]
        self.built = self.host.build(self.key, self._fields, ranges)
        self.running = self.host.attach(self.key, self.built.fields)
        self._most = most

    def _workspace(self) -> RawArray | None:
        size = self.built.workspace
        if size == 0:
            return None
        if len(self._scratch) < size + 256:
            self._scratch = np.empty(size + 256, np.uint8)
        address = self._scratch.ctypes.data
        return RawArray(address + -address % 256, "int8", (size,))


@functools.cache
def _shared_node(name: str, fields: tuple[tuple[str, Any], ...]) -> PluginNode:
    return PluginNode(name, dict(fields))


def run(name: str, fields: Mapping[str, Any], inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """Run plugin `name` on NumPy arrays with emulated kernels; a node is made once per name and fields."""
    hashable = tuple(
        (key, value if np.ndim(value) == 0 else tuple(np.asarray(value).tolist())) for key, value in fields.items()
    )
    return _shared_node(name, hashable).run(inputs)


def select_values(
    query: NDArray[Any] | None, key: NDArray[Any], lengths: NDArray[Any], settings: ChunkKVSettings, **optional: Any
) -> list[NDArray[Any]]:
    """Return the node's inputs in order; what is left out is filled in from the settings, as the runtime does."""
    ratios, budgets = optional.get("keep_per_10k"), optional.get("budget_tokens")
    own_budget = settings.budget_tokens if ratios is None and budgets is None else 0
    rows = len(lengths)
    values = {
        "query": query,
        "key": key,
        "lengths": lengths,
        "keep_per_10k": np.full(rows, settings.keep_per_10k) if ratios is None else ratios,
        "budget_tokens": np.full(rows, own_budget) if budgets is None else budgets,
        **{name: optional.get(name) for name in ("is_delimiter", "window", "value", "scores")},
    }
    names = functions.select_inputs(settings, optional.get("window") is not None)
    of_type = ("query", "key", "value", "scores")
    given = {name: np.asarray(values[name]) for name in names}
    return [value if name in of_type else value.astype(np.int32) for name, value in given.items()]


def profile(values: list[NDArray[Any]], *, room: int = 0) -> list[Range]:
    """Return a profile with free batch and length whose maximum exceeds the values by `room` rows and tokens."""
    batch = values[0].shape[0]
    tokens = values[1].shape[2] if values[1].ndim == 4 else values[0].shape[-1]
    ranges = []
    for place, value in enumerate(values):
        free = {0: (1, batch + room)}
        if not (place == 0 and value.ndim == 4) and value.ndim > 1:  # the query has no tokens
            free[1 if value.ndim == 2 else 2] = (1, tokens + room)
        corners = [
            tuple(free[axis][corner] if axis in free else size for axis, size in enumerate(value.shape))
            for corner in (0, 1)
        ]
        ranges.append(Range(value.dtype.name, corners[0], corners[1], corners[1]))
    return ranges


@dataclass
class PluginOp:
    """Both plugins in one host; a node is built and deserialised once per kind of call and used again."""

    host: PluginHost
    memory: Memory
    max_kept: int = 0
    _nodes: dict[Any, tuple[Built, Running]] = field(default_factory=dict)

    def node(
        self,
        settings: ChunkKVSettings,
        values: list[NDArray[Any]],
        request_window: bool = False,
        head_class: str = ALL_HEADS,
    ) -> tuple[Built, Running]:
        """Return the select node for these settings, types and sizes, from the build phase through the bytes."""
        attributes = functions.select_attributes(settings, request_window, head_class)
        attributes |= {"max_kept": self.max_kept} if self.max_kept else {}
        known = repr((attributes, [(value.dtype, value.shape) for value in values]))
        if known not in self._nodes:
            built = self.host.build(SELECT, node_fields(attributes), profile(values, room=3))
            self._nodes[known] = built, self.host.attach(SELECT, built.fields)
        return self._nodes[known]

    def select(
        self,
        query: NDArray[Any] | None,
        key: NDArray[Any],
        lengths: NDArray[Any],
        settings: ChunkKVSettings,
        *,
        head_class: str = ALL_HEADS,
        **optional: Any,
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
        """ChunkKVSelect with the signature of select_batch; the columns behind the largest N must hold -1."""
        values = select_values(query, key, lengths, settings, **optional)
        built, running = self.node(settings, values, optional.get("window") is not None, head_class)
        indices, kept, scores = run_node(built, running, self.memory, values)
        assert indices.shape[-1] == min(key.shape[2], self.max_kept or key.shape[2])
        assert (indices[..., kept.max(initial=0) :] == -1).all()
        return indices[..., : kept.max(initial=0)], kept, scores

    def compact(self, x: NDArray[Any], kept_indices: NDArray[np.int32]) -> NDArray[Any]:
        """ChunkKVCompact with the signature of compact_batch."""
        shapes = [(value.dtype.name, value.shape, value.shape, value.shape) for value in (x, kept_indices)]
        fields = {} if kept_indices.ndim == 2 else {"heads": "each"}
        built = self.host.build(COMPACT, node_fields(fields), [Range(*shape) for shape in shapes])
        return run_node(built, self.host.attach(COMPACT, built.fields), self.memory, [x, kept_indices])[0]
