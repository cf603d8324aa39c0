"""Runs the TensorRT engines of one directory: prefill compacts inside its engine, decode replays a CUDA graph.

Engines and weights are shared, the weights lie once on the GPU and are bound to every engine. Prefill runs under a lock
on one context; each decoder has a context and a stream of its own, so calls on several threads do not meet.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chunkkv import profiling
from chunkkv.engine.tensorrt_contract import PREFILL_FILE, WEIGHTS_FILE, Contract, decode_file
from chunkkv.errors import BackendUnavailableError, EngineError, EngineMismatchError, EngineRunError, RequestError
from chunkkv.executors.interface import Choice, Prefilled
from chunkkv.gpu.cuda_runtime import ALIGNMENT, CudaRuntime, DeviceBuffer, Graph, Stream
from chunkkv.gpu.tensorrt_library import Messages, import_tensorrt, load_plugins, start
from chunkkv.requests import Request

_PIECE = 64 << 20


@dataclass(frozen=True)
class DeviceCache:
    """Keys and values per layer on the GPU, each [B,Hkv,C,D] in the engine's type, as addresses of their first row.

    `row_bytes` is the distance between rows; `buffer` owns the memory.
    """

    keys: tuple[int, ...]
    values: tuple[int, ...]
    count: int
    capacity: int
    row_bytes: int
    buffer: DeviceBuffer

    def rows(self, first: int, count: int) -> DeviceCache:
        """Return `count` rows from `first` as a cache that shares this cache's memory."""
        offset = first * self.row_bytes
        keys, values = (tuple(address + offset for address in kind) for kind in (self.keys, self.values))
        return DeviceCache(keys, values, count, self.capacity, self.row_bytes, self.buffer)


