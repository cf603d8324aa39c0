"""Calls of one ONNX function become layers of their own in TensorRT, though the names inside are the same in each."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support import engines
from support.builds import CommandLine

from chunkkv.gpu.tensorrt_library import TensorRT
from chunkkv_builder.onnx_graph import functions

LAYERS = 3
SMALL = {"max_seq_len": 128, "max_batch_size": 1, "log_level": "error"}


class Layer(NamedTuple):
    """A layer of a network: its name and the names of its inputs; graph inputs are layers without any."""

    name: str
    inputs: list[str]


def layers_by_output(network: Any) -> dict[str, Layer]:
    """Return what makes each tensor of the network."""
    made = {}
    for layer in (network.get_layer(index) for index in range(network.num_layers)):
        inputs = [layer.get_input(index) for index in range(layer.num_inputs)]
        record = Layer(layer.name, [tensor.name for tensor in inputs if tensor is not None])
        for index in range(layer.num_outputs):
            name = layer.get_output(index).name
            assert name not in made, f"two tensors are called {name}"
            made[name] = record
    return made


def reached_from(tensor: str, made: dict[str, Layer]) -> set[str]:
    """Return the tensors that `tensor` is computed from, itself included."""
    reached: set[str] = set()
    open_names = [tensor]
    while open_names:
        name = open_names.pop()
        if name not in reached:
            reached.add(name)
            open_names += made[name].inputs if name in made else []
    return reached


@pytest.mark.filterwarnings("ignore:Use del obj")  # of what the bindings do when the recorder goes away
@pytest.mark.parametrize("boundaries", ["fixed", "delimiter"])
def test_every_leader_chooses_by_its_own_layers(
    boundaries: str,
    rtx: TensorRT,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    networks: list[dict[str, Layer]] = []

    class Recorder(rtx.module.Builder):  # type: ignore[misc, name-defined]  # a class known at run time only
        def build_serialized_network(self, network: Any, config: Any) -> Any:
            networks.append(layers_by_output(network))
            return super().build_serialized_network(network, config)

    monkeypatch.setattr(rtx.module, "Builder", Recorder)
    model = engines.checkpoint_dir("llama3", num_hidden_layers=LAYERS)
    flags = {"checkpoint_dir": model, "output_dir": tmp_path / "engine", "backend": "tensorrt", "tensorrt": "rtx"}
    flags |= {**SMALL, "chunkkv": True, "chunkkv_ops": "functions", "chunkkv_boundaries": boundaries}
    outcome = CommandLine(capsys)(*engines.command_line(flags))
    assert (outcome.code, outcome.err) == (0, "")
    made = networks[0]
    chosen_by = []
    for leader in range(LAYERS):
        reached = reached_from(f"kept_indices.{leader}", made)
        for layer in range(LAYERS):
            key = f"model.layers.{layer}.self_attn.k_proj.weight"
            assert (key in reached) == (layer <= leader)
        computed = {name for name in reached if name in made and made[name].inputs}
        chosen_by.append({name for name in computed if f"{functions.SELECT}/" in made[name].name})
    assert len({len(tensors) for tensors in chosen_by}) == 1 and len(chosen_by[0]) > 100
    assert all(not chosen_by[a] & chosen_by[b] for a in range(LAYERS) for b in range(a))
    for layer in range(LAYERS):
        for kind in ("key", "value"):
            kept = reached_from(f"kept_{kind}.{layer}", made)
            assert chosen_by[layer] <= kept
            assert not any(chosen_by[other] & kept for other in range(LAYERS) if other != layer)
