"""Clients that send prompts of mixed lengths one after the other and read the answers as streams."""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.servers import Kind, Running

TEXT = Path(__file__).parents[1] / "texts" / "moby_dick_chapter_1.txt"
WORDS = (45, 95, 45, 190, 95, 380, 45, 190)  # of the prompts in turn; about 4 tokens for 3 words
NEW = (16, 32, 24, 8)


@dataclass
class Clients:
    """What the clients of one load do and see.

    Parameters
    ----------
    server : Running
        Whom they ask.
    kind : Kind
        How they ask.
    requests : int
        How many requests they send together.
    keep : float
        Keep ratio of all of them.
    """

    server: Running
    kind: Kind
    requests: int
    keep: float
    streams: list[list[float]] = field(default_factory=list)  # seconds from each request to its pieces
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._words = TEXT.read_text("utf-8").split()
        self._numbers: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(self.requests):
            self._numbers.put(number)

    def run(self, ready: threading.Barrier) -> None:
        """Send requests until none is left."""
        ready.wait()
        while True:
            try:
                number = self._numbers.get_nowait()
            except queue.Empty:
                return
            try:
                self.streams.append(self._stream(number))
            except Exception as error:
                self.failures.append(f"request {number}: {error!r}")

    def _stream(self, number: int) -> list[float]:
        body = json.dumps(self.kind.body(self._prompt(number), NEW[number % len(NEW)], self.keep)).encode()
        began = time.perf_counter()
        with self.server.post(self.kind.path, body) as response:
            if response.status != 200:
                raise RuntimeError(f"status {response.status}: {response.read()!r}")
            return [time.perf_counter() - began for line in response if self.kind.is_token(line.decode())]

    def _prompt(self, number: int) -> str:
        """Return another part of the text for each request, so that no two begin alike."""
        count = WORDS[number % len(WORDS)]
        start = number * 37 % (len(self._words) - count)
        return " ".join(self._words[start : start + count])


def load_of(server: Running, kind: Kind, clients: int, requests: int, keep: float) -> dict[str, Any]:
    """Return what `clients` clients see that send `requests` requests together; raises RuntimeError for a failed one.

    Rates count the tokens of the answers. The CPU time is the server's.
    """
    seen, ready = Clients(server, kind, requests, keep), threading.Barrier(clients + 1)
    threads = [threading.Thread(target=seen.run, args=(ready,)) for _ in range(clients)]
    for thread in threads:
        thread.start()
    before, loads = server.cpu_seconds(), [os.getloadavg()[0]]
    ready.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    wall, cpu = time.perf_counter() - began, server.cpu_seconds() - before
    loads.append(os.getloadavg()[0])
    if seen.failures or not all(seen.streams):
        raise RuntimeError("; ".join(seen.failures) or "a stream had no token")
    tokens = sum(NEW[number % len(NEW)] for number in range(requests))
    firsts = [pieces[0] for pieces in seen.streams]
    gaps = [max(np.diff(pieces), default=0.0) for pieces in seen.streams]
    return {
        "clients": clients,
        "keep_ratio": keep,
        "requests": requests,
        "new_tokens": tokens,
        "wall_s": round(wall, 2),
        "tokens_per_s": round(tokens / wall, 2),
        "server_cpu_s": round(cpu, 2),
        "tokens_per_cpu_s": round(tokens / cpu, 2) if cpu else None,
        "ttft_p50_s": round(float(np.percentile(firsts, 50)), 3),
        "ttft_p99_s": round(float(np.percentile(firsts, 99)), 3),
        "longest_gap_s": round(float(max(gaps)), 3),
        "machine_load": [round(value, 1) for value in loads],
    }
