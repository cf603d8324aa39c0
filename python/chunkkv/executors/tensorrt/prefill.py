"""Prefill on TensorRT: one engine run for several prompts, which compacts their caches before it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np

from chunkkv import profiling
from chunkkv.cache_layout import shown_slots
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
        inputs, capacity = _prefill_inputs(requests, self._contract.window), _aligned_int64(out.capacity)
        rows, padded = inputs["input_ids"].shape
        outputs: dict[str, np.ndarray] = {"logits": np.empty((rows, 1, self._contract.vocab_size), np.float32)}
        outputs["kept_lengths"] = np.empty((len(out.capacity), rows), np.int32)
        for part in sorted(set(self._contract.choices.values())):
            outputs[f"kept_indices.{part}"] = np.empty(self._choice_shape(part, rows, padded), np.int32)
        for part in self._contract.scored:
            outputs[f"token_scores.{part}"] = np.empty(self._choice_shape(part, rows, padded), np.float32)
        if not self._contract.leaders:
            del inputs["keep_per_10k"], inputs["budget_tokens"]
        if not self._contract.window:
            del inputs["window"]
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
        for part, (key, value) in enumerate(zip(out.keys, out.values, strict=True)):
            context.bind(f"kept_key.{part}", key)
            context.bind(f"kept_value.{part}", value)
        context.enqueue(stream)
        for name, array in outputs.items():
            stream.download(array, places[name])
        stream.synchronize()
        for row, request in enumerate(requests):
            if (kept := tuple(outputs["kept_lengths"][:, row].tolist())) != request.class_lengths:
                raise EngineRunError(
                    f"the engine kept {shown_slots(kept)} of {len(request.ids)} tokens, expected "
                    f"{shown_slots(request.class_lengths)}: "
                    "plugins and runtime are of different versions"
                )
        return outputs

    def _choice_shape(self, part: int, rows: int, padded: int) -> tuple[int, ...]:
        """Return the shape of what the engine tells of the choice of a part, [B,S] or [B,H,S]."""
        if self._contract.heads_choose and part in self._contract.scored:
            return rows, len(self._contract.layout.parts[part].kv_heads), padded
        return rows, padded

    def _choice(self, row: int, request: Request, outputs: dict[str, np.ndarray]) -> Choice | None:
        contract, length, lengths = self._contract, len(request.ids), request.class_lengths
        if request.kept_tokens == length or not contract.leaders:
            return None
        kept = {part: lengths[contract.layout.parts[part].length_class] for part in contract.leaders}
        return Choice(
            {part: outputs[f"kept_indices.{of}"][row][..., : kept[part]] for part, of in contract.choices.items()},
            {part: outputs[f"token_scores.{part}"][row][..., :length] for part in contract.scored},
            lengths,
        )


def _prefill_inputs(requests: Sequence[Request], window: int) -> dict[str, np.ndarray]:
    """Return the prompts as one batch, right-padded with token 0; `window` is that of requests without their own."""
    ids = np.zeros((len(requests), max(len(request.ids) for request in requests)), np.int64)
    for row, request in enumerate(requests):
        ids[row, : len(request.ids)] = request.ids
    columns = {
        "lengths": [len(request.ids) for request in requests],
        "keep_per_10k": [request.keep_per_10k for request in requests],
        "budget_tokens": [request.budget_tokens for request in requests],
        "window": [request.window or window for request in requests],
    }
    return {"input_ids": ids, **{name: np.array(column, np.int32) for name, column in columns.items()}}


def _aligned_int64(values: Sequence[int]) -> np.ndarray:
    """Return `values` as int64 on the host at an aligned address, from where TensorRT reads them as shapes."""
    memory = np.zeros(ALIGNMENT // 8 + len(values), np.int64)
    start = -memory.ctypes.data % ALIGNMENT // 8
    memory[start : start + len(values)] = values
    return memory[start : start + len(values)]
