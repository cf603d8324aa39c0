"""The load benchmark in small: perf_analyzer drives the server, and more clients get more tokens."""

from __future__ import annotations

import json
import subprocess
import sys

from .conftest import ROOT

RESULT = ROOT / "docs" / "benchmarks" / "triton-load.json"


def test_the_load_benchmark(tmp_path) -> None:
    output = tmp_path / "load.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "triton_load.py"), "--output", str(output)]
    small = ["--clients", "1", "4", "--requests_per_client", "3", "--new_tokens", "16", "--kills", "1"]
    done = subprocess.run([*command, *small], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(output.read_text(encoding="utf-8"))
    rows = measured["load"]
    assert [row["clients"] for row in rows] == [1, 4] * 3 and all(row["tokens_per_s"] > 0 for row in rows)
    assert all(row["ttft_ms_p50"] <= row["ttft_ms_p99"] for row in rows)
    assert {row["killed"] for row in measured["recovery"]} == {"server", "model process"}
    committed = json.loads(RESULT.read_text(encoding="utf-8"))
    assert set(committed) == set(measured) and set(committed["load"][0]) == set(rows[0])


def test_the_committed_figures_show_what_batching_gives() -> None:
    measured = json.loads(RESULT.read_text(encoding="utf-8"))
    by_clients = {row["clients"]: row["speedup"] for row in measured["load"] if row["case"] == "wide model"}
    assert by_clients[8] > 2 and by_clients[32] > by_clients[8]
