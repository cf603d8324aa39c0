"""benchmarks/tensorrt_end_to_end.py on doubles; real_tensorrt/ has its dry run on TensorRT for RTX itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tensorrt_double import Double, machine_of

from benchmarks import tensorrt_end_to_end as script
from benchmarks.random_checkpoint import MEDIUM
from chunkkv.gpu.tensorrt_library import TensorRT

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
    assert script.main(["--dtype", "float16", "--output", str(tmp_path / "result.json")]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["needle"]["answers"] == 2 and result["needle"]["float32"]["different"] == []
    assert set(result["needle"]) == {"answers", "float32", "float16"} and result["ran"] is True
    assert result["tensorrt"] == f"TensorRT {machine.version}"
    assert result["needle"]["float16"]["layers"]["prefill.engine"]["PLUGIN_V3"] > 0


def test_a_checkpoint_of_ones_own_is_compared_too(machine: Double, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(script, "KEEP_RATIOS", (0.5,))
    monkeypatch.setattr(script, "prompts", lambda: {"short": "The house at the end of the street is red. " * 20})
    command = ["--checkpoint_dir", str(script.NEEDLE / "model"), "--max_input_len", "1024", "--dtype", "float16"]
    assert script.main([*command, "--work", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["checkpoint"]["answers"] == 1
    assert any(line.startswith("checkpoint float32: built in") and "1 of 1 answers" in line for line in lines)


def test_different_answers_are_listed_and_fail_in_float32(machine: Double, monkeypatch, capsys) -> None:
    runs = iter([{"home 1.0": [1, 2]}, {"home 1.0": [1, 3]}, {"home 1.0": [1, 2]}])
    monkeypatch.setattr(script, "answers", lambda engine: next(runs))
    assert script.main(["--dtype", "float16"]) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [result["needle"][dtype]["different"] for dtype in ("float32", "float16")] == [["home 1.0"], []]


def test_a_dry_run_builds_and_runs_nothing(machine: Double, monkeypatch, capsys) -> None:
    monkeypatch.setattr(script, "answers", lambda engine: pytest.fail("an engine ran"))
    assert script.main(["--dry_run", "--dtype", "float16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result["ran"] is False and set(result["needle"]) == {"float32", "float16"}
    assert any(line.startswith("needle float16: built in") and line.endswith("not run") for line in lines)
    with pytest.raises(SystemExit):
        script.main(["--dry_run", "--part", "random8b"])


def test_random_weights_are_measured_by_length_and_ratio(machine: Double, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(script, "REPEATS", 1)
    run = script.Run(TensorRT.of(machine.module), tmp_path, "float16", dry_run=False)
    result = script.run_random(run, {**TINY, "torch_dtype": "bfloat16"}, (100, 200))
    assert [(row["length"], row["keep_ratio"]) for row in result["rows"]] == [
        (length, ratio) for length in (100, 200) for ratio in script.KEEP_RATIOS
    ]
    assert all(row["tpot_ms"] > 0 and row["kept_tokens"] <= row["length"] for row in result["rows"])
    assert result["weights_bytes"] > 0
