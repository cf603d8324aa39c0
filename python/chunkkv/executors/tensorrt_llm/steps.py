"""Prefill and decode of a TensorRT-LLM engine over one pool of KV blocks."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np

from chunkkv.errors import EngineRunError, RequestError
from chunkkv.executors.interface import Prefiller, PrefillProgress, PrefillResult, no_progress
from chunkkv.executors.step_arrays import check_slots
from chunkkv.executors.tensorrt_llm.cache import PagedKVCache
from chunkkv.executors.tensorrt_llm.kv_blocks import BlockManager
from chunkkv.executors.tensorrt_llm.paged_inputs import PagedGeometry, StepInputs, StepRow
from chunkkv.executors.tensorrt_llm.step_engine import StepEngine
from chunkkv.executors.whole_prefill import WholePrefillRun
from chunkkv.requests import Request
from chunkkv.settings import ChunkKVSettings


class PagedSteps:
    """Runs the engine's steps, one at a time, on the blocks of one pool; thread-safe.

    All steps run under one lock on one stream, so a block that changes hands is never written early.

    Parameters
    ----------
    engine : StepEngine
        The loaded engine.
    geometry : PagedGeometry
        Its layers, the shape of its cache and its limits.
    blocks : BlockManager
        Says which sequence owns which block of the pool.
    pool_address : int
        Where the pool begins.
    """

    def __init__(self, engine: StepEngine, geometry: PagedGeometry, blocks: BlockManager, pool_address: int) -> None:
        self.geometry, self._engine, self._blocks = geometry, engine, blocks
        self._inputs = StepInputs(engine.inputs, engine.outputs, geometry, pool_address)
        self._lock = threading.Lock()

    def prefill(self, sequence: int, ids: np.ndarray, kept: int) -> tuple[np.ndarray, int]:
        """Run a prompt, give back the blocks behind its first `kept` slots; return logits [vocab] and those blocks."""
        row = StepRow(ids, len(ids), 0, 0)
        with self._lock:
            self._blocks.truncate(sequence, 0)  # what an earlier prompt of this row left
            self._blocks.grow(sequence, len(ids))
            try:
                logits = self._run([sequence], [row])
            finally:
                given_back = self._blocks.truncate(sequence, kept)
        return logits[0], given_back

    def decode(self, sequences: Sequence[int], rows: Sequence[StepRow]) -> np.ndarray:
        """Append one token to each sequence and return logits [B,vocab] float32."""
        with self._lock:
            for sequence, row in zip(sequences, rows, strict=True):
                self._blocks.grow(sequence, row.past + 1)
            return self._run(sequences, rows)

    def _run(self, sequences: Sequence[int], rows: Sequence[StepRow]) -> np.ndarray:
        geometry = self.geometry
        offsets = self._blocks.offsets(sequences, geometry.num_layers, geometry.max_blocks_per_sequence)
        logits = self._engine.run(self._inputs.arrays(rows, offsets), self._inputs.zeros(len(rows)))
        return self._inputs.last_rows(logits, rows)


class PagedPrefiller(Prefiller[PagedKVCache]):
    """Prefills one prompt at a time into blocks of the pool.

    Parameters
    ----------
    steps : PagedSteps
        Runs the engine.
    settings : ChunkKVSettings or None
        What the engine was built with: it fixes how many tokens of a prompt stay.
    """

    max_rows = 1

    def __init__(self, steps: PagedSteps, settings: ChunkKVSettings | None) -> None:
        self._steps, self._settings = steps, settings

    def start(
        self, requests: Sequence[Request], out: PagedKVCache, progress: PrefillProgress = no_progress
    ) -> WholePrefillRun:
        """Return the prefill of the one prompt in `requests`, which is one step of the engine.

        That step raises CacheFullError where the whole prompt finds no room beside what is reserved.
        """
        (request,) = requests
        return WholePrefillRun(len(request.ids), lambda: [self._prefill(request, out)])

    def _prefill(self, request: Request, out: PagedKVCache) -> PrefillResult:
        length, geometry = len(request.ids), self._steps.geometry
        built_for = self._settings.kept_tokens(length) if self._settings else length
        if request.kept_tokens != built_for:
            raise RequestError(
                f"a prompt of {length} tokens was to keep {request.kept_tokens}; this engine keeps {built_for}, which "
                "is fixed when it is built: leave keep_ratio and budget_tokens out, or build another engine"
            )
        started = time.perf_counter()
        logits, given_back = self._steps.prefill(out.sequences[0], request.ids, request.kept_tokens)
        out.prompt_lengths[0] = length
        scratch = given_back * geometry.tokens_per_block * geometry.bytes_per_token
        return PrefillResult(logits, None, time.perf_counter() - started, 0.0, scratch)


class PagedDecoder:
    """Appends tokens to the rows of one cache; idle rows are left out of the engine's batch and keep their blocks."""

    def __init__(self, steps: PagedSteps, cache: PagedKVCache) -> None:
        self._steps, self._cache = steps, cache

    def step(
        self, rows: Sequence[int], tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int] | np.ndarray
    ) -> np.ndarray:
        """Append one token to each row in `rows`; see Decoder.step. Raises EngineRunError for a row without a prompt.

        The engine takes a row at a position within its prompt for a prompt that is prefilled, so that is refused too.
        """
        check_slots(rows, slots, self._cache.capacity)
        step_rows = []
        for row, token, position, slot in zip(rows, tokens, positions, np.asarray(slots).reshape(-1), strict=True):
            prompt_length = int(self._cache.prompt_lengths[row])
            if not 0 < prompt_length <= position:
                raise EngineRunError(
                    f"row {row} was to decode at position {position}; it holds a prompt of {prompt_length} tokens"
                )
            step_rows.append(StepRow(np.array([token]), prompt_length, int(position), int(slot)))
        return self._steps.decode([self._cache.sequences[row] for row in rows], step_rows)
