"""Runs an engine's step and compress graphs in ONNX Runtime on the CPU, over caches that NumPy owns.

Sessions are shared and thread-safe; every call binds its own caches, so calls on several threads do not meet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from chunkkv.engine.directory import COMPRESS_FILE, STEP_FILE
from chunkkv.errors import EngineError, EngineMismatchError
from chunkkv.executors.interface import Choice
from chunkkv.executors.onnxruntime.prefill import BlockwisePrefiller
from chunkkv.settings import ChunkKVSettings

if TYPE_CHECKING:
    from chunkkv.executors.onnxruntime.layer_lengths import LayerLengthsDecoder, LayerLengthsStep


@dataclass(frozen=True)
class KVCache:
    """Keys and values per layer, each [B,Hkv,C,D] float32; rows are independent requests."""

    keys: tuple[np.ndarray, ...]
    values: tuple[np.ndarray, ...]

    @property
    def capacity(self) -> int:
        """Slots per row."""
        return self.keys[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes allocated for all layers and rows."""
        return sum(array.nbytes for array in (*self.keys, *self.values))

    def rows(self, first: int, count: int) -> KVCache:
        """Return `count` rows from `first` as a cache that shares this cache's memory."""
        return KVCache(
            tuple(array[first : first + count] for array in self.keys),
            tuple(array[first : first + count] for array in self.values),
        )


