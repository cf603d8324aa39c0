"""Runs a session on given tokens instead of its own choices, and keeps the logits of every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from chunkkv import SamplingParams
from chunkkv.session import ChunkKVSession

_CERTAIN = 1e4


def forced_logits(
    session: ChunkKVSession, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """Return logits [steps,vocab] per prompt; an answer shorter than the longest must end with an end token."""
    executor, recorder = session.executor, _Recorder(tokens)
    session.executor = _Forced(executor, recorder)  # type: ignore[assignment]
    try:
        results = session.generate([list(prompt) for prompt in prompts], SamplingParams(max(map(len, tokens))))
    finally:
        session.executor = executor
    assert [list(result.token_ids) for result in results] == [list(row) for row in tokens]
    return [np.array(row) for row in recorder.logits]


class _Recorder:
    def __init__(self, tokens: Sequence[Sequence[int]]) -> None:
        self._tokens = tokens
        self.logits: list[list[np.ndarray]] = [[] for _ in tokens]

    def take(self, row: int, logits: np.ndarray) -> np.ndarray:
        """Keep the logits of an open row; return logits that leave no choice but the next given token."""
        certain = np.zeros(logits.shape, np.float32)
        if (step := len(self.logits[row])) < len(self._tokens[row]):
            self.logits[row].append(np.array(logits, np.float32))
            certain[self._tokens[row][step]] = _CERTAIN
        return certain


class _Wrapped:
    def __init__(self, inner: Any, recorder: _Recorder) -> None:
        self.inner, self.recorder = inner, recorder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class _Forced(_Wrapped):
    def prefiller(self) -> Any:
        return _Prefiller(self.inner.prefiller(), self.recorder)

    def decoder(self, cache: Any) -> Any:
        return _Decoder(self.inner.decoder(cache), self.recorder)


class _Prefiller(_Wrapped):
    row = 0

    def start(self, *arguments: Any) -> Any:
        return _PrefillRun(self.inner.start(*arguments), self.recorder, self)


class _PrefillRun(_Wrapped):
    def __init__(self, inner: Any, recorder: _Recorder, prefiller: _Prefiller) -> None:
        super().__init__(inner, recorder)
        self.prefiller = prefiller

    def step(self) -> Any:
        made = self.inner.step()
        for prefilled in made or ():
            object.__setattr__(prefilled, "logits", self.recorder.take(self.prefiller.row, prefilled.logits))
            self.prefiller.row += 1
        return made


class _Decoder(_Wrapped):
    def step(self, rows: Sequence[int], *inputs: Any) -> np.ndarray:
        logits = self.inner.step(rows, *inputs)
        return np.array([self.recorder.take(row, row_logits) for row, row_logits in zip(rows, logits, strict=True)])
