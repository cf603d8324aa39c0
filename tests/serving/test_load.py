"""What the load page measures on Triton, in small; and NVIDIA's own load generator drives the server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.serving.load import load_of
from benchmarks.serving.recovery import VICTIMS, recovery
from benchmarks.serving.servers import TritonServer, triton_server

from .conftest import ROOT

RESULT = ROOT / "docs" / "benchmarks" / "serving.json"


def test_the_load_page_measures_triton(engine_dir: Path) -> None:
    with triton_server(engine_dir, sys.executable) as server:
        rows = [load_of(server, TritonServer(), clients, 4, 1.0) for clients in (1, 4)]
    assert [row["new_tokens"] for row in rows] == [80, 80] and all(row["tokens_per_s"] > 0 for row in rows)
    assert all(0 < row["ttft_p50_s"] <= row["ttft_p99_s"] <= row["wall_s"] + 0.01 for row in rows)
    assert all(0 <= row["longest_gap_s"] < row["wall_s"] for row in rows)
    committed = json.loads(RESULT.read_text(encoding="utf-8"))
    assert {"server", *rows[0]} == set(committed["load"][0])


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_killed_process_is_noticed_and_replaced(engine_dir: Path, victim: str) -> None:
    measured = recovery(engine_dir, sys.executable, victim, 1)
    assert measured["killed"] == victim
    assert 0 <= measured["client_told_s"][0] < measured["serving_again_s"][0] < 60


def test_perf_analyzer(servers, tmp_path: Path) -> None:
    """The binary of tritonclient 2.51.0, with two libraries that it finds in nvidia-pytriton's folder."""
    server = servers()
    spec = find_spec("pytriton")
    libraries = Path(next(iter(spec.submodule_search_locations))).parent / "nvidia_pytriton.libs"
    for name in ("libb64.so.0d", "libcudart.so.12"):
        (tmp_path / name).symlink_to(next(libraries.glob(f"{name.split('.')[0]}-*")))
    data, export = tmp_path / "requests.json", tmp_path / "export.json"
    request = {"text_input": ["the door is"], "max_tokens": [16], "stream": [True], "ignore_eos": [True]}
    data.write_text(json.dumps({"data": [request]}), encoding="utf-8")
    command = [str(Path(sys.executable).parent / "perf_analyzer"), "-m", "chunkkv", "-i", "grpc", "--streaming"]
    command += ["-u", f"127.0.0.1:{server.grpc}", "--async", "--input-data", str(data)]
    command += ["--profile-export-file", str(export), "--concurrency-range", "4", "--request-count", "8"]
    environment = {**os.environ, "LD_LIBRARY_PATH": f"{tmp_path}{os.pathsep}{libraries}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and export.is_file(), done.stderr[-2000:] + done.stdout[-2000:]
    (experiment,) = json.loads(export.read_text(encoding="utf-8"))["experiments"]
    counts = [len(each["response_timestamps"]) for each in experiment["requests"]]
    assert len(counts) >= 8 and all(count in (16, 17) for count in counts), counts
