"""From logits to the next token: greedy or sampled, with the usual knobs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np

from chunkkv.errors import EngineRunError, RequestError

_WHOLE = "a whole number"
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
_MIN_PENALTY, _MAX_PENALTY = 1e-3, 1e3
_MAX_BIAS = 100
_BIAS_RANGE = f"a number from -{_MAX_BIAS} to {_MAX_BIAS}"
MAX_TOP = 100  # top_logprobs
_INTERVALS = 2048  # enough that one of them holds few tokens of a large vocabulary, whatever the distribution
_NEGLIGIBLE = 50.0  # exp(-50) of a vocabulary's size does not change a sum of float64 that holds exp(0)
_SMALLEST_DIVISOR = 1e-300


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
    min_p : float, default 0.0
        Draw only from tokens whose probability is at least this share of the likeliest one's, in [0, 1]; 0 is off. It
        comes before top_k and top_p.
    repetition_penalty : float, default 1.0
        Divides the positive logits of tokens that prompt or answer hold already, and multiplies negative ones
        (Keskar et al., arXiv 1909.05858), from 0.001 to 1000; 1 is off.
    presence_penalty : float, default 0.0
        Is taken from the logits of all tokens that the answer holds already, from -100 to 100; 0 is off.
    frequency_penalty : float, default 0.0
        The same, once for every time that the token stands there.
    penalise_prompt : bool, default False
        Presence and frequency penalties count the tokens of the prompt, too.
    logit_bias : mapping of int to float, default {}
        Is added to the logits of these token ids, each from -100 to 100.
    min_tokens : int, default 0
        The answer does not end before it has this many tokens: its end tokens cannot be chosen, and stop strings do not
        count. At most max_new_tokens.
    seed : int or None, default None
        Starts each prompt's own generator, so a prompt gives the same tokens alone and in a batch. None draws a fresh
        seed.
    stop : str or sequence of str, default ()
        The answer ends before any of these strings. A special token may be one or stand in one, such as "<|im_end|>".
    stop_token_ids : sequence of int, default ()
        The answer ends at any of these tokens, which have no text in it; also with `ignore_eos`.
    ignore_eos : bool, default False
        Do not end at an end token, unless it is in `stop` or `stop_token_ids`.
    logprobs : bool, default False
        Return the natural logarithm of each chosen token's probability under the model, before temperature and filters.
    top_logprobs : int, default 0
        Return that of this many likeliest tokens, too, at each place; needs `logprobs`.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalise_prompt: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    seed: int | None = None
    stop: str | Sequence[str] = ()  # a tuple once it is checked
    stop_token_ids: Sequence[int] = ()  # a tuple once it is checked
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        for name in ("ignore_eos", "logprobs", "penalise_prompt"):
            if not isinstance(getattr(self, name), (bool, np.bool_)):
                raise RequestError(f"{name} is {getattr(self, name)!r}; give True or False")
            object.__setattr__(self, name, bool(getattr(self, name)))
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _stop_token_ids(self.stop_token_ids))
        self._check("max_new_tokens", Integral, lambda v: v >= 1, f"{_WHOLE} of at least 1")
        self._check("temperature", Real, lambda v: 0 <= v < math.inf, "a number of at least 0 (0 = greedy)")
        self._check("top_k", Integral, lambda v: v >= 0, f"{_WHOLE} of at least 0 (0 = off)")
        self._check("top_p", Real, lambda v: 0 < v <= 1, "a number in (0, 1] (1 = off)")
        self._check("min_p", Real, lambda v: 0 <= v <= 1, "a number in [0, 1] (0 = off)")
        for name in ("presence_penalty", "frequency_penalty"):
            self._check(
                name, Real, lambda v: abs(v) <= _MAX_BIAS, f"a number from -{_MAX_BIAS} to {_MAX_BIAS} (0 = off)"
            )
        most = self.max_new_tokens
        self._check("min_tokens", Integral, lambda v: 0 <= v <= most, f"{_WHOLE} from 0 to max_new_tokens, {most}")
        self._check("top_logprobs", Integral, lambda v: 0 <= v <= MAX_TOP, f"{_WHOLE} from 0 to {MAX_TOP}")
        if self.top_logprobs and not self.logprobs:
            raise RequestError(f"top_logprobs is {self.top_logprobs} without logprobs; give logprobs=True as well")
        object.__setattr__(self, "logit_bias", _logit_bias(self.logit_bias))
        penalty_rule = f"a number from {_MIN_PENALTY:g} to {_MAX_PENALTY:g} (1 = off)"
        self._check("repetition_penalty", Real, lambda v: _MIN_PENALTY <= v <= _MAX_PENALTY, penalty_rule)
        if self.seed is not None:
            self._check("seed", Integral, lambda v: 0 <= v < 2**63, f"{_WHOLE} from 0 to 2**63 - 1")

    def _check(self, name: str, kind: type, allowed: Callable[[Any], bool], rule: str) -> None:
        """Refuse a value that is not allowed; NumPy's numbers become Python's, which do not overflow."""
        value: Any = getattr(self, name)
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        try:
            if not is_number:
                raise ValueError
            plain = int(value) if kind is Integral else float(value)
            if not allowed(plain):
                raise ValueError
        except (ValueError, OverflowError):
            raise RequestError(f"{name} is {value!r}; give {rule}") from None
        object.__setattr__(self, name, plain)


def _stop_strings(stop: object) -> tuple[str, ...]:
    stop = (stop,) if isinstance(stop, str) else stop or ()
    if not isinstance(stop, Sequence):
        raise RequestError(f"stop is {stop!r}; give a string or a list of strings")
    for text in stop:
        if not isinstance(text, str) or not text:
            raise RequestError(f"stop contains {text!r}; give non-empty strings")
    return tuple(stop)


@dataclass(frozen=True)
class TokenChoice:
    """A token that was chosen.

    Parameters
    ----------
    token : int
        Its id.
    logprob : float or None, default None
        Natural logarithm of its probability under the model; None where nobody asked.
    top : tuple of (int, float), default ()
        Ids of the likeliest tokens at this place with their log probabilities, the likeliest first.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one prompt; holds its random generator and the tokens seen so far.

    Parameters
    ----------
    params : SamplingParams
        How tokens are chosen.
    seen : numpy.ndarray
        The prompt's token ids, which the repetition penalty counts in.
    vocab_size : int
        Length of the logits.
    end_ids : iterable of int, default ()
        Tokens that would end the answer, which are not chosen within `min_tokens`.
    """

    def __init__(self, params: SamplingParams, seen: np.ndarray, vocab_size: int, end_ids: Iterable[int] = ()) -> None:
        self._params = params
        self._random = np.random.default_rng(params.seed)
        self._seen = np.zeros(vocab_size, dtype=bool)
        self._seen[seen] = True
        self._counts: dict[int, int] = {}  # of the tokens that presence and frequency penalties hit
        if params.penalise_prompt and (params.presence_penalty or params.frequency_penalty):
            self._counts = dict(zip(*(part.tolist() for part in np.unique(seen, return_counts=True)), strict=True))
        self._chosen = 0
        self._biased = np.fromiter(params.logit_bias, np.int64)
        self._bias = np.fromiter(params.logit_bias.values(), np.float32)
        self._ends = np.array(sorted(token for token in end_ids if token < vocab_size), np.int64)
        self._memory: _Memory | None = None  # made when it is needed: greedy answers need none

    def choose(self, logits: np.ndarray) -> TokenChoice:
        """Return the next token for logits [vocab] float32, with its log probability where asked for.

        Raises EngineRunError where a logit is infinite or NaN: no token would mean anything.
        """
        check_finite(logits)
        params = self._params
        scores = self._adjusted(logits)
        token = int(scores.argmax()) if params.temperature == 0 else self._sample(scores)
        self._seen[token] = True
        self._counts[token] = self._counts.get(token, 0) + 1
        self._chosen += 1
        if not params.logprobs:
            return TokenChoice(token)
        return TokenChoice(token, log_softmax_at(logits, token), _top(logits, params.top_logprobs))

    def _adjusted(self, logits: np.ndarray) -> np.ndarray:
        """Return the logits with bias and penalties, and without end tokens where the answer must go on."""
        params, scores = self._params, logits
        if params.repetition_penalty != 1.0:
            scores = self._penalised(scores)
        if len(self._biased) or ((params.presence_penalty or params.frequency_penalty) and self._counts):
            scores = scores.copy()
            tokens = np.fromiter(self._counts, np.int64)
            counts = np.fromiter(self._counts.values(), np.float64)
            scores[tokens] -= (params.presence_penalty + params.frequency_penalty * counts).astype(np.float32)
            scores[self._biased] += self._bias
            np.clip(scores, -_LARGEST_FLOAT32, _LARGEST_FLOAT32, out=scores)
        if self._chosen < params.min_tokens and len(self._ends):
            scores = scores.copy()
            scores[self._ends] = -np.inf
        return scores

    def _penalised(self, logits: np.ndarray) -> np.ndarray:
        penalty = float(np.float32(self._params.repetition_penalty))
        seen = np.flatnonzero(self._seen)
        values = logits[seen].astype(np.float64)  # float32 could overflow here; rounded afterwards, it gives the same
        penalised = np.where(values > 0, values / penalty, values * penalty)
        scores = logits.copy()
        scores[seen] = np.clip(penalised, -_LARGEST_FLOAT32, _LARGEST_FLOAT32)
        return scores

    def _sample(self, scores: np.ndarray) -> int:
        """Draw from softmax(scores / temperature), cut by min_p, top_k, then to the smallest set with top_p."""
        params = self._params
        tokens = None
        if params.min_p > 0:
            # A float64 takes what temperature * log(min_p) adds up to; a float32 could overflow.
            lowest = float(scores.max()) + params.temperature * math.log(params.min_p)
            tokens = np.flatnonzero(scores >= lowest)
            scores = scores[tokens]
        if 0 < params.top_k < len(scores):
            count = len(scores)
            lowest = np.partition(scores, count - params.top_k)[count - params.top_k]
            likely = np.flatnonzero(scores >= lowest)  # with ties more than top_k
            likely = np.sort(likely[np.argsort(-scores[likely], kind="stable")[: params.top_k]])
            tokens, scores = likely if tokens is None else tokens[likely], scores[likely]
        if self._memory is None or self._memory.size < len(scores):
            self._memory = _Memory(len(scores))
        ranking = _Ranking(scores, params.temperature, self._memory)
        mass = ranking.mass
        if params.top_p < 1.0:
            mass = ranking.first_reaching(params.top_p * mass)[1]
        # Below `mass` also where the product is rounded up to it, so that the token is one of the set.
        drawn = min(self._random.random() * mass, float(np.nextafter(mass, 0.0)))
        token = ranking.first_reaching(drawn, strictly=True)[0]
        return token if tokens is None else int(tokens[token])


def _logit_bias(bias: object) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise RequestError(f"logit_bias is {bias!r}; give a mapping of token ids to numbers")
    checked = {}
    for token, value in bias.items():
        if isinstance(token, bool) or not isinstance(token, Integral) or token < 0:
            raise RequestError(f"logit_bias has token id {token!r}; give {_WHOLE}s of at least 0")
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not is_number or not abs(value) <= _MAX_BIAS:
            raise RequestError(
                f"logit_bias is {value!r} for token {token}; give a number from -{_MAX_BIAS} to {_MAX_BIAS}"
            )
        checked[int(token)] = float(value)
    return checked


def check_bias(params: SamplingParams, vocab_size: int) -> None:
    """Raise RequestError for a logit_bias on a token that the model does not have."""
    beyond = next((token for token in params.logit_bias if token >= vocab_size), None)
    if beyond is not None:
        raise RequestError(f"logit_bias has token id {beyond}; allowed is 0 to {vocab_size - 1}")


def _top(logits: np.ndarray, count: int) -> tuple[tuple[int, float], ...]:
    """Return the likeliest tokens with their log probabilities in float64, equals by their id."""
    count = min(count, len(logits))
    if count == 0:
        return ()
    values = logits.astype(np.float64)
    lowest = np.partition(values, len(values) - count)[len(values) - count]
    tokens = np.flatnonzero(values >= lowest)
    tokens = tokens[np.argsort(-values[tokens], kind="stable")[:count]]
    top = values.max()
    total = top + np.log(np.exp(values - top).sum())
    return tuple((int(token), float(values[token] - total)) for token in tokens)


def _stop_token_ids(ids: object) -> tuple[int, ...]:
    if not isinstance(ids, (Sequence, np.ndarray)) or isinstance(ids, (str, bytes)):
        raise RequestError(f"stop_token_ids is {ids!r}; give a list of token ids")
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, Integral) or token < 0:
            raise RequestError(f"stop_token_ids contains {token!r}; give {_WHOLE}s of at least 0")
    return tuple(int(token) for token in ids)


class _Memory:
    """Arrays as long as the vocabulary, kept from token to token: fresh memory costs more than what is computed."""

    def __init__(self, vocab_size: int) -> None:
        self.size = vocab_size
        self.weights = np.empty(vocab_size, np.float64)
        self.places = np.empty(vocab_size, np.float32)
        self.intervals = np.empty(vocab_size, np.intp)


class _Ranking:
    """Tokens from the likeliest to the least likely, equals by their id, without sorting a whole vocabulary.

    Tokens are counted into intervals of scores, likeliest first; only an interval that is asked for is sorted.

    Parameters
    ----------
    scores : numpy.ndarray
        Finite scores [n] float32.
    temperature : float
        They are divided by it; above 0.
    memory : _Memory
        Belongs to this object while it lives.
    """

    def __init__(self, scores: np.ndarray, temperature: float, memory: _Memory) -> None:
        best, count = scores.max(), len(scores)
        self._scores, self._weights = scores, memory.weights[:count]
        self._interval = memory.intervals[:count]
        intervals = _INTERVALS if count > _INTERVALS else 1
        with np.errstate(over="ignore"):  # what is beyond the range of a float gets weight 0 and the last interval
            np.subtract(scores, best, out=self._weights, dtype=np.float64)
            # Behind the farthest score that counts, everything is one interval.
            farthest = max(min(-float(self._weights.min()), _NEGLIGIBLE * temperature), _SMALLEST_DIVISOR)
            place = memory.places[:count]
            np.subtract(best, scores, out=place)
            np.multiply(place, np.float32(min(intervals / farthest, _LARGEST_FLOAT32)), out=place)
            np.minimum(place, np.float32(intervals - 1), out=place)
            self._interval[:] = place
            np.divide(self._weights, temperature, out=self._weights)
            np.exp(self._weights, out=self._weights)
        self._cumulated = np.cumsum(np.bincount(self._interval, self._weights, intervals))
        self.mass = float(self._cumulated[-1])

    def first_reaching(self, mass: float, strictly: bool = False) -> tuple[int, float]:
        """Return the first token whose weight, with those of all likelier ones, reaches `mass`, and that sum.

        With `strictly` the sum must be above `mass`. The likeliest token has weight 1.
        """
        side: Literal["left", "right"] = "right" if strictly else "left"
        interval = min(int(np.searchsorted(self._cumulated, mass, side)), len(self._cumulated) - 1)
        members = np.flatnonzero(self._interval == interval)
        scores = self._scores[members]
        if scores.min() < scores.max():
            members = members[np.argsort(-scores, kind="stable")]
        before = float(self._cumulated[interval - 1]) if interval else 0.0
        sums = before + np.cumsum(self._weights[members])
        # The interval's own sum was added up in another order, so `mass` may lie above the last one by a rounding.
        rank = min(int(np.searchsorted(sums, mass, side)), len(members) - 1)
        return int(members[rank]), float(sums[rank])


def check_finite(logits: np.ndarray) -> None:
    """Raise EngineRunError unless all logits [..., vocab] are finite."""
    finite = np.isfinite(logits)
    if not finite.all():
        count = finite.size - int(finite.sum())
        raise EngineRunError(
            f"the model gave {count} logits of {finite.size} that are infinite or NaN, so no token can be chosen: its "
            "numbers overflow; check the checkpoint's weights, or build with --dtype float32"
        )


def log_softmax_at(logits: np.ndarray, token: int) -> float:
    """Return log softmax(logits)[token] in float64."""
    values = logits.astype(np.float64)
    top = values.max()
    return float(values[token] - top - np.log(np.exp(values - top).sum()))
