"""Scores given continuations behind a compressed prompt: the log probability of each token, as decode would give it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np

from chunkkv.requests import make_requests
from chunkkv.sampling import check_finite
from chunkkv.session import ChunkKVSession

BLOCK = 64  # tokens whose logits are held at once


class CompressedPrompt:
    """One prompt's kept cache with room for tokens behind it, on any executor.

    Every call of `score` starts anew behind the prompt. Raises RequestError for a prompt or budget that the engine
    cannot serve.

    Parameters
    ----------
    session : ChunkKVSession
        The engine.
    ids : sequence of int
        Token ids of the prompt.
    room : int
        Tokens that may follow the prompt.
    keep_ratio : float or None, default None
        Share of the prompt that stays; None takes the engine's own.
    budget_tokens : int or None, default None
        Tokens that stay, instead of a ratio.
    """

    def __init__(
        self,
        session: ChunkKVSession,
        ids: Sequence[int],
        room: int,
        keep_ratio: float | None = None,
        budget_tokens: int | None = None,
    ) -> None:
        executor = session.executor
        request = make_requests(
            [ids], None, session.limits, session.settings, keep_ratio, budget_tokens, max_new_tokens=room
        )[0]
        self._executor = executor
        self._length, self.kept_tokens = len(request.ids), request.kept_tokens
        self._cache = executor.new_cache(1, executor.capacity_for(request.slots(room)))
        (self._prefilled,) = executor.prefiller().run([request], self._cache.rows(0, 1), threading.Event())
        self._filled = self._prefilled.kept_lengths or request.class_lengths

    def score(self, tokens: Sequence[int], skipped: int = 0) -> tuple[float, bool]:
        """Feed `tokens`; return the log probability of those after the first `skipped`, and whether all are greedy.

        The first token's comes from prefill, with the full cache, as in generation; all others see the kept cache.
        """
        total, greedy, place = 0.0, True, 0
        for logits in self._logits(np.asarray(tokens[:-1], np.int64)):
            check_finite(logits)
            expected = np.asarray(tokens[place : place + len(logits)], np.int64)
            counted = np.arange(place, place + len(logits)) >= skipped
            total += float(log_probabilities(logits, expected)[counted].sum())
            greedy = greedy and bool((logits.argmax(axis=1) == expected)[counted].all())
            place += len(logits)
        return total, greedy

    def _logits(self, fed: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the logits [n,vocab] after the prompt, then after each token of `fed`."""
        assert self._prefilled.logits is not None
        yield self._prefilled.logits[None]
        if self._executor.capabilities.block_scoring:
            for first in range(0, len(fed), BLOCK):
                slots, position = [filled + first for filled in self._filled], self._length + first
                yield self._executor.score_block(self._cache, fed[first : first + BLOCK], slots, position)
        elif len(fed):
            decoder = self._executor.decoder(self._cache)
            for step, token in enumerate(fed.tolist()):
                filled = np.array(self._filled)[:, None] + step  # [length_classes,1]
                yield decoder.step([0], [token], [self._length + step], filled)


def log_probabilities(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return the natural logarithm of the probability of tokens [n] under logits [n,vocab], in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    return wide[np.arange(len(tokens)), tokens] - np.log(np.exp(wide).sum(axis=1))
