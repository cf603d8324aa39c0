"""Decode on TensorRT: copies in, engine, copies out, captured as one CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from chunkkv.errors import EngineRunError
from chunkkv.executors.step_arrays import StepArrays, check_slots
from chunkkv.executors.tensorrt.cache import DeviceKVCache
from chunkkv.executors.tensorrt.contexts import EngineContext
from chunkkv.executors.tensorrt.engines import TensorRTEngines, aligned, bind_cache
from chunkkv.gpu.cuda_runtime import Graph


class TensorRTDecoder:
    """Appends tokens to the rows of one cache; idle rows are computed too and write their slot 0.

    The first step runs without a CUDA graph, because capturing needs an engine that has run; where capturing fails,
    all steps do. Where TensorRT for RTX says beforehand that the engine cannot be captured, it makes a CUDA graph of
    its own, around the engine without the copies, if it can.
    """

    def __init__(self, engines: TensorRTEngines, engine: Any, cache: DeviceKVCache) -> None:
        self._engines, self._cache = engines, cache
        self._stream = engines.cuda.stream()
        self._steps = 0
        self._graph: Graph | None = None
        rows = cache.row_count
        # Pinned memory at fixed addresses: the captured graph copies from and to these places in every step.
        self._host = {
            name: engines.cuda.pinned((rows, 1), np.int64) for name in ("input_ids", "position_ids", "logit_indices")
        }
        self._host["cache_lengths"] = engines.cuda.pinned((len(cache.capacity), rows), np.int32)
        self._logits = engines.cuda.pinned((rows, 1, engines.contract.vocab_size), np.float32)
        self._arrays = StepArrays(
            self._host["input_ids"].array, self._host["position_ids"].array, self._host["cache_lengths"].array
        )
        arrays = {**{name: pinned.array for name, pinned in self._host.items()}, "logits": self._logits.array}
        starts = np.cumsum([0, *(aligned(array.nbytes) for array in arrays.values())])
        self._buffer = engines.cuda.device_memory(int(starts[-1]))
        self._places = {name: self._buffer.address + int(at) for name, at in zip(arrays, starts, strict=False)}
        self._shapes = {name: arrays[name].shape for name in self._host}
        self._context = self._new_context(engine, graph_inside=False)
        self._capturable = self._context.can_be_captured(self._stream)
        if not self._capturable:
            self._context = self._new_context(engine, graph_inside=True)

    def step(
        self, rows: Sequence[int], tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int] | np.ndarray
    ) -> np.ndarray:
        """Append one token to each row in `rows`; see Decoder.step."""
        check_slots(rows, slots, self._cache.capacity)
        self._arrays.fill(rows, tokens, positions, slots)
        self._steps += 1
        if self._steps == 2 and self._capturable:
            self._graph = self._capture()
        if self._graph is None:
            self._enqueue()
        else:
            self._graph.launch(self._stream)
        self._stream.synchronize()
        if self._steps == 1:
            self._engines.first_step_done(self._cache.row_count, self._cache.capacity)
        return self._logits.array[list(rows), 0]

    def _new_context(self, engine: Any, graph_inside: bool) -> EngineContext:
        """Return a context with the shapes and addresses of every step."""
        context = self._engines.new_context(engine, shapes_stay=True, graph_inside=graph_inside)
        for name, address in self._places.items():
            context.bind(name, address)
        for name, shape in self._shapes.items():
            context.set_shape(name, shape)
        bind_cache(context, self._engines.contract, self._cache, engine)
        return context

    def _enqueue(self) -> None:
        for name, pinned in self._host.items():
            self._stream.upload(self._places[name], pinned.array)
        self._context.enqueue(self._stream)
        self._stream.download(self._logits.array, self._places["logits"])

    def _capture(self) -> Graph | None:
        try:
            return self._stream.capture(self._enqueue)
        except EngineRunError as error:
            warnings.warn(f"decode runs without a CUDA graph: {error}", RuntimeWarning, stacklevel=3)
            return None
