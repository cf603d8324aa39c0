"""The GPU check from end to end on the host, so that on a GPU machine it only has to be started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from native.build import ROOT, emulated_library


@pytest.mark.deep
def test_the_dry_run_goes_through_every_step(tmp_path: Path) -> None:
    emulated_library()
    output = tmp_path / "result.json"
    command = [sys.executable, "benchmarks/gpu_check.py", "--dry_run", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    result = json.loads(output.read_text(encoding="utf-8"))
    assert json.loads(done.stdout.splitlines()[-1]) == result, "the last line is the JSON"
    steps = result["steps"]
    for name in ("op tests", "plugin tests", "network tests"):
        assert "passed" in steps[name]["last_line"]
    assert {line["op"] for line in steps["ops"]["lines"]} == {
        "score",
        "select",
        "compact",
        "rope",
        "prepare",
        "all layers",
    }
    assert result["dry_run"] and result["measured"] is None, "times of an emulator are no measurement"
    for name in ("peers", "decode"):
        assert "skipped" in steps[name] or steps[name].get("one_layer") or steps[name].get("lines")
