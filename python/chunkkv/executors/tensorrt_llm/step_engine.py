"""What runs one step of an engine with a paged KV cache: named arrays in, logits out.

The executor above it knows prompts, rows and blocks; a step engine knows none of them. TensorRT runs it on a GPU;
anything that reads host arrays may stand in for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

HOST_PREFIX = "host_"  # inputs of these names are read by the CPU, all others by the device


@dataclass(frozen=True)
class StepTensor:
    """An input or output of the engine: its shape, -1 where a dimension varies, and its NumPy type."""

    shape: tuple[int, ...]
    dtype: np.dtype


class StepMemory(Protocol):
    """Memory that the engine's inputs can point to; freed with this object."""

    @property
    def address(self) -> int:
        """Where it begins."""


class StepEngine(Protocol):
    """One loaded engine; calls of run() do not overlap."""

    @property
    def inputs(self) -> Mapping[str, StepTensor]:
        """Return what run() must be given, by name."""

    @property
    def outputs(self) -> Mapping[str, StepTensor]:
        """Return what the engine computes, by name."""

    def free_memory(self) -> int:
        """Return the bytes that allocate() could still give."""

    def allocate(self, nbytes: int) -> StepMemory:
        """Return zeroed memory for keys and values."""

    def run(self, arrays: Mapping[str, np.ndarray], zeros: Mapping[str, tuple[int, ...]]) -> np.ndarray:
        """Run one step to its end and return the output `logits`, as many rows as the engine gives.

        `arrays` and `zeros` together hold every input: contiguous arrays of the engine's types, and the shapes of
        inputs that are all zero. The result is overwritten by the next step. Raises EngineRunError where it fails.
        """
