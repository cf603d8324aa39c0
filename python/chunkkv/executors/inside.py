"""What an engine shows of its inside, for evaluation: whole caches in host memory, and heads of unequal lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from chunkkv.cache_layout import Slots
from chunkkv.executors.host_cache import HostKVCache
from chunkkv.rereading import Piece


@dataclass(frozen=True)
class Choice:
    """What ChunkKV decided for one row.

    Parameters
    ----------
    kept_indices : mapping of int to numpy.ndarray
        Per part of the cache in a leader layer the kept positions [N] int32, ascending; [H,N] where each of its H heads
        chooses for itself. A layer is one part, of its number, where the budget is not split by heads.
    token_scores : mapping of int to numpy.ndarray
        Per part that scores the score of every prompt token [L] float32; [H,L] where each head chooses for itself.
    kept_lengths : tuple of int
        Slots that the kept tokens fill, one number for each length class.
    """

    kept_indices: Mapping[int, np.ndarray]
    token_scores: Mapping[int, np.ndarray]
    kept_lengths: Slots


class CancelSignal(Protocol):
    """Says whether the caller has given up; a threading.Event is one."""

    def is_set(self) -> bool:
        """Return whether to stop."""


class BlockwisePrefiller(Protocol):
    """Prefill and compression as two calls, over caches in host memory that can be read in between."""

    def new_cache(self, rows: int, capacity: int | Sequence[int]) -> HostKVCache:
        """Return an empty cache of `rows` rows; `capacity` slots each, or one number for each length class."""

    def fill(
        self, ids: np.ndarray, cache: HostKVCache, cancel: CancelSignal, *, filled: int = 0
    ) -> tuple[np.ndarray | None, dict[int, np.ndarray]]:
        """Write the keys and values of a whole prompt, ids [L] int64, to the first L slots of a cache of one row.

        Returns the logits [vocab] after its last token, None where cancelled, and per leader layer its last w rotated
        queries [1,Hq,min(w,L),D], or those of each part of the cache that scores. Where `filled` slots hold the
        beginning of a prompt, `ids` are the tokens behind it, and queries are those of `ids` alone.
        """

    def compress(
        self,
        full: HostKVCache,
        queries: Mapping[int, np.ndarray],
        ids: np.ndarray,
        keep_per_10k: int,
        budget_tokens: int,
        out: HostKVCache,
        window: int = 0,
    ) -> Choice:
        """Choose what one row keeps and copy it to the first slots of `out`.

        The last `window` queries score the tokens, 0 stands for all of the engine's window.
        `full` [1,Hkv,L,D] and `queries` come from fill(). Slots of `out` behind the kept tokens become meaningless.
        """

    def reread_scores(self, full: HostKVCache, length: int, pieces: Sequence[Piece]) -> dict[int, np.ndarray]:
        """Return what the tokens of a prompt receive from a second reading, per part that scores [H,length] float32.

        `full` comes from fill() and has room for the longest piece behind the prompt. Needs capability `rereads`.
        """


class HeadScorer(Protocol):
    """Scores blocks behind kept tokens that differ in number from head to head; for evaluation."""

    def score_block(
        self,
        keys: Sequence[Sequence[np.ndarray]],
        values: Sequence[Sequence[np.ndarray]],
        ids: np.ndarray,
        position: int,
        first: int = 0,
    ) -> np.ndarray:
        """Return the logits [S-first,vocab] float32 after the tokens ids [S] int64 from number `first` on.

        Token 0 stands at logical `position`. `keys` and `values` hold per layer and KV head the kept tokens [N,D]
        float32.
        """
