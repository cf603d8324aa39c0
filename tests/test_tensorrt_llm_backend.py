from __future__ import annotations
import pytest
from support.tensorrt_llm_builds import GENERATIONS, LlmBuild, doubles


@pytest.mark.parametrize("generation", GENERATIONS)
def test_smoke(generation, tmp_path, monkeypatch, capsys):
    with doubles(generation, tmp_path, monkeypatch) as machine:
        out = LlmBuild(capsys, tmp_path / "engine")(chunkkv_layer_reuse=2)
        assert out.code == 0, out
        for node in machine.networks[0].nodes:
            print(node.plugin or node.op, node.inputs, node.outputs)
