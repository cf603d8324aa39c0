"""How long after a kill -9 in the middle of a stream its client knows, and until the next request is answered."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.serving.servers import LOST, Running, triton_server
from chunkkv.triton.server.processes import model_processes

VICTIMS = ("model process", "server")
_MODEL = "/v2/models/chunkkv"


def recovery(engine_dir: Path, python: str, victim: str, repeats: int) -> dict[str, Any]:
    """Kill one of VICTIMS `repeats` times.

    Each time with a new supervisor, because one waits longer from failure to failure.
    """
    client_told_s, serving_again_s = [], []
    body = {"text_input": "a", "max_tokens": 3000, "ignore_eos": True, "stream": True}
    for _ in range(repeats):
        with triton_server(engine_dir, python, "--threads", "1") as server:
            _wait_until_watched(server)
            response = server.post(f"{_MODEL}/generate_stream", json.dumps(body).encode(), 60)
            response.readline()
            began = time.monotonic()
            os.kill(_pids(server)[victim], signal.SIGKILL)
            with contextlib.suppress(*LOST):
                while response.readline():
                    continue
            client_told_s.append(time.monotonic() - began)
            while not _serves(server):
                if time.monotonic() - began > 60:
                    raise RuntimeError("the server did not come back within a minute")
                time.sleep(0.01)
            serving_again_s.append(time.monotonic() - began)
    seconds = {"client_told_s": client_told_s, "serving_again_s": serving_again_s}
    return {"killed": victim, **{name: [round(value, 3) for value in values] for name, values in seconds.items()}}


def _pids(server: Running) -> dict[str, int]:
    """Return the server's and the model's process."""
    lines = re.findall(r'^\{.*"server_started".*\}$', server.log.read_text(), re.MULTILINE)
    pid = json.loads(lines[-1])["pid"]
    prefix = re.search(r"shm-region-prefix-name=(\w+)", "\0".join(psutil.Process(pid).cmdline()))
    assert prefix is not None, "the supervisor names the server's shared memory"
    (model,) = model_processes(prefix[1])
    return {"server": pid, "model process": model}


def _wait_until_watched(server: Running) -> None:
    """Wait until the supervisor watches its server; before, it gives a server that loses a process 5 s to end."""
    until = time.monotonic() + 60
    while "server_ready" not in server.log.read_text():
        if time.monotonic() > until:
            raise RuntimeError("the supervisor did not say within a minute that its server is ready")
        time.sleep(0.05)


def _serves(server: Running) -> bool:
    try:
        with server.post(f"{_MODEL}/generate", b'{"text_input": "a", "max_tokens": 1}', 30) as response:
            return response.status == 200
    except LOST:
        return False
