"""How long an evaluation will take: a short prefill and a few decode steps are timed, and the plan is counted."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from chunkkv.session import ChunkKVSession

_PROBE_TOKENS, _PROBE_STEPS = 256, 4
_QUESTION_TOKENS, _ANSWER_TOKENS = 20, 16  # of a usual prompt
READINGS = 4.2  # prefills that a prompt takes which is read again, as measured on SmolLM2


@dataclass(frozen=True)
class Work:
    """What one prompt takes.

    Parameters
    ----------
    together : int
        Compressed caches that share one prefill and are decoded together.
    alone : int, default 0
        Compressed caches that are prefilled and decoded one by one, as in use.
    readings : float, default 0.0
        How many prefills the latter take in all.
    after : float, default 0.0
        Share of the prompts whose question is asked after compression, token by token.
    """

    together: int
    alone: int = 0
    readings: float = 0.0
    after: float = 0.0


def estimate_seconds(session: ChunkKVSession, lengths: Sequence[int], work: Work) -> float:
    """Return about how many seconds prompts of these lengths will take; it runs the engine for a moment.

    Parameters
    ----------
    session : ChunkKVSession
        The engine; it must leave a prompt's whole cache readable (backend onnxruntime).
    lengths : Sequence[int]
        Tokens of every prompt to come.
    work : Work
        What each of them takes.
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
    most, decoding = session.limits.max_batch_size, 0.0
    if work.together:
        decoding += -(-work.together // most) * _seconds_per_step(session, min(work.together, most))
    if work.alone:
        decoding += work.alone * _seconds_per_step(session, 1)
    decoding *= _ANSWER_TOKENS + work.after * _QUESTION_TOKENS
    readings = work.readings + (work.together > 0)
    return sum(per_token * readings * length + decoding for length in lengths)


def _seconds_per_step(session: ChunkKVSession, rows: int) -> float:
    capacity = min(_PROBE_TOKENS, session.limits.max_seq_len)
    cache = session.executor.blockwise_prefiller().new_cache(rows, capacity)
    decoder = session.executor.decoder(cache)
    first = capacity - _PROBE_STEPS - 1
    start = time.monotonic()
    for position in range(first, first + _PROBE_STEPS):
        slots = np.full((len(cache.capacity), rows), position)
        decoder.step(range(rows), [0] * rows, [position] * rows, slots)
    return (time.monotonic() - start) / _PROBE_STEPS


def duration(seconds: float) -> str:
    """Return seconds in words, roughly."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} seconds"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} minutes"
    return f"{seconds / 3600:.1f} hours"