class OnnxRuntimeExecutor:
    """The graphs of one engine directory, ready to run.

    `block` is the size of a prefill block, `settings` None for an engine without ChunkKV; `threads` the number of
    intra-op threads, None for ONNX Runtime's own choice. Shapes are read from the graphs. Raises EngineError for graphs
    that do not load, EngineMismatchError for graphs built with other settings.
    """

    def __init__(
        self, engine_dir: Path, block: int, settings: ChunkKVSettings | None = None, threads: int | None = None
    ) -> None:
        self._dir = engine_dir
        self._block = block
        self._window = settings.window if settings else 0
        self._threads = threads or 0
        self._step = self._load(STEP_FILE)
        self._layer_lengths_step: LayerLengthsStep | None = None
        shapes = {value.name: value.shape for value in (*self._step.get_inputs(), *self._step.get_outputs())}
        if not {"past_key.0", "logits"} <= set(shapes):
            raise EngineError(f"{engine_dir / STEP_FILE} is no step graph; build the engine again")
        self.num_layers = sum(name.startswith("past_key.") for name in shapes)
        self.num_kv_heads, self.head_dim = int(shapes["past_key.0"][1]), int(shapes["past_key.0"][3])
        self.vocab_size = int(shapes["logits"][2])
        self._query_heads = {
            int(name.split(".")[1]): int(shape[1]) for name, shape in shapes.items() if name.startswith("query.")
        }
        self._compress = self._load(COMPRESS_FILE) if settings else None
        if self._compress is not None and settings is not None:
            self._check_settings(self._compress.get_modelmeta().custom_metadata_map, settings)

    def _load(self, name: str) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_mem_pattern = False  # a plan per prompt length would be made, kept, and hardly met again
        try:
            return ort.InferenceSession(str(self._dir / name), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own classes share no base but this one
            raise EngineError(
                f"{self._dir / name} does not load in ONNX Runtime {ort.__version__} ({str(error).splitlines()[0]}); "
                "build the engine again"
            ) from None

    def _check_settings(self, metadata: Mapping[str, str], settings: ChunkKVSettings) -> None:
        built = json.loads(metadata.get("chunkkv.settings", "{}"))
        for name, value in settings.to_dict().items():
            if built.get(name) != value:
                raise EngineMismatchError(
                    f"{self._dir}: config.json says {name} is {value!r}, {COMPRESS_FILE} was built with "
                    f"{built.get(name)!r}; build the engine again"
                )

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one cached token takes in all layers together."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * 4

    def capacity_for(self, tokens: int) -> int:
        """Return the slots that a cache for `tokens` tokens has: as many."""
        return tokens

    def prefiller(self) -> BlockwisePrefiller:
        """Return what prefills the prompts of one call, block by block."""
        return BlockwisePrefiller(self, self._block, self._window or 1)

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """Return an empty cache; memory is touched only where tokens are written."""
        shape = (rows, self.num_kv_heads, capacity, self.head_dim)
        arrays = [tuple(np.zeros(shape, np.float32) for _ in range(self.num_layers)) for _ in range(2)]
        return KVCache(arrays[0], arrays[1])

    def prefill_block(self, cache: KVCache, ids: np.ndarray, filled: int) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Append the tokens `ids` [S] int64 of one row at slots and positions filled … filled+S-1.

        Returns the logits [vocab] after the last token and, per leader layer, the block's last w rotated queries
        [1,Hq,min(w,S),D].
        """
        logits, queries = self._append(cache, ids, filled, filled, np.array([len(ids) - 1]))
        return logits[0], queries

    def score_block(self, cache: KVCache, ids: np.ndarray, slot: int, position: int) -> np.ndarray:
        """Append the tokens `ids` [S] int64 of one row at slots from `slot` and positions from `position`.

        Returns the logits [S,vocab] after each of them.
        """
        return self._append(cache, ids, slot, position, np.arange(len(ids)))[0]

    def _append(
        self, cache: KVCache, ids: np.ndarray, slot: int, position: int, places: np.ndarray
    ) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Append a block of one row; returns the logits [P,vocab] after its tokens at `places` [P], and queries."""
        size = len(ids)
        step = _bound_to(self._step, cache)
        logits = np.empty((1, len(places), self.vocab_size), np.float32)
        inputs = {
            "input_ids": np.ascontiguousarray(ids, dtype=np.int64).reshape(1, size),
            "position_ids": np.arange(position, position + size, dtype=np.int64).reshape(1, size),
            "cache_lengths": np.array([slot], np.int32),
            "logit_indices": np.ascontiguousarray(places, dtype=np.int64).reshape(1, -1),
        }
        queries = {
            leader: np.empty((1, heads, min(self._window, size), self.head_dim), np.float32)
            for leader, heads in self._query_heads.items()
        }
        bind_arrays(
            step,
            inputs,
            {"logits": logits, **{f"query.{leader}": array for leader, array in queries.items()}},
        )
        self._step.run_with_iobinding(step)
        return logits[0], queries

    def compress(
        self,
        full: KVCache,
        queries: Mapping[int, np.ndarray],
        ids: np.ndarray,
        keep_per_10k: int,
        budget_tokens: int,
        out: KVCache,
    ) -> Choice:
        """Choose what one row keeps and copy it to the first slots of `out`.

        `full` [1,Hkv,L,D] holds the whole prompt, `queries` the last w rotated queries per leader [1,Hq,w,D]. Slots of
        `out` behind the kept tokens are overwritten with meaningless rows.
        """
        session = self._compress
        assert session is not None, "an engine without ChunkKV compresses nothing"
        binding = session.io_binding()
        inputs = {
            "lengths": np.array([full.capacity], np.int32),
            "keep_per_10k": np.array([keep_per_10k], np.int32),
            "budget_tokens": np.array([budget_tokens], np.int32),
            "capacity": np.array([out.capacity], np.int64),
            "input_ids": np.ascontiguousarray(ids, dtype=np.int64).reshape(1, -1),
            **{f"query.{leader}": query for leader, query in queries.items()},
        }
        wanted = {value.name for value in session.get_inputs()}
        outputs = {}
        for layer in range(self.num_layers):
            inputs[f"key.{layer}"], inputs[f"value.{layer}"] = full.keys[layer], full.values[layer]
            outputs[f"kept_key.{layer}"], outputs[f"kept_value.{layer}"] = out.keys[layer], out.values[layer]
        bind_arrays(binding, {name: array for name, array in inputs.items() if name in wanted}, outputs)
        names = [f"{kind}.{leader}" for leader in self._query_heads for kind in ("kept_indices", "token_scores")]
        for name in (*names, "kept_lengths"):
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        found = dict(zip((*outputs, *names), binding.get_outputs(), strict=False))
        return Choice(
            {leader: found[f"kept_indices.{leader}"].numpy()[0] for leader in self._query_heads},
            {leader: found[f"token_scores.{leader}"].numpy()[0] for leader in self._query_heads},
        )

    def decoder(self, cache: KVCache) -> Decoder:
        """Return a loop body that appends one token per row to `cache`."""
        binding = _bound_to(self._step, cache)
        return Decoder(self._step, binding, cache, self.vocab_size, self._query_heads, self.head_dim)

    def layer_lengths_decoder(self, cache: KVCache) -> LayerLengthsDecoder:
        """Return a loop body for a cache whose layers are filled to different lengths; for evaluation."""
        from chunkkv.executors.onnxruntime.layer_lengths import LayerLengthsDecoder, LayerLengthsStep

        if self._layer_lengths_step is None:
            self._layer_lengths_step = LayerLengthsStep(self._dir / STEP_FILE, self._threads)
        step = self._layer_lengths_step
        binding = _bound_to(step.session, cache)
        return LayerLengthsDecoder(step, binding, cache, self.vocab_size, self._query_heads)


class Decoder:
    """One decode step for all rows of a cache; its arrays stay bound, so a step only writes numbers into them.

    Before run(), fill input_ids [B,1], position_ids [B,1] (logical) and cache_lengths [B] (the slot to write).
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        binding: ort.IOBinding,
        cache: KVCache,
        vocab_size: int,
        query_heads: Mapping[int, int],
        head_dim: int,
    ) -> None:
        rows = cache.keys[0].shape[0]
        self._session, self._binding = session, binding
        self._cache = cache  # the binding holds raw pointers into it
        self.input_ids = np.zeros((rows, 1), np.int64)
        self.position_ids = np.zeros((rows, 1), np.int64)
        self.cache_lengths = np.zeros(rows, np.int32)
        self._places = np.zeros((rows, 1), np.int64)
        self._logits = np.empty((rows, 1, vocab_size), np.float32)
        self._queries = {
            f"query.{leader}": np.empty((rows, heads, 1, head_dim), np.float32) for leader, heads in query_heads.items()
        }
        inputs = {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "cache_lengths": self.cache_lengths,
            "logit_indices": self._places,
        }
        bind_arrays(binding, inputs, {"logits": self._logits, **self._queries})

    def run(self) -> np.ndarray:
        """Run one step and return the logits [B,vocab]; the array is overwritten by the next step."""
        self._session.run_with_iobinding(self._binding)
        return self._logits[:, 0]


def _bound_to(session: ort.InferenceSession, cache: KVCache) -> ort.IOBinding:
    """Bind the caches: past and present are the same memory, so the graph writes in place."""
    binding = session.io_binding()
    for kind, arrays in (("key", cache.keys), ("value", cache.values)):
        for layer, array in enumerate(arrays):
            bind_arrays(binding, {f"past_{kind}.{layer}": array}, {f"present_{kind}.{layer}": array})
    return binding


def bind_arrays(binding: ort.IOBinding, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
    """Bind arrays by address; the caller keeps them alive until the run is over."""
    for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, array in arrays.items():
            assert array.flags.c_contiguous, name
            bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
