"""Going on with a filled row on TensorRT: an engine that appends a block of tokens to one row, and copies of rows."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from chunkkv import profiling
from chunkkv.cache_layout import Slots
from chunkkv.engine.tensorrt_contract import DTYPES, block_file
from chunkkv.errors import BackendUnavailableError
from chunkkv.executors.interface import CancelSignal, PrefillProgress, PrefillResult, no_progress
from chunkkv.executors.step_arrays import check_slots
from chunkkv.executors.tensorrt.cache import DeviceKVCache
from chunkkv.executors.tensorrt.contexts import EngineContext
from chunkkv.executors.tensorrt.engines import TensorRTEngines, aligned, bind_cache
from chunkkv.gpu.cuda_runtime import DEVICE_TO_DEVICE, DEVICE_TO_HOST, HOST_TO_DEVICE, Pitched
from chunkkv.requests import Request


class BlockContexts:
    """One execution context of each block engine, made when it is first needed; hold `lock` while one runs."""

    def __init__(self, engines: TensorRTEngines) -> None:
        self.lock = threading.Lock()
        self._engines = engines
        self._contexts: dict[Slots, EngineContext] = {}

    def bound(self, cache: DeviceKVCache) -> EngineContext:
        """Return the context for a cache of one row, with the row bound to it."""
        capacity = cache.capacity
        engine = self._engines.load(block_file(capacity)) if capacity not in self._contexts else None
        if engine is not None:
            self._contexts[capacity] = self._engines.new_context(engine)
            bind_cache(self._contexts[capacity], self._engines.contract, cache, engine)
        else:
            bind_cache(self._contexts[capacity], self._engines.contract, cache)
        return self._contexts[capacity]


class TensorRTContinuer:
    """Appends texts to rows of caches on the GPU; see Continuer. A text always stays whole.

    Parameters
    ----------
    engines : TensorRTEngines
        The engines of the directory.
    blocks : BlockContexts
        Runs the block engines.
    """

    def __init__(self, engines: TensorRTEngines, blocks: BlockContexts) -> None:
        self.block = engines.contract.block_tokens
        self._engines, self._contract, self._blocks = engines, engines.contract, blocks
        self._stream = engines.cuda.stream()

    def copy(self, source: DeviceKVCache, slots: Sequence[int], out: DeviceKVCache) -> None:
        """Copy the filled slots of `source` to the first slots of `out`; its other slots become zeros."""
        self._clear(out)
        for new, old in zip(self._pieces(out), self._pieces(source), strict=True):
            width = self._contract.head_bytes(slots[old.length_class])
            self._stream.copy_rows(new.heads, old.heads, width, old.head_count, DEVICE_TO_DEVICE)
        self._stream.synchronize()

    def append(self, cache: DeviceKVCache, ids: np.ndarray, slots: Sequence[int], position: int) -> np.ndarray:
        """Append the tokens ids [S] int64 and return the logits [vocab] after the last; see Continuer.append."""
        size = len(ids)
        check_slots([0], np.array(slots)[:, None] + size - 1, cache.capacity)
        inputs: dict[str, np.ndarray] = {
            "input_ids": np.ascontiguousarray(ids, dtype=np.int64).reshape(1, size),
            "position_ids": np.arange(position, position + size, dtype=np.int64).reshape(1, size),
            "logit_indices": np.array([[size - 1]], np.int64),
            "cache_lengths": np.array(slots, np.int32).reshape(-1, 1),
        }
        logits = np.empty((1, 1, self._contract.vocab_size), np.float32)
        arrays = {**inputs, "logits": logits}
        starts = np.cumsum([0, *(aligned(array.nbytes) for array in arrays.values())])
        buffer, stream = self._engines.cuda.device_memory(int(starts[-1])), self._stream
        places = {name: buffer.address + int(start) for name, start in zip(arrays, starts, strict=False)}
        with self._blocks.lock:
            context = self._blocks.bound(cache)
            for name, array in inputs.items():
                stream.upload(places[name], array)
                context.set_shape(name, array.shape)
            for name, address in places.items():
                context.bind(name, address)
            context.enqueue(stream)
            stream.download(logits, places["logits"])
            stream.synchronize()
        return logits[0, 0]

    def extend(
        self,
        cache: DeviceKVCache,
        slots: Sequence[int],
        position: int,
        request: Request,
        cancel: CancelSignal,
        progress: PrefillProgress = no_progress,
    ) -> PrefillResult:
        """Append a text whole; raises BackendUnavailableError where a part of it was to stay."""
        length = len(request.ids)
        if request.kept_tokens < length:
            raise BackendUnavailableError("engines of TensorRT cannot compress a text behind a context: keep it whole")
        started, logits = time.perf_counter(), None
        with profiling.range_of("prefill", (request,)):
            for done in range(0, length, self.block):
                if cancel.is_set():
                    return PrefillResult(None)
                ids = request.ids[done : done + self.block]
                logits = self.append(cache, ids, [count + done for count in slots], position + done)
                progress(done + len(ids), length)
        whole = self._contract.layout.slots(length)
        return PrefillResult(logits, prefill_s=time.perf_counter() - started, kept_lengths=whole)

    def to_host(self, cache: DeviceKVCache, slots: Sequence[int]) -> dict[str, np.ndarray]:
        """Return the filled slots as arrays [Hkv,N,D]; see Continuer.to_host."""
        arrays = {name: np.empty(shape, dtype) for name, (dtype, shape) in self.host_layout(slots).items()}
        for piece in self._pieces(cache):
            width = self._contract.head_bytes(slots[piece.length_class])
            host = Pitched(arrays[piece.name].ctypes.data, width)
            self._stream.copy_rows(host, piece.heads, width, piece.head_count, DEVICE_TO_HOST)
        self._stream.synchronize()
        return arrays

    def from_host(self, arrays: Mapping[str, np.ndarray], cache: DeviceKVCache) -> None:
        """Write arrays as `to_host` returns them to the first slots of `cache`; its other slots become zeros."""
        self._clear(cache)
        held = {name: np.ascontiguousarray(array) for name, array in arrays.items()}  # until they are copied
        for piece in self._pieces(cache):
            array = held[piece.name]
            width = self._contract.head_bytes(array.shape[1])
            self._stream.copy_rows(
                piece.heads, Pitched(array.ctypes.data, width), width, piece.head_count, HOST_TO_DEVICE
            )
        self._stream.synchronize()

    def host_layout(self, slots: Sequence[int]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Return type and shape of the arrays that `to_host` returns; see Continuer.host_layout."""
        contract = self._contract
        dtype, parts = DTYPES[contract.dtype], contract.layout.parts
        shapes = [(len(part.kv_heads), slots[part.length_class], contract.head_dim) for part in parts]
        return {f"{kind}.{number}": (dtype, shape) for number, shape in enumerate(shapes) for kind in ("key", "value")}

    def _pieces(self, cache: DeviceKVCache) -> list[_Piece]:
        """Return every array of a row."""
        contract = self._contract
        return [
            _Piece(
                f"{kind}.{number}",
                Pitched(addresses[number], contract.head_bytes(cache.capacity[part.length_class])),
                len(part.kv_heads),
                part.length_class,
            )
            for number, part in enumerate(contract.layout.parts)
            for kind, addresses in (("key", cache.keys), ("value", cache.values))
        ]

    def _clear(self, cache: DeviceKVCache) -> None:
        """Zero a row, whose memory may hold NaN: attention multiplies slots that it masks by zero."""
        for addresses in (cache.keys, cache.values):
            for address, size in zip(addresses, cache.row_bytes, strict=True):
                self._stream.clear(address, size)


class _Piece(NamedTuple):
    """The keys or values of one part in one row: their name on the host, where the heads lie, and how many."""

    name: str
    heads: Pitched
    head_count: int
    length_class: int
