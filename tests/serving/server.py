"""A supervised tritonserver for tests, and clients for it."""

from __future__ import annotations

import http.client
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tritonclient.grpc as grpc_client

from chunkkv.triton.server.processes import is_running, model_processes

CHUNKKV = [sys.executable, "-m", "chunkkv.cli.main"]
DTYPES = {"max_tokens": "INT32", "seed": "UINT64", "top_k": "INT32", "budget_tokens": "INT32"}


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Return the first true value of `condition`; fails after `seconds`."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, "it never came"
        time.sleep(0.02)
    return value


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [taken.getsockname()[1] for taken in sockets]
    for taken in sockets:
        taken.close()
    return ports


class Server:
    """`chunkkv triton serve` in a process of its own, on free ports, with its log in a file."""

    def __init__(self, repository: Path, log: Path, *flags: str) -> None:
        self.http, self.grpc, self.metrics = free_ports(3)
        ports = {"http_port": self.http, "grpc_port": self.grpc, "metrics_port": self.metrics}
        named = [part for name, port in ports.items() for part in (f"--{name}", str(port))]
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*CHUNKKV, "triton", "serve", "--model_repository", str(repository), *named, *flags],
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """Return the log's JSON lines, those of one event if named."""
        lines = [json.loads(line) for line in re.findall(r"^\{.*\}$", self.text(), re.MULTILINE)]
        return [line for line in lines if name in (None, line["event"])]

    def text(self) -> str:
        """Return the log."""
        return self._log.read_text(errors="replace")

    def wait_ready(self, times: int = 1) -> dict[str, Any]:
        """Wait until the server has become ready for the nth time; return what the log says of it."""

        def ready() -> list[dict[str, Any]]:
            assert self.process.poll() is None or len(self.events("server_ready")) >= times, self.text()[-3000:]
            return self.events("server_ready")[times - 1 : times]

        return wait_for(ready, 60)[0]

    @property
    def server_pid(self) -> int:
        """The tritonserver of now."""
        return self.events("server_started")[-1]["pid"]

    @property
    def shm_prefix(self) -> str:
        """The shared-memory prefix of the tritonserver of now."""
        command = " ".join(psutil.Process(self.server_pid).cmdline())
        return re.search(r"shm-region-prefix-name=(\w+)", command)[1]

    def model_processes(self) -> frozenset[int]:
        """The processes that run the models."""
        return model_processes(self.shm_prefix)

    def generate(self, body: dict[str, Any] | bytes, model: str = "chunkkv", timeout: float = 60) -> tuple[int, Any]:
        """POST to /generate; return status and answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http, timeout=timeout)
        try:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request("POST", f"/v2/models/{model}/generate", data)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def open_stream(self, body: dict[str, Any], model: str = "chunkkv") -> http.client.HTTPResponse:
        """POST to /generate_stream and return the open response."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http, timeout=60)
        connection.request("POST", f"/v2/models/{model}/generate_stream", json.dumps({**body, "stream": True}))
        return connection.getresponse()

    def stream(self, body: dict[str, Any], model: str = "chunkkv") -> list[dict[str, Any]]:
        """POST to /generate_stream and return the events."""
        return list(sse(self.open_stream(body, model)))

    def metric(self, name: str, **labels: str) -> float:
        """Return the value of a metric, summed over what the labels leave open."""
        connection = http.client.HTTPConnection("127.0.0.1", self.metrics, timeout=20)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        wanted = [line for line in lines if re.match(name + r"[{ ]", line)]
        wanted = [line for line in wanted if all(f'{key}="{value}"' in line for key, value in labels.items())]
        assert wanted, f"{name} {labels} is not published"
        return sum(float(line.rsplit(" ", 1)[1]) for line in wanted)

    def stop(self, number: int = signal.SIGTERM, timeout: float = 60) -> int:
        """Send a signal to the supervisor and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout)

    def kill(self) -> None:
        """End everything, whatever state it is in."""
        pids = [event["pid"] for event in self.events("server_started")]
        prefix = self.shm_prefix if self.process.poll() is None and is_running(pids[-1]) else None
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in pids:
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for region in Path("/dev/shm").glob(f"{prefix}*"):
            region.unlink(missing_ok=True)


def sse(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Yield the events of an open stream."""
    for line in response:
        if line.startswith(b"data: "):
            yield json.loads(line[6:])


class GrpcStream:
    """One request over gRPC streaming; its results come by next()."""

    def __init__(
        self,
        server: Server,
        inputs: list[Any],
        model: str = "chunkkv",
        request_id: str = "",
        outputs: Sequence[str] | None = None,
    ) -> None:
        self.client = grpc_client.InferenceServerClient(f"127.0.0.1:{server.grpc}")
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.client.start_stream(lambda result, error: self._results.put(error if result is None else result))
        listed = None if outputs is None else [grpc_client.InferRequestedOutput(name) for name in outputs]
        self.client.async_stream_infer(
            model, inputs, request_id=request_id, outputs=listed, enable_empty_final_response=True
        )

    def next(self, timeout: float = 30) -> Any:
        """Return the next result; raises the error where it is one."""
        result = self._results.get(timeout=timeout)
        if isinstance(result, Exception):
            raise result
        return result

    def all(self) -> list[Any]:
        """Return all results up to the final one."""
        results = [self.next()]
        while not results[-1].get_response().parameters["triton_final_response"].bool_param:
            results.append(self.next())
        return results

    def close(self, cancel: bool = False) -> None:
        """End the stream."""
        self.client.stop_stream(cancel_requests=cancel)
        self.client.close()


def tensor(name: str, values: Any, dtype: str) -> Any:
    """Return an input tensor [1,n]."""
    kinds = {"BYTES": object, "INT32": np.int32, "FP32": np.float32, "BOOL": bool, "UINT64": np.uint64}
    array = np.array(values, dtype=kinds[dtype])
    array = array.reshape(1, -1) if array.ndim < 2 else array
    infer_input = grpc_client.InferInput(name, array.shape, dtype)
    infer_input.set_data_from_numpy(array)
    return infer_input


def text_request(text: str | bytes, max_tokens: int = 8, stream: bool = True) -> list[Any]:
    """Return the tensors of a plain request."""
    data = text.encode() if isinstance(text, str) else text
    return [
        tensor("text_input", [data], "BYTES"),
        tensor("max_tokens", [max_tokens], "INT32"),
        tensor("stream", [stream], "BOOL"),
    ]


def gone(pids: frozenset[int] | list[int]) -> bool:
    """Return whether none of the processes runs any more."""
    return not any(is_running(pid) for pid in pids)
