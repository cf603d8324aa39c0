"""Load on a real tritonserver: tokens per second and time to first token for 1, 8 and 32 clients; recovery times.

Serves engines with `chunkkv triton serve` and drives them with perf_analyzer (from the package tritonclient 2.51.0)
over gRPC streaming: the shipped model, whose steps are so short that the server's responses bound it, and one with
random weights that is wide enough for a step to cost what reading its weights costs. Then kills the server and the
model process in the middle of a stream. Run it in the environment that `make test-triton` sets up. Prints a table and
one JSON line; --output also writes it.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from chunkkv.files import write_whole
from chunkkv.triton.server.processes import model_processes

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.random_checkpoint import MEDIUM, write_random_checkpoint  # noqa: E402

MODEL, PROMPT = ROOT / "examples" / "needle" / "model", ROOT / "examples" / "needle" / "prompts" / "short.txt"
CHUNKKV = [sys.executable, "-m", "chunkkv.cli.main"]
ATTEMPTS = 5
LOST = (OSError, http.client.HTTPException)


class Server:
    """`chunkkv triton serve` on an engine of a checkpoint, on free ports of the loopback interface."""

    def __init__(self, folder: Path, checkpoint: Path, slots: int, *init_flags: str) -> None:
        engine, repository = folder / "engine", folder / "repository"
        build = [sys.executable, "-m", "chunkkv_builder.build", "--checkpoint_dir", str(checkpoint)]
        build += ["--output_dir", str(engine), "--max_seq_len", "4096"]
        choice = ["--chunkkv", "--chunkkv_layer_reuse", "2", "--chunkkv_boundaries", "delimiter"]
        subprocess.run(
            [*build, *choice, "--chunkkv_chunk_size", "20", "--max_batch_size", str(slots), "--log_level", "warning"],
            check=True,
        )
        init = [*CHUNKKV, "triton", "init", "--engine_dir", str(engine)]
        init += ["--model_repository", str(repository), *init_flags]
        flags = ["--slots", str(slots), "--threads", "1", "--log_level", "warning"]
        subprocess.run([*init, *flags], check=True, stdout=subprocess.DEVNULL)
        self.http, self.grpc, metrics = _free_ports(3)
        self._log = folder / "log"
        ports = ["--http_port", str(self.http), "--grpc_port", str(self.grpc), "--metrics_port", str(metrics)]
        with self._log.open("wb") as output:
            command = [*CHUNKKV, "triton", "serve", "--model_repository", str(repository), *ports]
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        self.wait_ready(1)

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the log's lines of one event."""
        lines = [json.loads(line) for line in re.findall(r"^\{.*\}$", self._log.read_text(), re.MULTILINE)]
        return [line for line in lines if line["event"] == name]

    def wait_ready(self, times: int) -> None:
        """Wait until the server is ready for the nth time."""
        until = time.monotonic() + 60
        while len(self.events("server_ready")) < times:
            if time.monotonic() > until or self.process.poll() is not None:
                raise SystemExit(f"the server did not start:\n{self._log.read_text()[-2000:]}")
            time.sleep(0.02)

    def pids(self) -> tuple[int, int]:
        """Return the server's and the model's process."""
        server = self.events("server_started")[-1]["pid"]
        command = "\0".join(psutil.Process(server).cmdline())
        prefix = re.search(r"shm-region-prefix-name=(\w+)", command)
        assert prefix is not None, command
        (model,) = model_processes(prefix[1])
        return server, model

    def stop(self) -> None:
        """Let it end."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)

    def post(self, path: str, body: dict[str, Any], timeout: float = 30) -> http.client.HTTPResponse:
        """Return the open response to a request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http, timeout=timeout)
        connection.request("POST", f"/v2/models/chunkkv/{path}", json.dumps(body))
        return connection.getresponse()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listening.getsockname()[1] for listening in sockets]
    for listening in sockets:
        listening.close()
    return ports


