"""The op as the two TensorRT plugins, driven by the plugin host and callable like chunkkv.reference."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.onnx_graph import functions
from native.memory import Memory
from native.plugin_host import Built, PluginHost, Range, Running, node_fields, run_node

SELECT, COMPACT = (f"{functions.PLUGIN_NAMESPACE}::{name}:1" for name in (functions.SELECT, functions.COMPACT))


def select_values(
    query: NDArray[Any], key: NDArray[Any], lengths: NDArray[Any], settings: ChunkKVSettings, **optional: Any
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
        "is_delimiter": optional.get("is_delimiter"),
    }
    given = [np.asarray(values[name]) for name in functions.select_inputs(settings)]
    return [*given[:2], *(value.astype(np.int32) for value in given[2:])]


def profile(values: list[NDArray[Any]], *, room: int = 0) -> list[Range]:
    """Return a profile with free batch and length whose maximum exceeds the values by `room` rows and tokens."""
    batch, tokens = values[0].shape[0], values[1].shape[2]
    ranges = []
    for place, value in enumerate(values):
        free = {0: (1, batch + room)}
        if place != 0 and value.ndim > 1:
            free[2 if value.ndim == 4 else 1] = (1, tokens + room)
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

    def node(self, settings: ChunkKVSettings, values: list[NDArray[Any]]) -> tuple[Built, Running]:
        """Return the select node for these settings, types and sizes, from the build phase through the bytes."""
        attributes = functions.select_attributes(settings) | ({"max_kept": self.max_kept} if self.max_kept else {})
        known = repr((attributes, [(value.dtype, value.shape) for value in values]))
        if known not in self._nodes:
            built = self.host.build(SELECT, node_fields(attributes), profile(values, room=3))
            self._nodes[known] = built, self.host.attach(SELECT, built.fields)
        return self._nodes[known]

    def select(
        self, query: NDArray[Any], key: NDArray[Any], lengths: NDArray[Any], settings: ChunkKVSettings, **optional: Any
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
        """ChunkKVSelect with the signature of select_batch; the columns behind the largest N must hold -1."""
        values = select_values(query, key, lengths, settings, **optional)
        built, running = self.node(settings, values)
        indices, kept, scores = run_node(built, running, self.memory, values)
        assert indices.shape[1] == min(key.shape[2], self.max_kept or key.shape[2])
        assert (indices[:, kept.max(initial=0) :] == -1).all()
        return indices[:, : kept.max(initial=0)], kept, scores

    def compact(self, x: NDArray[Any], kept_indices: NDArray[np.int32]) -> NDArray[Any]:
        """ChunkKVCompact with the signature of compact_batch."""
        shapes = [(value.dtype.name, value.shape, value.shape, value.shape) for value in (x, kept_indices)]
        built = self.host.build(COMPACT, [], [Range(*shape) for shape in shapes])
        return run_node(built, self.host.attach(COMPACT, built.fields), self.memory, [x, kept_indices])[0]
