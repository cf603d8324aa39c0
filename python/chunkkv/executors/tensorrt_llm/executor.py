"""Runs a TensorRT-LLM engine with ChunkKV on one GPU, over a pool of KV blocks of its own.

Prompts are prefilled one at a time (staged): the engine compacts a prompt's cache within the step, the blocks behind
N(L) go back to the pool at once, and the next prompt may take them. All steps run under one lock on one stream, so a
block that changes hands is never written early.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from chunkkv.engine.directory import EngineFiles
from chunkkv.engine.tensorrt_llm_side_file import SideFile, engine_file
from chunkkv.errors import EngineMismatchError, EngineRunError, RequestError
from chunkkv.executors.interface import Prefilled
from chunkkv.executors.tensorrt_llm.kv_blocks import BlockManager
from chunkkv.executors.tensorrt_llm.paged_inputs import PagedGeometry, StepInputs, StepRow
from chunkkv.executors.tensorrt_llm.step_engine import StepEngine
from chunkkv.requests import Request
from chunkkv.settings import ChunkKVSettings

POOL_SETTING = "max_tokens_in_paged_kv_cache"
_FREE_MEMORY_SHARE = 0.9  # as TensorRT-LLM's kv_cache_free_gpu_mem_fraction


class PagedCache:
    """Rows that own blocks of the executor's pool; the blocks go back when the last part of the cache is gone."""

    def __init__(self, manager: BlockManager, sequences: tuple[int, ...], capacity: int) -> None:
        self.sequences, self.capacity = sequences, capacity
        self.prompt_lengths = np.zeros(len(sequences), np.int64)  # 0: nothing was prefilled; shared by rows()
        self._whole: PagedCache | None = None
        weakref.finalize(self, manager.discard, sequences)

    @property
    def count(self) -> int:
        """Rows of the cache."""
        return len(self.sequences)

    def rows(self, first: int, count: int) -> PagedCache:
        """Return `count` rows from `first` as a cache that shares this cache's memory."""
        part = object.__new__(PagedCache)
        part.sequences, part.capacity = self.sequences[first : first + count], self.capacity
        part.prompt_lengths, part._whole = self.prompt_lengths[first : first + count], self._whole or self
        return part


