"""The GPU check on the host, so that on a GPU machine it only has to be started; and what a failing step leaves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.gpu import model
from native.build import ROOT, emulated_library


def test_a_step_that_hangs_or_fails_keeps_what_it_has_measured(tmp_path: Path) -> None:
    run = gpu_check.Run(dry_run=True, output=tmp_path / "result.json")
    begins = "import json, time; print(json.dumps({'op': 'score', 'microseconds': 3}), flush=True); print('words')\n"
    ends = {"hangs": "time.sleep(60)", "fails": "raise SystemExit('no memory')", "talks": "print('{not json')"}
    for step, end in ends.items():
        run.child(step, [sys.executable, "-c", begins + end], share=2.0)
    written = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["steps"]
    assert [written[step]["lines"] for step in ends] == [[{"op": "score", "microseconds": 3}]] * 3
    assert written["hangs"]["error"] == "took longer than 2 s"
    assert "no memory" in written["fails"]["error"] and "error" not in written["talks"]


def test_the_shares_fit_the_limit() -> None:
    sanitizers = len(gpu_check.SANITIZERS) * gpu_check.SHARES["sanitizer"]
    total = sum(gpu_check.SHARES.values()) - gpu_check.SHARES["sanitizer"] + sanitizers
    assert total <= gpu_check.LIMIT_SECONDS - gpu_check.MARGIN_SECONDS


def test_predictions_are_above_the_time_of_the_bytes_and_grow_with_the_work() -> None:
    plain = model.Layer(1, 32768)
    assert model.score(plain)["score"] > plain.floor
    for more in (model.Layer(1, 65536), model.Layer(2, 32768), model.Layer(1, 32768, window=64)):
        assert model.score(more)["score"] > model.score(plain)["score"]
    assert model.score(model.Layer(1, 131072, key="fp8"))["score"] < model.score(model.Layer(1, 131072))["score"]
    assert model.all_layers(plain, 32, 1) > model.all_layers(plain, 32, 4)


def test_the_page_says_what_the_model_predicts() -> None:
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) x ([\d,]+) \| (\d+) \| (\w+) \| (.+) \|$", page, re.MULTILINE)
    assert len(rows) >= 15
    for batch, length, window, key, predicted in rows:
        layer = model.Layer(int(batch), int(length.replace(",", "")), window=int(window), key=key)
        of = model.score(layer)
        times = (layer.floor, of["statistics"], of["columns"], of["score"], model.select(layer), model.compact(layer))
        assert predicted == " | ".join(f"{time:.1f}" for time in times), (batch, length, window, key)


@pytest.mark.deep
def test_the_dry_run_goes_through_every_step(tmp_path: Path) -> None:
    emulated_library()
    output = tmp_path / "result.json"
    command = [sys.executable, "benchmarks/gpu_check.py", "--dry_run", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    result = json.loads(output.read_text(encoding="utf-8"))
    assert json.loads(done.stdout.splitlines()[-1]) == {"output": str(output), "measured": None}
    steps = result["steps"]
    assert list(steps)[:5] == ["build", "smoke", "ops", "peers", "decode"], "what only a GPU can tell comes first"
    for name in ("op tests", "plugin tests", "network tests"):
        assert "passed" in steps[name]["last_line"]
    ops = {"copy", "score", "select", "compact", "rope", "prepare", "all layers", "boundaries"}
    assert {line["op"] for line in steps["ops"]["lines"]} == ops
    measured = {line.get("variant") for line in steps["ops"]["lines"]} - {None}
    assert {"fp8", "int8", "paged", "delimiter", "ragged", "D 64", "28/4 heads", "40/8 heads"} <= measured
    assert result["dry_run"] and result["measured"] is None, "times of an emulator are no measurement"
    for name in ("peers", "decode"):
        assert "skipped" in steps[name] or steps[name]["lines"]
