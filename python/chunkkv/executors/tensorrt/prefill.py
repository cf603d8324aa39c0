"""Prefill on TensorRT: one engine run for several prompts, which compacts their caches before it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np

from chunkkv import profiling
from chunkkv.engine.tensorrt_contract import PREFILL_FILE
from chunkkv.errors import EngineRunError
from chunkkv.executors.interface import (
    Choice,
    Prefiller,
    PrefillProgress,
    PrefillResult,
    no_progress,
)
from chunkkv.executors.tensorrt.cache import DeviceKVCache
from chunkkv.executors.tensorrt.engines import TensorRTEngines, aligned
from chunkkv.executors.whole_prefill import WholePrefillRun
from chunkkv.gpu.cuda_runtime import ALIGNMENT
from chunkkv.requests import Request


class PrefillContext:
    """The one execution context of the prefill engine; hold `lock` while it runs."""

    def __init__(self, engines: TensorRTEngines) -> None:
        self.lock = threading.Lock()
        self.context = engines.new_context(engines.load(PREFILL_FILE))


class TensorRTPrefiller(Prefiller[DeviceKVCache]):
    """Prefills prompts as one right-padded batch and has the engine write the kept rows straight into the cache."""

    def __init__(self, engines: TensorRTEngines, prefill: PrefillContext) -> None:
        self._engines, self._contract, self._prefill = engines, engines.contract, prefill
        self._stream = engines.cuda.stream()

    @property
    def max_rows(self) -> int:
        """Prompts that one run takes."""
        return self._contract.prefill_rows

    def start(
        self, requests: Sequence[Request], out: DeviceKVCache, progress: PrefillProgress = no_progress
    ) -> WholePrefillRun:
        """Return the prefill of the prompts into `out`, which is one run of the engine."""
        return WholePrefillRun(sum(len(request.ids) for request in requests), lambda: self._prefill_all(requests, out))

    def _prefill_all(self, requests: Sequence[Request], out: DeviceKVCache) -> list[PrefillResult]:
        started = time.perf_counter()
        with self._prefill.lock, profiling.range_of("prefill", requests):
            outputs = self._run(requests, out)
        seconds, contract = time.perf_counter() - started, self._contract
        padded = max(len(request.ids) for request in requests)
        scratch = 2 * contract.group_layers * contract.row_bytes(padded)
        return [
            PrefillResult(outputs["logits"][row, 0], self._choice(row, request, outputs), seconds, 0.0, scratch)
            for row, request in enumerate(requests)
        ]

    def _run(self, requests: Sequence[Request], out: DeviceKVCache) -> dict[str, np.ndarray]:
        """Bind everything, run once, and return the outputs that are not caches, on the host."""
        engines, context, stream = self._engines, self._prefill.context, self._stream
        inputs, capacity = _prefill_inputs(requests), _aligned_int64(out.capacity[0])
        rows, padded = inputs["input_ids"].shape
        outputs: dict[str, np.ndarray] = {"logits": np.empty((rows, 1, self._contract.vocab_size), np.float32)}
        outputs["kept_lengths"] = np.empty((1, rows), np.int32)
        for leader in self._contract.leaders:
            outputs[f"kept_indices.{leader}"] = np.empty((rows, padded), np.int32)
            outputs[f"token_scores.{leader}"] = np.empty((rows, padded), np.float32)
        if not self._contract.leaders:
            del inputs["keep_per_10k"], inputs["budget_tokens"]
        arrays = {**inputs, **outputs}
        starts = np.cumsum([0, *(aligned(array.nbytes) for array in arrays.values())])
        buffer = engines.cuda.device_memory(int(starts[-1]))
        places = {name: buffer.address + int(start) for name, start in zip(arrays, starts, strict=False)}
        for name, array in inputs.items():
            stream.upload(places[name], array)
            context.set_shape(name, array.shape)
        for name, address in places.items():
            context.bind(name, address)
        context.bind("capacity", capacity.ctypes.data)
        for layer in range(self._contract.num_layers):
            context.bind(f"kept_key.{layer}", out.keys[layer])
            context.bind(f"kept_value.{layer}", out.values[layer])
        context.enqueue(stream)
        for name, array in outputs.items():
            stream.download(array, places[name])
        stream.synchronize()
        for row, request in enumerate(requests):
            if (kept := outputs["kept_lengths"][0, row]) != request.kept_tokens:
                raise EngineRunError(
                    f"the engine kept {kept} of {len(request.ids)} tokens, expected {request.kept_tokens}: "
                    "plugins and runtime are of different versions"
                )
        return outputs

    def _choice(self, row: int, request: Request, outputs: dict[str, np.ndarray]) -> Choice | None:
        kept, length = request.kept_tokens, len(request.ids)
        if kept == length or not self._contract.leaders:
            return None
        leaders = self._contract.leaders
        return Choice(
            {leader: outputs[f"kept_indices.{leader}"][row, :kept] for leader in leaders},
            {leader: outputs[f"token_scores.{leader}"][row, :length] for leader in leaders},
            (kept,),
        )


def _prefill_inputs(requests: Sequence[Request]) -> dict[str, np.ndarray]:
    """Return the prompts as one batch, right-padded with token 0."""
    ids = np.zeros((len(requests), max(len(request.ids) for request in requests)), np.int64)
    for row, request in enumerate(requests):
        ids[row, : len(request.ids)] = request.ids
    columns = {
        "lengths": [len(request.ids) for request in requests],
        "keep_per_10k": [request.keep_per_10k for request in requests],
        "budget_tokens": [request.budget_tokens for request in requests],
    }
    return {"input_ids": ids, **{name: np.array(column, np.int32) for name, column in columns.items()}}


def _aligned_int64(value: int) -> np.ndarray:
    """Return [value] int64 on the host at an aligned address, from where TensorRT reads it as a shape."""
    memory = np.zeros(2 * ALIGNMENT // 8, np.int64)
    start = -memory.ctypes.data % ALIGNMENT // 8
    memory[start] = value
    return memory[start : start + 1]
