"""Prefill in blocks over a full cache, then compress once: for engines whose graphs do one step at a time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from chunkkv import profiling
from chunkkv.errors import EngineMismatchError
from chunkkv.executors.host_cache import HostKVCache
from chunkkv.executors.interface import CancelSignal, Choice, PrefillProgress, PrefillResult, no_progress
from chunkkv.executors.onnxruntime.graphs import OnnxRuntimeCompress, OnnxRuntimeStep
from chunkkv.requests import Request


class OnnxRuntimePrefiller:
    """Prefills one prompt at a time in blocks; the full cache is reused between prompts of one length.

    Parameters
    ----------
    step : OnnxRuntimeStep
        The graph that appends a block.
    compress_graph : OnnxRuntimeCompress or None
        The graph that compresses; None for an engine without ChunkKV.
    block : int
        The largest block, in tokens.
    window : int
        The observation window in tokens, at most `block`: the last block of a prompt holds at least as many.
    """

    max_rows = 1

    def __init__(
        self, step: OnnxRuntimeStep, compress_graph: OnnxRuntimeCompress | None, block: int, window: int
    ) -> None:
        self._step, self._compress_graph, self._block, self._window = step, compress_graph, block, window
        self._full: HostKVCache | None = None

    def run(
        self,
        requests: Sequence[Request],
        out: HostKVCache,
        cancel: CancelSignal,
        progress: PrefillProgress = no_progress,
    ) -> list[PrefillResult]:
        """Prefill the one prompt in `requests`; a prompt of which every token stays is written straight to `out`."""
        (request,) = requests
        started = time.perf_counter()
        length = len(request.ids)
        compresses = request.kept_tokens < length
        if compresses and (self._full is None or self._full.capacity != length):
            self._full = None  # frees the old one before the new one is allocated
            self._full = self.new_cache(1, length)
        cache = self._full if compresses else out
        assert cache is not None
        with profiling.range_of("prefill", requests):
            logits, queries = self.fill(request.ids, cache, cancel, progress)
        if logits is None:
            return [PrefillResult(None)]
        prefill_s = time.perf_counter() - started
        if not compresses:
            return [PrefillResult(logits, prefill_s=prefill_s)]
        started = time.perf_counter()
        budget = request.keep_per_10k, request.budget_tokens
        with profiling.range_of("compress", requests):  # score, select and compact of all layers are one graph
            choice = self.compress(cache, queries, request.ids, *budget, out)
        return [PrefillResult(logits, choice, prefill_s, time.perf_counter() - started, cache.nbytes)]

    def new_cache(self, rows: int, capacity: int) -> HostKVCache:
        """Return an empty cache of `rows` rows with `capacity` slots each."""
        return self._step.new_cache(rows, capacity)

    def fill(
        self, ids: np.ndarray, cache: HostKVCache, cancel: CancelSignal, progress: PrefillProgress = no_progress
    ) -> tuple[np.ndarray | None, dict[int, np.ndarray]]:
        """Write the keys and values of a whole prompt to a cache of one row; see BlockwisePrefiller.fill."""
        logits: np.ndarray | None = None
        queries: dict[int, np.ndarray] = {}
        filled = 0
        for size in block_sizes(len(ids), self._block, self._window):
            if cancel.is_set():
                return None, {}
            logits, queries = self._step.append_prompt_block(cache, ids[filled : filled + size], filled)
            filled += size
            progress(filled, len(ids))
        return logits, queries

    def compress(
        self,
        full: HostKVCache,
        queries: Mapping[int, np.ndarray],
        ids: np.ndarray,
        keep_per_10k: int,
        budget_tokens: int,
        out: HostKVCache,
    ) -> Choice:
        """Choose what one row keeps and copy it to `out`; raises EngineMismatchError for an engine without ChunkKV."""
        if self._compress_graph is None:
            raise EngineMismatchError("this engine was built without ChunkKV and cannot compress: build with --chunkkv")
        return self._compress_graph.run(full, queries, ids, keep_per_10k, budget_tokens, out)


def block_sizes(length: int, block: int, window: int) -> list[int]:
    """Split a prompt into prefill blocks of at most `block` tokens, the last with at least min(window, length).

    The scores need the queries of the whole window, and a block returns only its own. Requires window <= block.
    """
    sizes = [block] * (length // block)
    rest = length % block
    if rest:
        sizes.append(rest)
        if len(sizes) > 1 and rest < window:
            sizes[-2:] = [block + rest - window, window]
    return sizes
