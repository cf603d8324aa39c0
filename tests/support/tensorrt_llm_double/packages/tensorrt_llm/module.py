"""Modules and parameters: names from attributes, values from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tensorrt_llm._common import default_net
from tensorrt_llm.functional import Tensor, constant


class Parameter:
    """A weight; its tensor in the network that is being built."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, is_buffer: bool = False) -> None:
        self.shape, self.dtype, self.is_buffer = shape, dtype, is_buffer
        self.array: np.ndarray | None = None
        self._tensors: dict[int, Tensor] = {}

    @property
    def raw_value(self) -> np.ndarray:
        assert self.array is not None, "the checkpoint has no such weight"
        return self.array

    def load(self, array: np.ndarray) -> None:
        assert array.shape == self.shape, (array.shape, self.shape)
        self.array = array

    @property
    def value(self) -> Tensor:
        from support.tensorrt_llm_double.graph import numpy_dtype

        from tensorrt_llm._utils import trt_dtype_to_str

        assert self.array is not None, "the checkpoint has no such weight"
        net = default_net()
        if id(net) not in self._tensors:
            self._tensors[id(net)] = constant(self.array.astype(numpy_dtype(trt_dtype_to_str(self.dtype))))
        return self._tensors[id(net)]


class Module:
    """A part of a model; calling it records its nodes under its own name."""

    _name = ""

    def __call__(self, *args: Any, **kw: Any) -> Any:
        path = default_net()._module_path
        path.append(self._name)
        try:
            return self.forward(*args, **kw)
        finally:
            path.pop()

    def forward(self, *args: Any, **kw: Any) -> Any:
        raise NotImplementedError

    def children(self) -> Iterator[tuple[str, Module]]:
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        for name, value in vars(self).items():
            if isinstance(value, Parameter):
                yield prefix + name, value
        for name, child in self.children():
            child._name = name
            yield from child.named_parameters(f"{prefix}{name}.")
