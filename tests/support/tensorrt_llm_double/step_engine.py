"""A recorded network as the step engine of chunkkv.executors: named arrays in, logits out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import numpy as np

from chunkkv.executors.tensorrt_llm.step_engine import StepTensor
from support.tensorrt_llm_double.graph import numpy_dtype
from support.tensorrt_llm_double.run import Execution


class RecordedStepEngine:
    """Keeps the inputs of every step, and the tensors named in `watched` after each context step."""

    def __init__(self, execution: Execution, watched: Sequence[str] = (), free_bytes: int = 1 << 30) -> None:
        self.execution, self._free = execution, free_bytes
        self.inputs, self.outputs = self._tensors(execution.graph.inputs), self._tensors(execution.graph.outputs)
        self.steps: list[dict[str, np.ndarray]] = []
        self._watched, self.contexts = watched, list[list[np.ndarray]]()

    def free_memory(self) -> int:
        return self._free

    def allocate(self, nbytes: int) -> SimpleNamespace:
        self._free -= nbytes
        return SimpleNamespace(address=self.execution.pools.allocate(nbytes))

    def run(self, arrays: Mapping[str, np.ndarray], zeros: Mapping[str, tuple[int, ...]]) -> np.ndarray:
        assert not set(arrays) & set(zeros)
        feeds = {**arrays, **{name: np.zeros(shape, self.inputs[name].dtype) for name, shape in zeros.items()}}
        assert feeds.keys() == self.inputs.keys(), feeds.keys() ^ self.inputs.keys()
        logits = self.execution(feeds)["logits"]
        self.steps.append({name: array.copy() for name, array in arrays.items()})
        if not arrays["host_request_types"].all():
            self.contexts.append([self.execution.seen[name] for name in self._watched])
        return logits

    def _tensors(self, names: list[str]) -> dict[str, StepTensor]:
        values = {name: self.execution.graph.values[name] for name in names}
        return {name: StepTensor(value.shape, numpy_dtype(value.dtype)) for name, value in values.items()}
