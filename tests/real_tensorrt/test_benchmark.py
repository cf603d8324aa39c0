"""The dry run of benchmarks/tensorrt_end_to_end.py: everything up to running, on any machine."""

from __future__ import annotations

import json

import pytest

from benchmarks import tensorrt_end_to_end as script
from chunkkv.gpu.tensorrt_library import RTX, TensorRT


def test_the_dry_run_builds_the_shipped_model(rtx: TensorRT, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--dry_run", "--tensorrt", RTX]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["tensorrt"] == rtx.title and result["ran"] is False
    for engines in (result["needle"]["float32"], result["needle"]["bfloat16"]):
        layers = engines["layers"]
        assert layers["prefill.engine"]["ATTENTION_INPUT"] == 4
        decode = [counts for file, counts in layers.items() if file.startswith("decode_")]
        assert decode and all((counts["KV_CACHE_UPDATE"], counts["ATTENTION_INPUT"]) == (8, 4) for counts in decode)
