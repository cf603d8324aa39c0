"""How long an evaluation will take: a short prefill and a few decode steps are timed, and the plan is counted."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np

from chunkkv.session import ChunkKVSession

_PROBE_TOKENS, _PROBE_STEPS = 256, 4
_QUESTION_TOKENS, _ANSWER_TOKENS = 20, 16  # of a usual prompt


def estimate_seconds(session: ChunkKVSession, lengths: Sequence[int], rows: int, after: float) -> float:
    """Return about how many seconds prompts of these lengths will take; it runs the engine for a moment.

    Parameters
    ----------
    session : ChunkKVSession
        The engine; it must leave a prompt's whole cache readable (backend onnxruntime).
    lengths : Sequence[int]
        Tokens of every prompt to come.
    rows : int
        Compressed caches per prompt that are decoded together: policies times keep ratios.
    after : float
        Share of the prompts whose question is asked after compression, token by token.
    """
    if not lengths:
        return 0.0
    prefiller = session.executor.blockwise_prefiller()
    probe = min(_PROBE_TOKENS, session.limits.max_input_len)
    cache = prefiller.new_cache(1, probe)
    ids = np.random.default_rng(0).integers(0, session.limits.vocab_size, probe)
    start = time.monotonic()
    prefiller.fill(ids, cache, threading.Event())
    per_token = (time.monotonic() - start) / probe
    step = _seconds_per_step(session, max(1, min(rows, session.limits.max_batch_size)))
    steps = -(-rows // session.limits.max_batch_size) * (_ANSWER_TOKENS + after * _QUESTION_TOKENS)
    return sum(per_token * length + step * steps for length in lengths)


def _seconds_per_step(session: ChunkKVSession, rows: int) -> float:
    capacity = min(_PROBE_TOKENS, session.limits.max_seq_len)
    cache = session.executor.blockwise_prefiller().new_cache(rows, capacity)
    decoder = session.executor.decoder(cache)
    slots = [capacity - _PROBE_STEPS - 1] * rows
    start = time.monotonic()
    for step in range(_PROBE_STEPS):
        decoder.step(range(rows), [0] * rows, [slot + step for slot in slots], [slot + step for slot in slots])
    return (time.monotonic() - start) / _PROBE_STEPS


def duration(seconds: float) -> str:
    """Return seconds in words, roughly."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} seconds"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} minutes"
    return f"{seconds / 3600:.1f} hours"
