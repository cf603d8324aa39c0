"""Prefill in blocks over a full cache, then compress once: for engines whose graphs do one step at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from chunkkv import profiling
from chunkkv.executors.interface import Prefilled
from chunkkv.requests import Request

if TYPE_CHECKING:
    from chunkkv.executors.onnxruntime.executor import KVCache, OnnxRuntimeExecutor


class BlockwisePrefiller:
    """Prefills one prompt at a time in blocks of at most `block` tokens; the full cache is reused between prompts."""

    max_rows = 1

    def __init__(self, executor: OnnxRuntimeExecutor, block: int, window: int) -> None:
        self._executor, self._block, self._window = executor, block, window
        self._full: KVCache | None = None

    def run(self, requests: Sequence[Request], out: KVCache, cancel: threading.Event) -> list[Prefilled]:
        """Prefill the one prompt in `requests`; a prompt of which every token stays is written straight to `out`."""
        (request,) = requests
        started = time.perf_counter()
        length = len(request.ids)
        compresses = request.kept_tokens < length
        if compresses and (self._full is None or self._full.capacity != length):
            self._full = None  # free the old one first
            self._full = self._executor.new_cache(1, length)
        cache = self._full if compresses else out
        assert cache is not None
        with profiling.range_of("prefill", requests):
            logits, queries = self.fill(request.ids, cache, cancel)
        if logits is None:
            return [Prefilled(None)]
        prefill_s = time.perf_counter() - started
        if not compresses:
            return [Prefilled(logits, prefill_s=prefill_s)]
        started = time.perf_counter()
        budget = request.keep_per_10k, request.budget_tokens
        with profiling.range_of("compress", requests):  # score, select and compact of all layers are one graph
            choice = self._executor.compress(cache, queries, request.ids, *budget, out)
        return [Prefilled(logits, choice, prefill_s, time.perf_counter() - started, cache.nbytes)]

    def fill(
        self, ids: np.ndarray, cache: KVCache, cancel: threading.Event
    ) -> tuple[np.ndarray | None, dict[int, np.ndarray]]:
        """Write the keys and values of a whole prompt, ids [L] int64, to the first L slots of a cache of one row.

        Returns the logits [vocab] after its last token, None where cancelled, and per leader layer its last w rotated
        queries [1,Hq,min(w,L),D].
        """
        logits, queries, filled = None, {}, 0
        for size in block_sizes(len(ids), self._block, self._window):
            if cancel.is_set():
                return None, {}
            logits, queries = self._executor.prefill_block(cache, ids[filled : filled + size], filled)
            filled += size
        return logits, queries


def block_sizes(length: int, block: int, window: int) -> list[int]:
    """Split a prompt into prefill blocks of at most `block` tokens, the last with at least min(window, length).

    Requires window <= block.
    """
    sizes = [block] * (length // block)
    rest = length % block
    if rest:
        sizes.append(rest)
        if len(sizes) > 1 and rest < window:
            sizes[-2:] = [block + rest - window, window]
    return sizes
