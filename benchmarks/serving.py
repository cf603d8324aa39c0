"""What clients of a server see: throughput, first tokens and longest gaps under load, and a conversation.

The load: 1, 8 and 32 clients at once, which send prompts of mixed lengths one after the other and read the answers as
streams, at keep ratio 1.0 and 0.2; nothing is held between requests. The conversation: two questions about one document
with the package openai; the second goes on from what the server holds.

    python benchmarks/serving.py --engine_dir engines/smollm2 --output docs/benchmarks/serving.json

With --triton_python, the Python of an environment with a tritonserver (docs/triton.md), the load runs on `chunkkv
triton serve` as well. Clients, server and engine share the machine: the CPU time of the server is measured beside the
time on the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil

import chunkkv
from chunkkv.files import write_whole

TEXT = Path(__file__).parent / "texts" / "moby_dick_chapter_1.txt"
WORDS = (45, 95, 45, 190, 95, 380, 45, 190)  # of the prompts in turn; about 4 tokens for 3 words
NEW = (16, 32, 24, 8)
COMMAND = "make bench-serving"
CLIENTS, KEEPS = (1, 8, 32), (1.0, 0.2)
QUESTIONS = ("What does the narrator do when he feels grim?", "Why does he go to sea as a sailor?")
START_S = 120.0
LIMITS = ("--context_bytes", "0", "--queue_timeout_s", "600")


@dataclass
class StreamTimes:
    """When the pieces of one answer came, in seconds from its request."""

    pieces: list[float] = field(default_factory=list)


def client_prompt(words: Sequence[str], number: int) -> str:
    """Return the prompt of a request: another part of the text for each, so that no two begin alike."""
    count = WORDS[number % len(WORDS)]
    start = number * 37 % (len(words) - count)
    return " ".join(words[start : start + count])


class OwnServer:
    """Sends a request to `chunkkv serve`."""

    path = "/v1/completions"

    @staticmethod
    def body(prompt: str, new: int, keep: float) -> dict[str, Any]:
        """Return the body of a request."""
        steering = {"temperature": 0, "ignore_eos": True, "stream": True, "keep_ratio": keep}
        return {"prompt": prompt, "max_tokens": new, **steering}

    @staticmethod
    def is_token(line: str) -> bool:
        """Return whether a line of the stream is a token."""
        return line.startswith("data: {") and '"choices":[{' in line


class TritonServer:
    """Sends a request to the model of `chunkkv triton serve`."""

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


def load_of(kind: Any, url: str, clients: int, requests: int, keep: float, process: psutil.Process) -> dict[str, Any]:
    """Return what `clients` clients see that send `requests` requests together."""
    words = TEXT.read_text("utf-8").split()
    numbers: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(requests):
        numbers.put(number)
    streams: list[StreamTimes] = []
    failures: list[str] = []
    ready = threading.Barrier(clients + 1)

    def run() -> None:
        with httpx.Client(base_url=url, timeout=1200) as client:
            ready.wait()
            while True:
                try:
                    number = numbers.get_nowait()
                except queue.Empty:
                    return
                times, began = StreamTimes(), time.perf_counter()
                body = kind.body(client_prompt(words, number), NEW[number % len(NEW)], keep)
                with client.stream("POST", kind.path, json=body) as response:
                    if response.status_code != 200:
                        failures.append(f"request {number}: {response.status_code} {response.read()!r}")
                    for line in response.iter_lines():
                        if kind.is_token(line):
                            times.pieces.append(time.perf_counter() - began)
                streams.append(times)

    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    before, loads = cpu_seconds(process), [os.getloadavg()[0]]
    ready.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    wall, cpu = time.perf_counter() - began, cpu_seconds(process) - before
    loads.append(os.getloadavg()[0])
    if failures:
        raise RuntimeError("; ".join(failures))
    tokens = sum(NEW[number % len(NEW)] for number in range(requests))
    firsts = [times.pieces[0] for times in streams]
    gaps = [max(np.diff(times.pieces), default=0.0) for times in streams]
    return {
        "clients": clients,
        "keep_ratio": keep,
        "requests": requests,
        "new_tokens": tokens,
        "wall_s": round(wall, 2),
        "tokens_per_s": round(tokens / wall, 2),
        "server_cpu_s": round(cpu, 2),
        "tokens_per_cpu_s": round(tokens / cpu, 2),
        "ttft_p50_s": round(float(np.percentile(firsts, 50)), 3),
        "ttft_p99_s": round(float(np.percentile(firsts, 99)), 3),
        "longest_gap_s": round(float(max(gaps)), 3),
        "machine_load": [round(value, 1) for value in loads],
    }


def cpu_seconds(process: psutil.Process) -> float:
    """Return the CPU time of a process and its children."""
    total = 0.0
    for each in (process, *process.children(recursive=True)):
        times = each.cpu_times()
        total += times.user + times.system
    return total


def free_port() -> int:
    """Return a port of the loopback interface that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@contextmanager
