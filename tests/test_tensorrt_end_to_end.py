"""benchmarks/tensorrt_end_to_end.py on doubles, so that it runs when a machine for it is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tensorrt_double import Double, machine_of

from benchmarks import tensorrt_end_to_end as script
from benchmarks.random_checkpoint import MEDIUM

machine = pytest.fixture(machine_of)
TINY = {
    **MEDIUM,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "head_dim": 16,
    "vocab_size": 300,
}


def test_it_says_what_is_missing(machine: Double, capsys: pytest.CaptureFixture[str]) -> None:
    machine.cuda.devices = 0
    assert script.main([]) == script.CANNOT_RUN
    assert capsys.readouterr().err.startswith("this benchmark needs an NVIDIA GPU, which was not found (cudaGetDevice")


def test_needle_answers_are_compared_token_by_token(machine: Double, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(script, "KEEP_RATIOS", (1.0, 0.2))
    monkeypatch.setattr(
        script, "prompts", lambda: {"home": json.loads((script.NEEDLE / "prompts" / "home.json").read_text())["text"]}
    )
    assert script.main(["--part", "needle", "--dtype", "float16", "--output", str(tmp_path / "result.json")]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["needle"]["answers"] == 2 and result["needle"]["float32"]["different"] == []
    assert set(result["needle"]) == {"answers", "float32", "float16"} and result["tensorrt"] == machine.version


def test_random_weights_are_measured_by_length_and_ratio(machine: Double, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(script, "REPEATS", 1)
    found = script.run_random(
        tmp_path, "float16", tmp_path / "timings", {**TINY, "torch_dtype": "bfloat16"}, (100, 200)
    )
    assert [(row["length"], row["keep_ratio"]) for row in found["rows"]] == [
        (length, ratio) for length in (100, 200) for ratio in script.KEEP_RATIOS
    ]
    assert all(row["tpot_ms"] > 0 and row["kept_tokens"] <= row["length"] for row in found["rows"])
    assert found["weights_bytes"] > 0