class PerfAnalyzer:
    """The load generator of tritonclient 2.51.0, with two libraries that it finds in nvidia-pytriton's folder."""

    def __init__(self, folder: Path) -> None:
        binary = Path(sys.executable).parent / "perf_analyzer"
        spec = find_spec("pytriton")
        if not binary.is_file() or spec is None or spec.submodule_search_locations is None:
            raise SystemExit("perf_analyzer is missing: run make test-triton once, then use its environment")
        libraries = Path(next(iter(spec.submodule_search_locations))).parent / "nvidia_pytriton.libs"
        for name in ("libb64.so.0d", "libcudart.so.12"):
            stem = name.split(".", maxsplit=1)[0]
            (folder / name).symlink_to(next(libraries.glob(f"{stem}-*")))
        self._binary, self._folder = binary, folder
        self._environment = {**os.environ, "LD_LIBRARY_PATH": f"{folder}{os.pathsep}{libraries}"}

    def run(self, port: int, clients: int, requests: int, new_tokens: int) -> dict[str, Any]:
        """Send `requests` requests with `clients` open at a time; return rates and times."""
        for _ in range(ATTEMPTS):
            text = self._export(port, clients, requests, new_tokens)
            try:
                (experiment,) = json.loads(text)["experiments"]
            except ValueError:  # now and then the tool ends with 0 and half a file
                continue
            return _figures(experiment["requests"], clients, new_tokens)
        raise SystemExit(f"perf_analyzer wrote no whole file in {ATTEMPTS} runs")

    def _export(self, port: int, clients: int, requests: int, new_tokens: int) -> str:
        folder = Path(tempfile.mkdtemp(dir=self._folder))  # the tool refuses a file that exists
        data, export = folder / "requests.json", folder / "export.json"
        prompt = PROMPT.read_text(encoding="utf-8").rstrip("\n")
        request = {"text_input": [prompt], "max_tokens": [new_tokens], "stream": [True], "ignore_eos": [True]}
        data.write_text(json.dumps({"data": [request]}), encoding="utf-8")
        command = [
            str(self._binary),
            "-m",
            "chunkkv",
            "-i",
            "grpc",
            "-u",
            f"127.0.0.1:{port}",
            "--streaming",
            "--async",
        ]
        command += ["--input-data", str(data), "--profile-export-file", str(export)]
        command += ["--concurrency-range", str(clients), "--request-count", str(requests)]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False)
        if done.returncode or not export.is_file():
            raise SystemExit(f"perf_analyzer failed:\n{done.stderr[:1000]}\n{done.stdout[:1000]}")
        return export.read_text(encoding="utf-8")


def _figures(requests: list[dict[str, Any]], clients: int, new_tokens: int) -> dict[str, Any]:
    """Return what the timestamps (nanoseconds) say; every request has made `new_tokens` tokens."""
    short = [request for request in requests if len(request["response_timestamps"]) < 2]
    if short:
        raise SystemExit(f"{len(short)} of {len(requests)} requests got no stream")
    sent = np.array([request["timestamp"] for request in requests])
    first, last = (np.array([request["response_timestamps"][at] for request in requests]) for at in (0, -1))
    spent_s = (last.max() - sent.min()) / 1e9
    ttft_ms, decode_ms = (first - sent) / 1e6, (last - first) / 1e6
    return {
        "clients": clients,
        "requests": len(requests),
        "tokens_per_s": round(len(requests) * new_tokens / spent_s, 1),
        "requests_per_s": round(len(requests) / spent_s, 2),
        "ttft_ms_p50": round(float(np.percentile(ttft_ms, 50)), 1),
        "ttft_ms_p99": round(float(np.percentile(ttft_ms, 99)), 1),
        "tpot_ms_p50": round(float(np.percentile(decode_ms, 50)) / (new_tokens - 1), 2),
    }