class TensorRTLLMExecutor:
    """One engine with its pool; thread-safe.

    `pool_tokens` bounds the pool; None takes 90 % of the free memory, at most what max_batch_size sequences of
    max_seq_len need. Raises RequestError for a pool that is too small or does not fit.
    """

    def __init__(
        self,
        engine: StepEngine,
        geometry: PagedGeometry,
        settings: ChunkKVSettings | None,
        pool_tokens: int | None = None,
    ) -> None:
        self.engine, self.geometry, self.settings = engine, geometry, settings
        self.blocks = BlockManager(_pool_blocks(engine, geometry, pool_tokens), geometry.tokens_per_block)
        self._pool = engine.allocate(self.kv_pool_bytes)
        self._inputs = StepInputs(engine.inputs, engine.outputs, geometry, self._pool.address)
        self._lock = threading.Lock()

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one cached token takes in all layers together."""
        return self.geometry.bytes_per_token

    @property
    def kv_pool_bytes(self) -> int:
        """Bytes of the pool, which all caches share."""
        return self.blocks.num_blocks * self.geometry.tokens_per_block * self.kv_bytes_per_token

    def capacity_for(self, tokens: int) -> int:
        """Return the slots of the blocks that `tokens` tokens need."""
        return self.blocks.blocks_for(tokens) * self.geometry.tokens_per_block

    def new_cache(self, rows: int, capacity: int) -> PagedCache:
        """Reserve blocks for `rows` rows of `capacity` slots; raises CacheFullError where the pool has not as many."""
        return PagedCache(self.blocks, self.blocks.add(capacity, rows), capacity)

    def prefiller(self) -> PagedPrefiller:
        """Return what prefills the prompts of one call."""
        return PagedPrefiller(self)

    def decoder(self, cache: PagedCache) -> PagedDecoder:
        """Return a loop body that appends one token per row to `cache`."""
        return PagedDecoder(self, cache)

    def prefill(self, sequence: int, ids: np.ndarray, kept: int) -> tuple[np.ndarray, int]:
        """Run a prompt, give back the blocks behind its first `kept` slots; return logits [vocab] and those blocks."""
        row = StepRow(ids, len(ids), 0, 0)
        with self._lock:
            self.blocks.truncate(sequence, 0)  # what an earlier prompt of this row left
            self.blocks.grow(sequence, len(ids))
            try:
                logits = self._run([sequence], [row])
            finally:
                given_back = self.blocks.truncate(sequence, kept)
        return logits[0], given_back

    def decode(self, sequences: Sequence[int], rows: Sequence[StepRow]) -> np.ndarray:
        """Append one token to each sequence and return logits [B,vocab] float32."""
        with self._lock:
            for sequence, row in zip(sequences, rows, strict=True):
                self.blocks.grow(sequence, row.past + 1)
            return self._run(sequences, rows)

    def _run(self, sequences: Sequence[int], rows: Sequence[StepRow]) -> np.ndarray:
        geometry = self.geometry
        offsets = self.blocks.offsets(sequences, geometry.num_layers, geometry.max_blocks_per_sequence)
        logits = self.engine.run(self._inputs.arrays(rows, offsets), self._inputs.zeros(len(rows)))
        return self._inputs.last_rows(logits, rows)


class PagedPrefiller:
    """Prefills one prompt at a time into blocks of the pool."""

    max_rows = 1

    def __init__(self, executor: TensorRTLLMExecutor) -> None:
        self._executor = executor

    def run(self, requests: Sequence[Request], out: PagedCache, cancel: threading.Event) -> list[Prefilled]:
        """Prefill the one prompt in `requests`; `cancel` is looked at before, not during, the step.

        Raises CacheFullError where the whole prompt finds no room beside what is reserved.
        """
        (request,) = requests
        if cancel.is_set():
            return [Prefilled(None)]
        executor, length = self._executor, len(request.ids)
        built_for = executor.settings.kept_tokens(length) if executor.settings else length
        if request.kept_tokens != built_for:
            raise RequestError(
                f"a prompt of {length} tokens was to keep {request.kept_tokens}; this engine keeps {built_for}, which "
                "is fixed when it is built: leave keep_ratio and budget_tokens out, or build another engine"
            )
        started = time.perf_counter()
        logits, given_back = executor.prefill(out.sequences[0], request.ids, request.kept_tokens)
        out.prompt_lengths[0] = length
        scratch = given_back * executor.geometry.tokens_per_block * executor.kv_bytes_per_token
        return [Prefilled(logits, None, time.perf_counter() - started, 0.0, scratch)]


class PagedDecoder:
    """One decode step for the rows that were filled since the last one; the others leave the batch.

    Before run(), fill input_ids [B,1] int64, position_ids [B,1] int64 (logical) and cache_lengths [B] int32 (the slot
    to write) of every row that goes on; run() sets position_ids to -1.
    """

    def __init__(self, executor: TensorRTLLMExecutor, cache: PagedCache) -> None:
        self._executor, self._cache = executor, cache
        self.input_ids = np.zeros((cache.count, 1), np.int64)
        self.position_ids = np.full((cache.count, 1), -1, np.int64)
        self.cache_lengths = np.zeros(cache.count, np.int32)
        self._logits = np.zeros((cache.count, executor.geometry.vocab_size), np.float32)

    def run(self) -> np.ndarray:
        """Run one step and return the logits [B,vocab] float32; the array is overwritten by the next step."""
        prompts, positions = self._cache.prompt_lengths, self.position_ids[:, 0]
        # A row that rides along has no prompt, or stands before its answer.
        open_rows = [int(row) for row in np.flatnonzero((prompts > 0) & (positions >= prompts))]
        if too_long := [row for row in open_rows if self.cache_lengths[row] >= self._cache.capacity]:
            raise EngineRunError(
                f"row {too_long[0]} was to write slot {self.cache_lengths[too_long[0]]} of {self._cache.capacity}"
            )
        if open_rows:
            rows = [
                StepRow(self.input_ids[row], int(prompts[row]), int(positions[row]), int(self.cache_lengths[row]))
                for row in open_rows
            ]
            sequences = [self._cache.sequences[row] for row in open_rows]
            self._logits[open_rows] = self._executor.decode(sequences, rows)
        self.position_ids[:] = -1
        return self._logits


def load_tensorrt_llm(files: EngineFiles, pool_tokens: int | None) -> TensorRTLLMExecutor:
    """Return the executor of a checked engine directory.

    Raises EngineMismatchError for an engine of several ranks, BackendUnavailableError where TensorRT-LLM, a GPU or the
    plugins are missing.
    """
    side = SideFile.read(files.path)
    if side.tp_size * side.pp_size > 1:
        ranks = side.tp_size * side.pp_size
        raise EngineMismatchError(
            f"{files.path} has {ranks} ranks (tp_size {side.tp_size}, pp_size {side.pp_size}); ChunkKVSession drives "
            f"one: run it with mpirun -n {ranks} and chunkkv.executors.tensorrt_llm.runner, or with TensorRT-LLM's "
            "C++ runtime"
        )
    from chunkkv.executors.tensorrt_llm.engine import TensorRTLLMStepEngine

    engine = TensorRTLLMStepEngine(Path(files.path) / engine_file(0), files.versions)
    return TensorRTLLMExecutor(engine, _geometry(files, side), files.settings, pool_tokens)


def _geometry(files: EngineFiles, side: SideFile) -> PagedGeometry:
    return PagedGeometry(
        num_layers=side.ranks[0].num_layers,
        num_kv_heads=side.num_kv_heads,
        head_size=side.head_size,
        tokens_per_block=side.tokens_per_block,
        kv_bytes=side.kv_bytes,
        vocab_size=files.model["vocab_size"],
        max_batch_size=files.build["max_batch_size"],
        max_seq_len=files.build["max_seq_len"],
    )


def _pool_blocks(engine: StepEngine, geometry: PagedGeometry, pool_tokens: int | None) -> int:
    """Return how many blocks the pool gets."""
    block_bytes = geometry.tokens_per_block * geometry.bytes_per_token
    room = engine.free_memory() // block_bytes
    if pool_tokens is None:
        useful = geometry.max_batch_size * geometry.max_blocks_per_sequence
        blocks, given = min(useful, int(room * _FREE_MEMORY_SHARE)), "the free memory"
    else:
        blocks, given = -(-pool_tokens // geometry.tokens_per_block), f"{POOL_SETTING} {pool_tokens}"
    if not 1 <= blocks <= room:
        raise RequestError(
            f"{given} gives a pool of {blocks} KV blocks of {block_bytes} bytes; there is room for {room}: "
            f"give {POOL_SETTING} from 1 to {room * geometry.tokens_per_block}, or free memory"
        )
    return blocks
