"""One prompt's full cache in the product's own engine, and answers scored on what a choice keeps of it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from chunkkv.evaluation.lm_eval.continuations import log_probabilities
from chunkkv.executors.host_cache import HostKVCache
from chunkkv.session import ChunkKVSession


@dataclass
class FullCache:
    """Everything a policy may look at.

    `keys` and `values` [layers][Hkv,L,D] are rotated and uncompressed; `queries` [layers,Hq,W,D] are those of the last
    W tokens of ids [L]. `next_token` is the most likely one behind a prompt that was appended to.
    """

    ids: np.ndarray
    keys: list[np.ndarray]
    values: list[np.ndarray]
    queries: np.ndarray
    next_token: int = -1

    def __len__(self) -> int:
        """Tokens of the prompt."""
        return len(self.ids)


@dataclass(frozen=True)
class Scored:
    """Per scored token whether it is the most likely one, and its log probability."""

    right: tuple[int, ...]
    log_probabilities: tuple[float, ...]


class Engine:
    """The engine that prefills and scores: built with the largest window, every layer leading itself."""

    def __init__(self, session: ChunkKVSession) -> None:
        assert session.settings is not None and session.tokenizer is not None
        self.session, self.tokenizer = session, session.tokenizer
        self.window = session.settings.window
        self._executor = session.executor
        self._prefiller = session.executor.blockwise_prefiller()

    def prefill(self, ids: Sequence[int]) -> FullCache:
        """Return the full cache of a prompt."""
        cache = self._prefiller.new_cache(1, len(ids))
        _, queries = self._prefiller.fill(np.array(ids, np.int64), cache, threading.Event())
        return _full(ids, cache, queries)

    def append(self, full: FullCache, ids: Sequence[int]) -> FullCache:
        """Return the full cache of a prompt that goes on with `ids`; the prompt's own is reused.

        The block that is run holds at least as many tokens as the window, so some tokens before it may run again.
        """
        whole = np.concatenate([full.ids, np.array(ids, np.int64)])
        start = min(len(full), len(whole) - self.window)
        cache = self._prefiller.new_cache(1, len(whole))
        for sources, targets in ((full.keys, cache.keys), (full.values, cache.values)):
            for source, target in zip(sources, targets, strict=True):
                target[0][:, :start] = source[:, :start]
        logits, queries = self._prefiller.fill(whole[start:], cache, threading.Event(), filled=start)
        assert logits is not None
        return replace(_full(whole, cache, queries), next_token=int(logits.argmax()))

    def filled(self, full: FullCache, kept: np.ndarray | None, room: int) -> HostKVCache:
        """Return a cache with what is kept of a prompt, and room behind it; `kept` as in score."""
        size = len(full) if kept is None else kept.shape[2]
        cache = self._prefiller.new_cache(1, size + room)
        for sources, targets in ((full.keys, cache.keys), (full.values, cache.values)):
            for layer, (source, target) in enumerate(zip(sources, targets, strict=True)):
                if kept is None:
                    target[0][:, :size] = source
                else:
                    for head, positions in enumerate(kept[layer]):
                        np.take(source[head], positions, axis=0, out=target[0, head, :size])
        return cache

    def score(
        self, full: FullCache, kept: np.ndarray | None, fed: Sequence[int], answer: Sequence[int], first: int
    ) -> Scored:
        """Score the tokens of `answer` from `first` on, behind `fed`, on what is kept of a prompt.

        `kept` int [layers,Hkv,N] are ascending positions; None keeps everything. `first` is at least 1 where `fed` is
        empty: the first token behind a prompt comes from its prefill.
        """
        block = np.array([*fed, *answer[:-1]], np.int64)
        cache = self.filled(full, kept, len(block))
        size = len(full) if kept is None else kept.shape[2]
        logits = self._executor.score_block(cache, block, size, len(full))
        scored = logits[len(fed) + first - 1 :]
        expected = np.array(answer[first:], np.int64)
        right = scored.argmax(axis=1) == expected
        return Scored(tuple(map(int, right)), tuple(log_probabilities(scored, expected).tolist()))


def _full(ids: Sequence[int] | np.ndarray, cache: HostKVCache, queries: dict[int, np.ndarray]) -> FullCache:
    return FullCache(
        np.array(ids, np.int64),
        [array[0] for array in cache.keys],
        [array[0] for array in cache.values],
        np.stack([queries[layer][0] for layer in range(len(cache.keys))]),
    )