def recovery(folder: Path, victim: str, repeats: int) -> dict[str, Any]:
    """Kill a process in the middle of a stream; return when the client was told and when the next answer came.

    Each time with a new supervisor, because one waits longer from failure to failure.
    """
    client_told_s, serving_again_s = [], []
    body = {"text_input": "a", "max_tokens": 3000, "ignore_eos": True, "stream": True}
    for _ in range(repeats):
        server = Server(Path(tempfile.mkdtemp(dir=folder)), MODEL, 8)
        try:
            response = server.post("generate_stream", body)
            response.readline()
            began = time.monotonic()
            os.kill(server.pids()[victim == "model process"], signal.SIGKILL)
            with contextlib.suppress(*LOST):
                while response.readline():
                    continue
            client_told_s.append(time.monotonic() - began)
            while not _serves(server):
                if time.monotonic() - began > 60:
                    raise SystemExit("the server did not come back within a minute")
                time.sleep(0.01)
            serving_again_s.append(time.monotonic() - began)
        finally:
            server.stop()
    seconds = {"client_told_s": client_told_s, "serving_again_s": serving_again_s}
    return {"killed": victim, **{name: [round(value, 3) for value in values] for name, values in seconds.items()}}


def _serves(server: Server) -> bool:
    try:
        return server.post("generate", {"text_input": "a", "max_tokens": 1}).status == 200
    except LOST:
        return False


def wide_checkpoint(folder: Path) -> Path:
    """Write a Llama with 2 layers of random weights, hidden size 1024, that has the shipped model's tokenizer."""
    vocabulary = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    write_random_checkpoint(folder, {**MEDIUM, "vocab_size": vocabulary, "num_hidden_layers": 2})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder)
    return folder


def conditions() -> dict[str, Any]:
    """Return where and with what this was measured."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False).stdout
    models = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    packages = ("chunkkv-trt", "onnxruntime", "numpy", "nvidia-pytriton", "tritonclient")
    return {
        "commit": commit,
        "changed_files": len([line for line in changed.splitlines() if not line.startswith("??")]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores, no GPU",
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "engine": "ONNX Runtime, float32, 1 thread; clients, server and engine share the cores",
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests_per_client", type=int, default=4, help="for the wide model, half as many")
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    facts = {**conditions(), "slots": max(arguments.clients), "prompt": PROMPT.name, "new_tokens": arguments.new_tokens}
    load = []
    with tempfile.TemporaryDirectory(prefix="chunkkv-load-") as name:
        folder = Path(name)
        tool = PerfAnalyzer(folder)
        for case, model, flags, requests in (
            ("shipped model", MODEL, (), arguments.requests_per_client),
            ("shipped model, 50 ms per response", MODEL, ("--stream_interval_ms", "50"), arguments.requests_per_client),
            ("wide model", wide_checkpoint(folder / "wide"), (), max(arguments.requests_per_client // 2, 2)),
        ):
            place = Path(tempfile.mkdtemp(dir=folder))
            server = Server(place, model, max(arguments.clients), *flags)
            try:
                rows = [tool.run(server.grpc, n, requests * n, arguments.new_tokens) for n in arguments.clients]
            finally:
                server.stop()
            base = rows[0]["tokens_per_s"]
            load += [{"case": case, **row, "speedup": round(row["tokens_per_s"] / base, 2)} for row in rows]
        recoveries = [recovery(folder, victim, arguments.kills) for victim in ("model process", "server")]
    table = Table(title="Load on tritonserver")
    for name in load[0]:
        table.add_column(name, justify="right")
    for row in load:
        table.add_row(*map(str, row.values()))
    Console(stderr=True).print(table)
    line = json.dumps({**facts, "load": load, "recovery": recoveries})
    print(line)
    if arguments.output is not None:
        write_whole(arguments.output, json.dumps(json.loads(line), indent=2) + "\n")


if __name__ == "__main__":
    main()
