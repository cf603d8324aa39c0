"""How many long prompts a server answers at once within a bound of KV memory, and what answers of mixed lengths cost.

The first table counts requests with prompts of 4,096 tokens that the batcher's own pool admits one after the other, at
keep ratio 1.0 and 0.1. Everything is allocated and written as by the engine: the whole cache of each prompt while it is
prefilled, what it keeps, its row until the end of the answer. Only the forward pass is left out, because hundreds of
them take hours on a CPU. The memory of the process is measured beside the bound.

The second table runs the engine: eight answers at once whose clients gave the same `max_tokens`, and eight whose
clients gave different ones.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from chunkkv import ChunkKVSession, SamplingParams
from chunkkv.batching import BatchingLimits, ContinuousBatcher
from chunkkv.batching.elastic_pool import ElasticPool, ElasticSeat
from chunkkv.batching.seats import Needs
from chunkkv.executors.interface import PrefillResult
from chunkkv.requests import Request

PROMPT, NEW, SLOTS = 4096, 128, 256
MIXED = (60, 120, 250, 500, 1000, 2000, 4000, 7900)


class WrittenPrefills:
    """An executor whose prefills write all that the engine's would, and compute nothing."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def prefiller(self) -> WrittenPrefills:
        """Return itself."""
        return self

    def start(self, requests: Sequence[Request], out: Any, progress: Any = None) -> WrittenRun:
        """Return a prefill of the one request."""
        return WrittenRun(self._executor, requests[0], out)


@dataclass
class WrittenRun:
    """Writes the whole cache of a prompt, and then what it keeps."""

    executor: Any
    request: Request
    out: Any
    tokens_left: int = 0

    def step(self) -> list[PrefillResult]:
        """Write everything."""
        if self.request.kept_tokens < len(self.request.ids):
            whole = self.executor.new_cache(1, len(self.request.ids))
            write(whole, 0, len(self.request.ids))
        write(self.out, 0, self.request.kept_tokens)
        return [PrefillResult(None)]


def write(cache: Any, row: int, slots: int) -> None:
    """Fill the first slots of a row."""
    for array in (*cache.keys, *cache.values):
        array[row, :, :slots] = 1


def resident() -> int:
    """Return the bytes of memory of this process."""
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def capacity(session: ChunkKVSession, bound: int, keep_ratio: float, prompt: int) -> dict[str, Any]:
    """Admit requests until the pool refuses one, and let every answer grow to its end."""
    pool = ElasticPool(WrittenPrefills(session.executor), SLOTS, session.limits.max_seq_len, bound)
    sampling, before, most = SamplingParams(max_new_tokens=NEW), resident(), 0
    seats: list[ElasticSeat] = []
    ids = np.arange(prompt) % 1000 + 3
    while True:
        (request,) = session.requests([ids], sampling, keep_ratio)
        needs = Needs.of(request, NEW)
        if not pool.fits(needs):
            break
        seats.append(pool.take(needs))
        run = seats[-1].prefill(request)
        run.step()
        most = max(most, resident())
        del run
        seats[-1].settle(request.class_lengths)
        write(pool.batch.cache, seats[-1].row, sum(request.slots(NEW)))
    most = max(most, resident())
    held, kept, count = resident() - before, request.kept_tokens, len(seats)
    for seat in seats:
        seat.leave()
    return {
        "kv_bytes": bound,
        "keep_ratio": keep_ratio,
        "kept_tokens": kept,
        "requests": count,
        "resident_bytes": held,
        "most_resident_bytes": most - before,
        "resident_bytes_after": resident() - before,
    }


def mixed_lengths(session: ChunkKVSession, caps: Sequence[int], tokens: int) -> float:
    """Return the CPU milliseconds per token of answers of `tokens` tokens whose clients allow `caps` new ones."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 1000, 50).tolist() for _ in caps]
    with ContinuousBatcher(session, BatchingLimits(slots=len(caps))) as batcher:
        streams = [
            batcher.stream(ids, SamplingParams(max_new_tokens=cap, ignore_eos=True))
            for ids, cap in zip(prompts, caps, strict=True)
        ]
        for stream in streams:
            next(stream)
        began = time.process_time()
        for _ in range(tokens):
            for stream in streams:
                next(stream)
        spent = time.process_time() - began
    return spent / (tokens * len(caps)) * 1e3


def measure(engine_dir: Path, bounds: Sequence[int], tokens: int, prompt: int = PROMPT) -> dict[str, Any]:
    """Return both tables.

    Parameters
    ----------
    engine_dir : Path
        An engine for ONNX Runtime, of at least `prompt` + 128 tokens.
    bounds : sequence of int
        Bytes of KV memory of the first table.
    tokens : int
        Tokens of each answer of the second table.
    prompt : int, default 4096
        Tokens of each prompt of the first table.
    """
    session = ChunkKVSession.from_dir(engine_dir, threads=1)
    longest = session.limits.max_seq_len - 64
    caps = {"same": (60,) * 8, "mixed": tuple(min(cap, longest) for cap in MIXED)}
    rows = [capacity(session, bound, keep, prompt) for bound in bounds for keep in (1.0, 0.1)]
    rounds = [{name: mixed_lengths(session, cap, tokens) for name, cap in caps.items()} for _ in range(2)]
    return {
        "prompt_tokens": prompt,
        "new_tokens": NEW,
        "slots": SLOTS,
        "kv_bytes_per_token": session.executor.kv_bytes_per_token,
        "capacity": rows,
        "max_tokens": caps,
        "cpu_ms_per_token": [{name: round(value, 2) for name, value in row.items()} for row in rounds],
    }
