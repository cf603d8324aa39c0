"""What a session returns: answers, stream events, statistics, and the choice ChunkKV made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from chunkkv.settings import ChunkKVSettings


@dataclass(frozen=True)
class RequestStatistics:
    """Counts and times of one prompt.

    Times are seconds: `ttft_s` from the call to the first token (compression and the prompts served before it
    included), `tpot_s` the mean decode step this prompt took part in (None for a single token). `cache_bytes` is the
    KV cache of the kept prompt tokens, `full_cache_bytes` that of the whole prompt, `allocated_cache_bytes` what decode
    holds for this prompt: kept tokens and room for the new ones, of the longest prompt of its batch. `peak_cache_bytes`
    adds the keys and values that were alive beside it during prefill: the whole prompt's in all layers, or in one
    layer-reuse group where the engine compacts within prefill; `compress_s` is 0 there, as `prefill_s` includes it.
    """

    prompt_tokens: int
    kept_tokens: int
    new_tokens: int
    ttft_s: float
    tpot_s: float | None
    prefill_s: float
    compress_s: float
    cache_bytes: int
    full_cache_bytes: int
    allocated_cache_bytes: int
    peak_cache_bytes: int


@dataclass(frozen=True)
class GenerationResult:
    """The answer to one prompt.

    `token_ids` holds every generated token, the end token included; `text` leaves special tokens and stop strings out.
    `finish_reason` is "stop" (end token or stop string), "length" or "cancelled". `logprobs` has one value per token
    where asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[float, ...] | None
    statistics: RequestStatistics

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class StreamEvent:
    """New text of prompt `row`; the last event of a row carries its whole result in `finished`."""

    row: int
    text: str
    token_ids: tuple[int, ...]
    finished: GenerationResult | None = None


@dataclass(frozen=True)
class GroupChoice:
    """What one layer-reuse group keeps: ascending positions, the token scores [L] and the chunk starts behind them."""

    layers: tuple[int, ...]
    leader: int
    kept: np.ndarray
    scores: np.ndarray
    chunk_starts: np.ndarray


@dataclass(frozen=True)
class Inspection:
    """One prompt as ChunkKV sees it: its tokens as text and ids, and the choice of every layer-reuse group."""

    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    kept_tokens: int
    settings: ChunkKVSettings
    groups: tuple[GroupChoice, ...]
