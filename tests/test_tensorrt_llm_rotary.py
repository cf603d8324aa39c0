"""Contexts that a model's rotary scaling stretches beyond the positions of its own table.

TensorRT-LLM is a contract as read (support/tensorrt_llm_double); tests/tensorrt_llm_source compares its own tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.messages import naming
from support.tensorrt_llm_builds import LlmBuild, doubles, llm_checkpoint, llm_model
from support.tensorrt_llm_double import Machine

from chunkkv.engine.tensorrt_llm_side_file import SideFile
from chunkkv.errors import ConfigError
from chunkkv_builder.backends.tensorrt_llm.rotary import stretched_table

pytestmark = pytest.mark.contract_as_read


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    with doubles(tmp_path, monkeypatch) as machine:
        yield machine


@pytest.fixture
def build(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> LlmBuild:
    return LlmBuild(capsys, tmp_path / "engine")


def scaled(folder: Path, kind: str) -> Path:
    """Write a config.json whose context is stretched by four."""
    config = json.loads((llm_checkpoint() / "config.json").read_text())
    config["rotary_scaling"] = {"rope_type": kind, "type": kind, "factor": 4.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def with_weights(folder: Path) -> Path:
    (folder / "rank0.safetensors").symlink_to(llm_checkpoint() / "rank0.safetensors")
    return folder


@pytest.mark.parametrize("asked", [None, 1500])
def test_a_context_stretched_by_linear_scaling_gets_a_table_for_all_of_it(
    machine: Machine, build: LlmBuild, tmp_path: Path, asked: int | None
) -> None:
    stretched = with_weights(scaled(tmp_path, "linear"))
    outcome = build(checkpoint_dir=stretched, max_seq_len=asked, max_num_tokens=2048)
    assert outcome.code == 0, outcome
    positions = asked or 2048
    (network,) = machine.networks
    base = json.loads((stretched / "config.json").read_text())["rotary_base"]
    angles = np.arange(positions)[:, None] / 4.0 / base ** (np.arange(0, 64, 2) / 64)
    wanted = np.stack([np.cos(angles), np.sin(angles)], axis=-1).reshape(1, -1)
    nodes = network.of("ChunkKVRope")
    assert {node.inputs[2] for node in nodes} == {nodes[0].inputs[2]}, "one table for all layers"
    np.testing.assert_allclose(network.constants[nodes[0].inputs[2]], wanted, atol=1e-4)
    assert {node.fields()["max_positions"] for node in nodes} == {positions}
    assert SideFile.read(build.output).max_positions == positions


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_no_model_is_stretched_beyond_its_scaling(tmp_path: Path, build: LlmBuild, kind: str) -> None:
    stretched = scaled(tmp_path, kind)
    end = 512 if kind == "llama3" else 2048
    said = build("--dry_run", checkpoint_dir=stretched, max_seq_len=end + 1).error(2)
    assert f"max_seq_len is {end + 1}; this model has {end} positions (max_position_embeddings" in said
    assert f"give --max_seq_len {end} or less" in said


def test_a_table_that_is_not_made_of_its_frequencies_is_not_stretched(machine: Machine) -> None:
    model = llm_model()
    table = model.embed_positions_for_gpt_attention
    table.raw_value = np.roll(table.raw_value, 64, axis=1)
    assert stretched_table(model, 512) is None
    with pytest.raises(ConfigError, match=naming("max_seq_len 513 512 rotary_inv_freq")):
        stretched_table(model, 513)
