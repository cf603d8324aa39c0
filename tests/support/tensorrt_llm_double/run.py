"""Executes a recorded network in NumPy: every output is rounded to its tensor's type, sums are float32.

Plugins are run by whoever `plugins` is: the plugin host, or the plain NumPy of oracle.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from support.tensorrt_llm_double.attention import Hidden, Pools, attend
from support.tensorrt_llm_double.graph import Graph, Node, numpy_dtype

Arrays = Sequence[np.ndarray]


class Execution:
    """One rank's network, ready to run; `plugins(node)` returns what runs that plugin."""

    def __init__(self, graph: Graph, plugins: Callable[[Node], Callable[[Arrays], Arrays]], pools: Pools) -> None:
        self.graph, self.pools = graph, pools
        self._plugins = {node.name: plugins(node) for node in graph.of("plugin_v3")}
        self.seen: dict[str, np.ndarray] = {}  # every tensor of the last step
        self.hidden: Sequence[Hidden] | None = None  # what attention must not see in the next step

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one step on all inputs of the network and return its outputs."""
        return run_ranks([self], [feeds])[0]

    def begin(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Take the inputs of a step."""
        self.seen = {**self.graph.constants}
        for name in self.graph.inputs:
            value, array = self.graph.values[name], feeds[name]
            assert array.dtype == numpy_dtype(value.dtype), f"{name} is {array.dtype}, declared {value.dtype}"
            fits = array.ndim == len(value.shape)
            assert fits and all(b in (-1, a) for a, b in zip(array.shape, value.shape, strict=True)), (
                name,
                array.shape,
            )
            self.seen[name] = array

    def run(self, number: int, gathered: Arrays) -> None:
        """Run one node; `gathered` is what every rank of the group has for its first input."""
        node = self.graph.nodes[number]
        for name, made in zip(node.outputs, self._outputs(node, gathered), strict=True):
            with np.errstate(over="ignore", invalid="ignore"):
                self.seen[name] = np.asarray(made).astype(numpy_dtype(self.graph.values[name].dtype), copy=False)

    def _outputs(self, node: Node, gathered: Arrays) -> Arrays:
        given = [self.seen[name] for name in node.inputs]
        if node.op == "plugin_v3":
            return self._plugins[node.name](given)
        if node.op == "gpt_attention":
            keywords = dict(zip(node.attributes["keywords"], given, strict=True))
            return [attend(node, keywords, self.pools, self.hidden)]
        if node.op in ("allreduce", "allgather"):
            assert len(gathered) == len(node.attributes["group"])
            if node.op == "allgather":
                return [np.concatenate(gathered, node.attributes["axis"])]
            return [np.sum([_wide(part) for part in gathered], axis=0)]
        return [OPS[node.op](*given, **node.attributes)]


def run_ranks(
    executions: Sequence[Execution], feeds: Sequence[Mapping[str, np.ndarray]]
) -> list[dict[str, np.ndarray]]:
    """Run one step of all ranks of a tensor-parallel group, node by node; return each rank's outputs."""
    for execution, given in zip(executions, feeds, strict=True):
        execution.begin(given)
    for number, node in enumerate(executions[0].graph.nodes):
        assert all(execution.graph.nodes[number].op == node.op for execution in executions)
        gathered = [execution.seen[execution.graph.nodes[number].inputs[0]] for execution in executions]
        for execution in executions:
            execution.run(number, gathered)
    return [{name: execution.seen[name] for name in execution.graph.outputs} for execution in executions]


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32)


def _rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    wide = _wide(x)
    return wide / np.sqrt((wide * wide).mean(axis=-1, keepdims=True) + np.float32(eps)) * _wide(weight)


OPS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: _wide(a) + _wide(b),
    "mul": lambda a, b: _wide(a) * _wide(b),
    "reciprocal": lambda x: 1 / _wide(x),
    "cast": lambda x: x,
    "embedding": lambda ids, weight: weight[ids],
    "linear": lambda x, weight: _wide(x) @ _wide(weight).T,
    "rms_norm": _rms_norm,
    "silu": lambda x: _wide(x) / (1 + np.exp(-_wide(x))),
    "gather_last": lambda hidden, last: hidden[last - 1],
}