class TensorRTExecutor:
    """The engines of one directory on the current GPU; `versions` are those of its manifest.

    Raises BackendUnavailableError where TensorRT, GPU or plugins are missing, EngineMismatchError for engines of
    another TensorRT or GPU.
    """

    def __init__(self, engine_dir: Path, versions: dict[str, str], chunkkv: bool) -> None:
        self.contract = Contract.read(engine_dir)
        self._dir = engine_dir
        try:
            self._trt = import_tensorrt()
            self.cuda = CudaRuntime.load()
        except BackendUnavailableError as error:
            raise BackendUnavailableError(f"{engine_dir} was built for TensorRT and needs {error}") from None
        if (built := versions.get("tensorrt")) != self._trt.__version__:
            raise EngineMismatchError(
                f"{engine_dir} was built with TensorRT {built}, installed is {self._trt.__version__}: install that "
                "version or build the engine again"
            )
        self._messages = Messages()
        self._logger = self._messages.logger(self._trt)
        self._runtime = start(self._trt, self._trt.Runtime, self._logger, self._messages)
        if chunkkv:
            load_plugins(self._trt, self._trt.get_plugin_registry(), self._messages)
        self._weights, self._weights_buffer = self._load_weights()
        self.prefill_lock = threading.Lock()
        self.prefill_context = self.new_context(self._load(PREFILL_FILE))
        self._decode = {capacity: self._load(decode_file(capacity)) for capacity in self.contract.capacities}

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one cached token takes in all layers together."""
        return 2 * self.contract.num_layers * self.contract.row_bytes(1)

    def capacity_for(self, tokens: int) -> int:
        """Return the slots of the smallest cache that holds `tokens` tokens; raises RequestError beyond the largest."""
        for capacity in self.contract.capacities:
            if capacity >= tokens:
                return capacity
        raise RequestError(
            f"{tokens} tokens do not fit the largest cache of this engine, {self.contract.capacities[-1]} slots: "
            "ask for fewer new tokens, or build with a larger --max_seq_len"
        )

    def new_cache(self, rows: int, capacity: int) -> DeviceCache:
        """Return a cache of undefined content: prefill writes every slot of a row, so that no old NaN is ever read."""
        count, row_bytes = self.contract.num_layers, self.contract.row_bytes(capacity)
        step = _aligned(rows * row_bytes)
        buffer = self.cuda.device_memory(2 * count * step)
        places = [buffer.address + number * step for number in range(2 * count)]
        return DeviceCache(tuple(places[:count]), tuple(places[count:]), rows, capacity, row_bytes, buffer)

    def prefiller(self) -> TensorRTPrefiller:
        """Return what prefills the prompts of one call, several at a time where the engine was built for it."""
        return TensorRTPrefiller(self)

    def decoder(self, cache: DeviceCache) -> TensorRTDecoder:
        """Return a loop body that appends one token per row to `cache`."""
        engine = self._decode[cache.capacity]
        return TensorRTDecoder(self, engine, self.new_context(engine), cache)

    def new_context(self, engine: Any) -> Any:
        """Return an execution context with the weights bound."""
        context = engine.create_execution_context()
        if context is None:
            raise EngineRunError(f"TensorRT cannot make an execution context{self._messages.because()}")
        for name, address in self._weights.items():
            bind(context, name, address)
        return context

    def run(self, context: Any, stream: Stream) -> None:
        """Enqueue `context` on `stream`."""
        if not context.execute_async_v3(stream.handle):
            raise EngineRunError(f"TensorRT could not run an engine{self._messages.because()}")

    def _load(self, name: str) -> Any:
        self._messages.errors.clear()
        engine = self._runtime.deserialize_cuda_engine((self._dir / name).read_bytes())
        if engine is None:
            raise EngineMismatchError(
                f"{self._dir / name} does not load in TensorRT {self._trt.__version__} on this GPU"
                f"{self._messages.because()}; build it on this machine"
            )
        names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        if absent := sorted(set(self._weights) - names):
            raise EngineError(f"{self._dir / name} takes no weight {absent[0]!r}; build the engine again")
        return engine

    def _load_weights(self) -> tuple[dict[str, int], DeviceBuffer]:
        """Copy the matrices to the GPU, once, each at an address that TensorRT accepts."""
        places, end = {}, 0
        for name, (_, nbytes) in self.contract.weights.items():
            places[name] = end
            end += _aligned(nbytes)
        buffer, stream = self.cuda.device_memory(end), self.cuda.stream()
        data = np.memmap(self._dir / WEIGHTS_FILE, np.uint8, "r")
        for name, (offset, nbytes) in self.contract.weights.items():
            for done in range(0, nbytes, _PIECE):
                piece = np.ascontiguousarray(data[offset + done : offset + min(done + _PIECE, nbytes)])
                stream.upload(buffer.address + places[name] + done, piece)
                stream.synchronize()  # the piece must not be freed before it is copied
        return {name: buffer.address + place for name, place in places.items()}, buffer


class TensorRTPrefiller:
    """Prefills prompts as one right-padded batch and has the engine write the kept rows straight into the cache."""

    def __init__(self, executor: TensorRTExecutor) -> None:
        self._executor, self._contract = executor, executor.contract
        self.max_rows = executor.contract.prefill_rows
        self._stream = executor.cuda.stream()

    def run(self, requests: Sequence[Request], out: DeviceCache, cancel: threading.Event) -> list[Prefilled]:
        """Prefill the prompts into `out`; `cancel` is looked at before, not during, the one run of the engine."""
        if cancel.is_set():
            return [Prefilled(None) for _ in requests]
        started = time.perf_counter()
        with self._executor.prefill_lock, profiling.range_of("prefill", requests):
            found = self._run(requests, out)
        seconds, contract = time.perf_counter() - started, self._contract
        padded = max(len(request.ids) for request in requests)
        scratch = 2 * contract.group_layers * contract.row_bytes(padded)
        return [
            Prefilled(found["logits"][row, 0], self._choice(row, request, found), seconds, 0.0, scratch)
            for row, request in enumerate(requests)
        ]

    def _run(self, requests: Sequence[Request], out: DeviceCache) -> dict[str, np.ndarray]:
        """Bind everything, run once, and return the outputs that are not caches, on the host."""
        executor, context, stream = self._executor, self._executor.prefill_context, self._stream
        inputs, capacity = _prefill_inputs(requests), _aligned_int64(out.capacity)
        rows, padded = inputs["input_ids"].shape
        outputs = {"logits": np.empty((rows, 1, self._contract.vocab_size), np.float32)}
        outputs["kept_lengths"] = np.empty(rows, np.int32)
        for leader in self._contract.leaders:
            outputs[f"kept_indices.{leader}"] = np.empty((rows, padded), np.int32)
            outputs[f"token_scores.{leader}"] = np.empty((rows, padded), np.float32)
        if not self._contract.leaders:
            del inputs["keep_per_10k"], inputs["budget_tokens"]
        arrays = {**inputs, **outputs}
        starts = np.cumsum([0, *(_aligned(array.nbytes) for array in arrays.values())])
        buffer = executor.cuda.device_memory(int(starts[-1]))
        places = {name: buffer.address + int(start) for name, start in zip(arrays, starts, strict=False)}
        for name, array in inputs.items():
            stream.upload(places[name], array)
            set_shape(context, name, array.shape)
        for name, address in places.items():
            bind(context, name, address)
        bind(context, "capacity", capacity.ctypes.data)
        for layer in range(self._contract.num_layers):
            bind(context, f"kept_key.{layer}", out.keys[layer])
            bind(context, f"kept_value.{layer}", out.values[layer])
        executor.run(context, stream)
        for name, array in outputs.items():
            stream.download(array, places[name])
        stream.synchronize()
        for row, request in enumerate(requests):
            if outputs["kept_lengths"][row] != request.kept_tokens:
                raise EngineRunError(
                    f"the engine kept {outputs['kept_lengths'][row]} of {len(request.ids)} tokens, expected "
                    f"{request.kept_tokens}: plugins and runtime are of different versions"
                )
        return outputs

    def _choice(self, row: int, request: Request, found: dict[str, np.ndarray]) -> Choice | None:
        kept, length = request.kept_tokens, len(request.ids)
        if kept == length or not self._contract.leaders:
            return None
        leaders = self._contract.leaders
        return Choice(
            {leader: found[f"kept_indices.{leader}"][row, :kept] for leader in leaders},
            {leader: found[f"token_scores.{leader}"][row, :length] for leader in leaders},
        )


class TensorRTDecoder:
    """One decode step for all rows of a cache: copies in, engine, copies out, captured as a CUDA graph.

    Before run(), fill input_ids [B,1], position_ids [B,1] (logical) and cache_lengths [B] (the slot to write). The
    first step runs without a graph, because capturing needs an engine that has run; where capturing fails, all do.
    """

    def __init__(self, executor: TensorRTExecutor, engine: Any, context: Any, cache: DeviceCache) -> None:
        self._executor, self._context, self._cache = executor, context, cache
        self._stream = executor.cuda.stream()
        self._steps, self._graph = 0, None
        rows, contract = cache.count, executor.contract
        shapes = {"input_ids": ((rows, 1), np.int64), "position_ids": ((rows, 1), np.int64)}
        shapes |= {"logit_indices": ((rows, 1), np.int64), "cache_lengths": ((rows,), np.int32)}
        self._host = {name: executor.cuda.pinned(shape, dtype) for name, (shape, dtype) in shapes.items()}
        self._logits = executor.cuda.pinned((rows, 1, contract.vocab_size), np.float32)
        self.input_ids, self.position_ids = self._host["input_ids"].array, self._host["position_ids"].array
        self.cache_lengths = self._host["cache_lengths"].array
        arrays = {**{name: pinned.array for name, pinned in self._host.items()}, "logits": self._logits.array}
        starts = np.cumsum([0, *(_aligned(array.nbytes) for array in arrays.values())])
        self._buffer = executor.cuda.device_memory(int(starts[-1]))
        self._places = {name: self._buffer.address + int(at) for name, at in zip(arrays, starts, strict=False)}
        for name, address in self._places.items():
            bind(context, name, address)
            if name in self._host:
                set_shape(context, name, arrays[name].shape)
        self._bind_cache(engine)

    def run(self) -> np.ndarray:
        """Run one step and return the logits [B,vocab]; the array is overwritten by the next step."""
        self._steps += 1
        if self._steps == 2:
            self._graph = self._capture()
        if self._graph is None:
            self._enqueue()
        else:
            self._graph.launch(self._stream)
        self._stream.synchronize()
        return self._logits.array[:, 0]

    def _bind_cache(self, engine: Any) -> None:
        """Bind past and present to the same memory, as the engine's cache update wants it."""
        contract, cache = self._executor.contract, self._cache
        shape = (cache.count, contract.num_kv_heads, cache.capacity, contract.head_dim)
        for kind, addresses in (("key", cache.keys), ("value", cache.values)):
            for layer, address in enumerate(addresses):
                past, present = f"past_{kind}.{layer}", f"present_{kind}.{layer}"
                if (alias := engine.get_aliased_input_tensor(present)) != past:
                    raise EngineMismatchError(
                        f"{present} shares memory with {alias!r}, expected {past!r}: this TensorRT does not update "
                        "caches in place; build the engine with 10.15 or later"
                    )
                set_shape(self._context, past, shape)
                bind(self._context, past, address)
                bind(self._context, present, address)

    def _enqueue(self) -> None:
        for name, pinned in self._host.items():
            self._stream.upload(self._places[name], pinned.array)
        self._executor.run(self._context, self._stream)
        self._stream.download(self._logits.array, self._places["logits"])

    def _capture(self) -> Graph | None:
        try:
            return self._stream.capture(self._enqueue)
        except EngineRunError as error:
            warnings.warn(f"decode runs without a CUDA graph: {error}", RuntimeWarning, stacklevel=3)
            return None


def bind(context: Any, name: str, address: int) -> None:
    """Give `context` the address of a tensor; raises EngineRunError where it refuses."""
    if address % ALIGNMENT or not context.set_tensor_address(name, address):
        raise EngineRunError(f"TensorRT does not take address {address:#x} for {name!r}; build the engine again")


def set_shape(context: Any, name: str, shape: tuple[int, ...]) -> None:
    """Give `context` the shape of an input; raises EngineRunError outside the engine's limits."""
    if not context.set_input_shape(name, tuple(shape)):
        raise EngineRunError(
            f"TensorRT does not take {name} of shape {tuple(shape)}: it is outside the engine's profile"
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


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _aligned_int64(value: int) -> np.ndarray:
    """Return [value] int64 on the host at an aligned address, from where TensorRT reads it as a shape."""
    memory = np.zeros(2 * ALIGNMENT // 8, np.int64)
    start = -memory.ctypes.data % ALIGNMENT // 8
    memory[start] = value
    return memory[start : start + 1]
