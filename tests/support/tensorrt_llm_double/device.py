"""Runs a recorded network on the addresses of a CUDA double."""

from __future__ import annotations

import numpy as np

from support.cuda_double import CudartDouble, array_at
from support.tensorrt_llm_double import machine
from support.tensorrt_llm_double.attention import Pools
from support.tensorrt_llm_double.graph import Graph
from support.tensorrt_llm_double.oracle import oracle_plugins
from support.tensorrt_llm_double.run import Execution


class DevicePools(Pools):
    """Pools that lie in allocations of a CUDA double."""

    def __init__(self, cuda: CudartDouble) -> None:
        self._cuda = cuda

    def load(self, address: int) -> np.ndarray:
        _, nbytes = self._cuda.memory[address]
        return array_at(address, (nbytes,), np.uint8)

    def store(self, address: int, content: np.ndarray) -> None:
        assert content.ctypes.data == address


def execution(graph: Graph, cuda: CudartDouble) -> Execution:
    """Return the network over pools in the double's memory, its plugins by the machine's choice or in NumPy."""
    pools = DevicePools(cuda)
    return Execution(graph, machine().plugins or oracle_plugins(pools), pools)
