"""What a session needs of an engine, whichever engine it is: caches, a prefiller, a decoder."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from chunkkv.requests import Request


@dataclass(frozen=True)
class Choice:
    """What ChunkKV decided for one row: per leader layer the kept positions (ascending) and the token scores."""

    kept_indices: dict[int, np.ndarray]
    token_scores: dict[int, np.ndarray]


@dataclass(frozen=True)
class Prefilled:
    """What prefill made of one prompt.

    `logits` [vocab] float32 follow its last token, None where cancelled; `choice` is None where every token stays.
    Times are seconds; `compress_s` is 0 where the engine compacts within prefill. `scratch_cache_bytes` are keys and
    values that were alive for this prompt beside its own rows of the cache.
    """

    logits: np.ndarray | None
    choice: Choice | None = None
    prefill_s: float = 0.0
    compress_s: float = 0.0
    scratch_cache_bytes: int = 0


class KVCache(Protocol):
    """Keys and values of some rows; rows are independent requests."""

    @property
    def capacity(self) -> int:
        """Slots per row."""

    def rows(self, first: int, count: int) -> Any:
        """Return `count` rows from `first` as a cache that shares this cache's memory."""


class Prefiller(Protocol):
    """Runs prompts and leaves their kept tokens in the first slots of a cache; lives as long as one call needs it."""

    max_rows: int  # prompts that one run takes

    def run(self, requests: Sequence[Request], out: Any, cancel: threading.Event) -> list[Prefilled]:
        """Prefill the prompts into `out`, a cache of as many rows; slots behind the kept tokens are meaningless."""


class Decoder(Protocol):
    """One decode step for all rows of a cache.

    Before run(), fill input_ids [B,1] int64, position_ids [B,1] int64 (logical) and cache_lengths [B] int32 (the slot
    to write). A row without an answer rides along; where all three are 0 it may write its slot 0, and nothing else.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    cache_lengths: np.ndarray

    def run(self) -> np.ndarray:
        """Run one step and return the logits [B,vocab] float32; the array is overwritten by the next step."""


class Executor(Protocol):
    """The graphs of one engine directory, ready to run; thread-safe, each call on caches of its own."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one cached token takes in all layers together."""

    def capacity_for(self, tokens: int) -> int:
        """Return the slots that a cache for `tokens` tokens has."""

    def new_cache(self, rows: int, capacity: int) -> Any:
        """Return an empty cache; `capacity` comes from capacity_for."""

    def prefiller(self) -> Prefiller:
        """Return what prefills the prompts of one call."""

    def decoder(self, cache: Any) -> Decoder:
        """Return a loop body that appends one token per row to `cache`."""
