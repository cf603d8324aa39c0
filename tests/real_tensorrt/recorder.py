"""Keeps what TensorRT built: layers, inputs, outputs and profile of each network, and the engine's bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Built:
    """One network that became an engine.

    Parameters
    ----------
    layers : how many layers there are of each type.
    inputs, outputs : type and shape by name; -1 where a size is free.
    profile : smallest, best and largest shape of each input with a free size; of an input that holds a shape, the
        smallest, best and largest values.
    tf32 : whether float32 may be computed in less.
    engine : the serialized engine.
    """

    layers: Counter[str]
    inputs: dict[str, tuple[str, Sizes]]
    outputs: dict[str, tuple[str, Sizes]]
    profile: dict[str, tuple[Sizes, Sizes, Sizes]]
    tf32: bool
    engine: bytes


def record_builds(trt: Any, monkeypatch: pytest.MonkeyPatch) -> list[Built]:
    """Replace `trt.Builder` by one that also appends to the list that is returned; `trt` is the package."""
    builds: list[Built] = []
    profiles: list[Any] = []  # each only until its engine is built: a profile keeps its builder alive

    class Recorder(trt.Builder):  # type: ignore[misc, name-defined]  # a class known at run time only
        def create_optimization_profile(self) -> Any:
            profiles.append(super().create_optimization_profile())
            return profiles[-1]

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            engine = super().build_serialized_network(network, config)
            profile = profiles.pop()
            if engine is not None:
                tf32 = config.get_flag(trt.BuilderFlag.TF32)
                builds.append(_built(network, profile, tf32, bytes(engine)))
            return engine

    monkeypatch.setattr(trt, "Builder", Recorder)
    return builds


def _built(network: Any, profile: Any, tf32: bool, engine: bytes) -> Built:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    corners = {}
    for tensor in inputs:
        if tensor.is_shape_tensor:
            corners[tensor.name] = tuple(tuple(values) for values in profile.get_shape_input(tensor.name))
        elif -1 in tuple(tensor.shape):
            corners[tensor.name] = tuple(tuple(shape) for shape in profile.get_shape(tensor.name))
    layers = Counter(network.get_layer(index).type.name for index in range(network.num_layers))
    return Built(layers, _named(inputs), _named(outputs), corners, tf32, engine)


def _named(tensors: list[Any]) -> dict[str, tuple[str, Sizes]]:
    return {tensor.name: (tensor.dtype.name, tuple(tensor.shape)) for tensor in tensors}