def running(command: list[str], url: str, health: str) -> Iterator[psutil.Process]:
    """Run a server until the block ends."""
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        until = time.monotonic() + START_S
        while not is_healthy(url + health):
            if process.poll() is not None or time.monotonic() > until:
                log.seek(0)
                raise RuntimeError(log.read().decode(errors="replace")[-2000:])
            time.sleep(0.1)
        try:
            yield psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)


def is_healthy(url: str) -> bool:
    """Return whether a server answers."""
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@contextmanager
def own_server(engine_dir: Path, *flags: str) -> Iterator[tuple[str, psutil.Process]]:
    """Run `chunkkv serve`."""
    url, port = "", free_port()
    url = f"http://127.0.0.1:{port}"
    named = ["--engine_dir", str(engine_dir), "--port", str(port), "--model_name", "model"]
    with running([sys.executable, "-m", "chunkkv", "serve", *named, *flags], url, "/health") as process:
        yield url, process


@contextmanager
def triton_server(engine_dir: Path, python: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Run `chunkkv triton serve` in the environment of that Python."""
    http, grpc, metrics = free_port(), free_port(), free_port()
    with tempfile.TemporaryDirectory() as folder:
        repository = ["--model_repository", f"{folder}/models"]
        base = [str(python), "-m", "chunkkv", "triton"]
        init = [*base, "init", "--engine_dir", str(engine_dir), *repository, "--queue_timeout_s", "600"]
        subprocess.run(init, check=True, capture_output=True)
        ports = ["--http_port", str(http), "--grpc_port", str(grpc), "--metrics_port", str(metrics)]
        url = f"http://127.0.0.1:{http}"
        with running([*base, "serve", *repository, *ports], url, "/v2/models/chunkkv/ready") as process:
            yield url, process


def first_token(client: openai.OpenAI, messages: list[Any], keep: float) -> dict[str, Any]:
    """Ask and return the answer, its usage, and when its first token came."""
    began, first, text, usage = time.perf_counter(), 0.0, "", None
    stream = client.chat.completions.create(
        model="model",
        messages=messages,
        max_tokens=32,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"keep_ratio": keep},
    )
    for chunk in stream:
        first = first or time.perf_counter() - began
        usage = chunk.usage or usage
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert usage is not None and usage.prompt_tokens_details is not None
    details = usage.prompt_tokens_details.model_dump()
    counts = {
        "prompt_tokens": usage.prompt_tokens,
        **{name: details[name] for name in ("cached_tokens", "kept_tokens")},
    }
    return {"ttft_s": round(first, 3), **counts, "answer": text}


def conversation(engine_dir: Path, keep: float) -> dict[str, Any]:
    """Return two questions about one document of about 4,000 tokens, the second behind what the server holds."""
    document = TEXT.read_text("utf-8")
    document += "\n\n" + document[: len(document) // 3]  # about 4,000 tokens
    with own_server(engine_dir) as (url, process):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=1200, max_retries=0)
        first_token(client, [{"role": "user", "content": "Hello"}], keep)  # memory and caches of the process
        before = cpu_seconds(process)
        messages: list[Any] = [{"role": "user", "content": f"{document}\n\n{QUESTIONS[0]}"}]
        first = first_token(client, messages, keep)
        between = cpu_seconds(process)
        messages += [{"role": "assistant", "content": first["answer"]}, {"role": "user", "content": QUESTIONS[1]}]
        second = first_token(client, messages, keep)
        after = cpu_seconds(process)
    first["server_cpu_s"], second["server_cpu_s"] = round(between - before, 2), round(after - between, 2)
    ratio = round(first["ttft_s"] / second["ttft_s"], 1)
    return {"keep_ratio": keep, "first": first, "second": second, "times_sooner": ratio}


def main() -> None:
    """Measure and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine_dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--triton_python", type=Path)
    parser.add_argument("--requests", type=int, default=32, help="requests of a load; a quarter of them for one client")
    args = parser.parse_args()
    values: dict[str, Any] = {"machine": machine(), "chunkkv": chunkkv.__version__, "command": COMMAND}
    values["conversation"] = [conversation(args.engine_dir, keep) for keep in KEEPS]
    servers: list[tuple[str, Any, Callable[[], Any]]] = [
        ("chunkkv serve", OwnServer, lambda: own_server(args.engine_dir, *LIMITS))
    ]
    if args.triton_python is not None:
        servers.append(("chunkkv triton", TritonServer, lambda: triton_server(args.engine_dir, args.triton_python)))
    for name, kind, start in servers:
        values[name] = []
        with start() as (url, process):
            load_of(kind, url, 1, 2, 1.0, process)  # memory and caches of the process
            for clients in CLIENTS:
                for keep in KEEPS:
                    requests = args.requests // 4 if clients == 1 else args.requests
                    values[name].append(load_of(kind, url, clients, requests, keep, process))
                    print(name, json.dumps(values[name][-1]), flush=True)
                    write_whole(args.output, json.dumps(values, indent=2) + "\n")


def machine() -> str:
    """Return what the numbers were measured on."""
    return f"{len(os.sched_getaffinity(0))} CPUs, shared by clients and server"


if __name__ == "__main__":
    main()
