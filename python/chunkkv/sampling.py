"""From logits to the next token: greedy or sampled, with the usual knobs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np

from chunkkv.errors import RequestError

_WHOLE = "a whole number"


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, for every prompt of a call; raises RequestError for a value out of range.

    Parameters
    ----------
    max_new_tokens : int, default 128
        The longest answer, in tokens.
    temperature : float, default 0.0
        Logits are divided by it before a token is drawn; 0 takes the likeliest token (greedy).
    top_k : int, default 0
        Draw from this many likeliest tokens; 0 is off.
    top_p : float, default 1.0
        Draw from the smallest set of likeliest tokens that holds this probability, in (0, 1]; 1 is off.
    repetition_penalty : float, default 1.0
        Divides the positive logits of tokens that prompt or answer hold already, and multiplies negative ones
        (Keskar et al., arXiv 1909.05858); 1 is off.
    seed : int or None, default None
        Starts each prompt's own generator, so a prompt gives the same tokens alone and in a batch. None draws a fresh
        seed.
    stop : str or sequence of str, default ()
        The answer ends before any of these strings.
    ignore_eos : bool, default False
        Do not end at an end token.
    logprobs : bool, default False
        Return the natural logarithm of each chosen token's probability under the model, before temperature and filters.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()  # a tuple once it is checked
    ignore_eos: bool = False
    logprobs: bool = False

    def __post_init__(self) -> None:
        for name in ("ignore_eos", "logprobs"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {getattr(self, name)!r}; give True or False")
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        self._check("max_new_tokens", Integral, lambda v: v >= 1, f"{_WHOLE} of at least 1")
        self._check("temperature", Real, lambda v: 0 <= v < math.inf, "a number of at least 0 (0 = greedy)")
        self._check("top_k", Integral, lambda v: v >= 0, f"{_WHOLE} of at least 0 (0 = off)")
        self._check("top_p", Real, lambda v: 0 < v <= 1, "a number in (0, 1] (1 = off)")
        self._check("repetition_penalty", Real, lambda v: 0 < v < math.inf, "a number above 0 (1 = off)")
        if self.seed is not None:
            self._check("seed", Integral, lambda v: 0 <= v < 2**63, f"{_WHOLE} from 0 to 2**63 - 1")

    def _check(self, name: str, kind: type, allowed: Callable[[Any], bool], rule: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, kind) or not allowed(value):
            raise RequestError(f"{name} is {value!r}; give {rule}")


def _stop_strings(stop: object) -> tuple[str, ...]:
    stop = (stop,) if isinstance(stop, str) else stop or ()
    if not isinstance(stop, Sequence):
        raise RequestError(f"stop is {stop!r}; give a string or a list of strings")
    for text in stop:
        if not isinstance(text, str) or not text:
            raise RequestError(f"stop contains {text!r}; give non-empty strings")
    return tuple(stop)


class Sampler:
    """Chooses the tokens of one prompt; holds its random generator and the tokens seen so far.

    `seen` lists the prompt's token ids, which the repetition penalty counts in.
    """

    def __init__(self, params: SamplingParams, seen: np.ndarray, vocab_size: int) -> None:
        self._params = params
        self._random = np.random.default_rng(params.seed)
        self._seen = np.zeros(vocab_size, dtype=bool)
        self._seen[seen] = True

    def choose(self, logits: np.ndarray) -> tuple[int, float | None]:
        """Return the next token id for logits [vocab] float32, and its log probability where asked for."""
        params = self._params
        scores = logits
        if params.repetition_penalty != 1.0:
            penalty = np.float32(params.repetition_penalty)
            penalised = np.where(logits > 0, logits / penalty, logits * penalty)
            scores = np.where(self._seen, penalised, logits)
        token = int(scores.argmax()) if params.temperature == 0 else self._sample(scores)
        self._seen[token] = True
        return token, (log_softmax_at(logits, token) if params.logprobs else None)

    def _sample(self, scores: np.ndarray) -> int:
        """Draw from softmax(scores / temperature) cut to the top_k, then to the smallest set that holds top_p."""
        order = np.argsort(-scores, kind="stable")
        if self._params.top_k:
            order = order[: self._params.top_k]
        ranked = scores[order].astype(np.float64) / self._params.temperature
        weights = np.exp(ranked - ranked[0])
        weights /= weights.sum()
        if self._params.top_p < 1.0:
            before = np.cumsum(weights) - weights
            count = max(1, int((before < self._params.top_p).sum()))
            order, weights = order[:count], weights[:count] / weights[:count].sum()
        rank = np.searchsorted(np.cumsum(weights), self._random.random(), side="right")
        return int(order[min(int(rank), len(order) - 1)])  # rounding may leave the sum of the weights below 1


def log_softmax_at(logits: np.ndarray, token: int) -> float:
    """Return log softmax(logits)[token] in float64."""
    values = logits.astype(np.float64)
    top = values.max()
    return float(values[token] - top - np.log(np.exp(values - top).sum()))


class StopText:
    """Cuts a stream of text before the first stop string; holds back what may yet become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held_back = ""
        self.found = False

    def push(self, text: str) -> str:
        """Take new text and return what may be shown now."""
        if self.found:
            return ""
        pending = self._held_back + text
        starts = [start for start in (pending.find(stop) for stop in self._stop) if start >= 0]
        if starts:
            self.found = True
            self._held_back = ""
            return pending[: min(starts)]
        shown = len(pending) - max((_overlap(pending, stop) for stop in self._stop), default=0)
        self._held_back = pending[shown:]
        return pending[:shown]

    def flush(self) -> str:
        """Return what is still held back; called at the end of the answer."""
        text, self._held_back = self._held_back, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
