"""The two servers that are measured, each in a process of its own on free ports, and how a request is sent to them."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

START_S = 120.0
LOST = (OSError, http.client.HTTPException)


@dataclass(frozen=True)
class Running:
    """A server that runs.

    Parameters
    ----------
    port : int
        Its HTTP port on the loopback interface.
    process : psutil.Process
        The process that was started; the engine runs in it or in a child.
    log : Path
        What it writes.
    """

    port: int
    process: psutil.Process
    log: Path

    @property
    def url(self) -> str:
        """The address."""
        return f"http://127.0.0.1:{self.port}"

    def post(self, path: str, body: bytes, timeout: float = 1200) -> http.client.HTTPResponse:
        """Return the open response to a request with a JSON body; closing it closes the connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        connection.request("POST", path, body, {"Content-Type": "application/json", "Connection": "close"})
        return connection.getresponse()

    def cpu_seconds(self) -> float:
        """Return the CPU time of the process and its children."""
        total = 0.0
        for each in (self.process, *self.process.children(recursive=True)):
            times = each.cpu_times()
            total += times.user + times.system
        return total


class Kind(Protocol):
    """How a stream is asked of a server."""

    path: str

    @staticmethod
    def body(prompt: str, new: int, keep: float) -> dict[str, Any]:
        """Return the body of a request for `new` tokens."""

    @staticmethod
    def is_token(line: str) -> bool:
        """Return whether a line of the stream is a token, or several that came together."""


class OwnServer:
    """Asks `chunkkv serve`."""

    path = "/v1/completions"

    @staticmethod
    def body(prompt: str, new: int, keep: float) -> dict[str, Any]:
        """Return the body of a request."""
        steering = {"temperature": 0, "ignore_eos": True, "stream": True, "keep_ratio": keep}
        return {"prompt": prompt, "max_tokens": new, **steering}

    @staticmethod
    def is_token(line: str) -> bool:
        """Return whether a line of the stream is a token."""
        if line.startswith('data: {"error"'):
            raise RuntimeError(line)
        return line.startswith("data: {") and '"choices":[{' in line


class TritonServer:
    """Asks the model of `chunkkv triton serve`."""

    path = "/v2/models/chunkkv/generate_stream"

    @staticmethod
    def body(prompt: str, new: int, keep: float) -> dict[str, Any]:
        """Return the body of a request."""
        return {"text_input": prompt, "max_tokens": new, "ignore_eos": True, "stream": True, "keep_ratio": keep}

    @staticmethod
    def is_token(line: str) -> bool:
        """Return whether a line of the stream is a token, or several that came together."""
        if '"error"' in line:
            raise RuntimeError(line)
        return line.startswith("data: {")


@contextmanager
def own_server(engine_dir: Path, *flags: str) -> Iterator[Running]:
    """Run `chunkkv serve`, with a model that is called `model`."""
    (port,) = free_ports(1)
    named = ["--engine_dir", str(engine_dir), "--port", str(port), "--model_name", "model"]
    with _running([sys.executable, "-m", "chunkkv", "serve", *named, *flags], port, "/health") as server:
        yield server


@contextmanager
def triton_server(engine_dir: Path, python: str, *init_flags: str) -> Iterator[Running]:
    """Run `chunkkv triton serve` in the environment of `python`."""
    port, grpc, metrics = free_ports(3)
    with tempfile.TemporaryDirectory() as folder:
        base, repository = [python, "-m", "chunkkv", "triton"], ["--model_repository", f"{folder}/models"]
        init = [*base, "init", "--engine_dir", str(engine_dir), *repository, *init_flags]
        subprocess.run(init, check=True, stdout=subprocess.DEVNULL)
        ports = ["--http_port", str(port), "--grpc_port", str(grpc), "--metrics_port", str(metrics)]
        with _running([*base, "serve", *repository, *ports], port, "/v2/models/chunkkv/ready") as server:
            yield server


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback interface that are free now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(taken.getsockname()[1]) for taken in sockets]
    for taken in sockets:
        taken.close()
    return ports


@contextmanager
def _running(command: Sequence[str], port: int, health: str) -> Iterator[Running]:
    """Run a server until the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ})
        try:
            until = time.monotonic() + START_S
            while not _is_healthy(port, health):
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(log.read_text(errors="replace")[-2000:])
                time.sleep(0.1)
            yield Running(port, psutil.Process(process.pid), log)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _is_healthy(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except LOST:
        return False
    finally:
        connection.close()
