"""Decode on ONNX Runtime: one step graph, bound once to a cache and to the arrays that change from step to step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort

from chunkkv.executors.host_cache import HostKVCache
from chunkkv.executors.onnxruntime.graphs import OnnxRuntimeStep, bind_arrays, bind_cache
from chunkkv.executors.step_arrays import StepArrays, check_slots


class OnnxRuntimeDecoder:
    """Appends tokens to the rows of one cache; idle rows are computed too and write their slot 0.

    Parameters
    ----------
    step : OnnxRuntimeStep
        The engine's step graph.
    cache : HostKVCache
        The cache to append to.
    session : onnxruntime.InferenceSession, optional
        Another graph with the same inputs and outputs to run instead of the engine's own.
    """

    def __init__(self, step: OnnxRuntimeStep, cache: HostKVCache, session: ort.InferenceSession | None = None) -> None:
        rows = cache.row_count
        self._session = session or step.session
        self._binding = bind_cache(self._session, cache)
        self._cache = cache  # the binding holds raw pointers into it
        self._arrays = StepArrays(
            np.zeros((rows, 1), np.int64),
            np.zeros((rows, 1), np.int64),
            np.zeros((step.layout.length_classes, rows), np.int32),
        )
        self._logit_indices = np.zeros((rows, 1), np.int64)  # a block of one token: its logits are wanted
        self._logits = np.empty((rows, 1, step.vocab_size), np.float32)
        inputs = {
            "input_ids": self._arrays.input_ids,
            "position_ids": self._arrays.position_ids,
            "cache_lengths": self._arrays.cache_lengths,
            "logit_indices": self._logit_indices,
        }
        if step.query_heads:  # decode has no use for the window's queries, and an output that is not bound is dropped
            inputs["query_count"] = self._query_count = np.zeros(1, np.int64)
        bind_arrays(self._binding, inputs, {"logits": self._logits})

    def step(
        self, rows: Sequence[int], tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int] | np.ndarray
    ) -> np.ndarray:
        """Append one token to each row in `rows`; see Decoder.step."""
        check_slots(rows, slots, self._cache.capacity)
        self._arrays.fill(rows, tokens, positions, slots)
        return self._run(rows)

    def _run(self, rows: Sequence[int]) -> np.ndarray:
        self._session.run_with_iobinding(self._binding)
        return self._logits[list(rows), 0]
