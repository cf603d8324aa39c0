"""One prompt's answer while it grows: from logits to tokens, text, the end of the answer and its statistics."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from chunkkv import profiling
from chunkkv.cache_layout import Slots
from chunkkv.executors.interface import Decoder, PrefillResult
from chunkkv.requests import Request
from chunkkv.results import GenerationResult, RequestStatistics, StreamEvent
from chunkkv.sampling import Sampler, SamplingParams, TokenChoice
from chunkkv.stop_text import StopText
from chunkkv.text.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class ModelOutput:
    """What an answer must know of the model that gives it.

    Parameters
    ----------
    vocab_size : int
        Length of its logits.
    eos_token_ids : frozenset of int
        Tokens that end an answer.
    tokenizer : Tokenizer or None
        Turns tokens into text; None leaves texts empty.
    kv_bytes_per_token : int
        Bytes that one token takes that is cached in all heads of all layers.
    cache_bytes : callable
        Returns the bytes of a row of the cache from its slots, one number for each length class.
    """

    vocab_size: int
    eos_token_ids: frozenset[int]
    tokenizer: Tokenizer | None
    kv_bytes_per_token: int
    cache_bytes: Callable[[Slots], int]


class Answer:
    """One prompt's answer as it grows.

    Parameters
    ----------
    row : int
        Its row of the cache that it decodes in; the `row` of its events.
    request : Request
        The prompt.
    sampling : SamplingParams
        How tokens are chosen and what ends the answer.
    capacity : tuple of int
        Slots of that row for each length class, for the statistics.
    model : ModelOutput
        The model that answers.
    """

    def __init__(
        self, row: int, request: Request, sampling: SamplingParams, capacity: Slots, model: ModelOutput
    ) -> None:
        self.row, self.request = row, request
        self._sampling, self._capacity, self._model = sampling, capacity, model
        ends = () if sampling.ignore_eos else model.eos_token_ids
        self._sampler = Sampler(sampling, request.prompt_ids, model.vocab_size, {*ends, *sampling.stop_token_ids})
        self._decoder = StreamDecoder(model.tokenizer) if model.tokenizer else None
        special_texts = model.tokenizer.special_texts if model.tokenizer and sampling.stop else None
        self._stop = StopText(sampling.stop, special_texts)
        self.tokens: list[int] = []
        self._choices: list[TokenChoice] = []  # where log probabilities were asked for
        self._text = ""
        self.finished = False
        self._prefilled = PrefillResult(None)
        self.decode_s = self._ttft_s = 0.0

    @property
    def next_position(self) -> int:
        """Logical position of the last token, which the next decode step appends."""
        return self.request.prompt_tokens + len(self.tokens) - 1

    @property
    def next_slots(self) -> Slots:
        """Cache slot that the next decode step writes in each length class: dropped prompt tokens take none."""
        return tuple(length + len(self.tokens) - 1 for length in self.kept_lengths)

    @property
    def kept_lengths(self) -> Slots:
        """Slots that the prompt fills, one number for each length class."""
        return self._prefilled.kept_lengths or self.request.class_lengths

    def begin(self, prefilled: PrefillResult, began: float) -> StreamEvent:
        """Choose the first token after prefill; `began` is the perf_counter() of the call that asked for the answer."""
        self._prefilled = prefilled
        if prefilled.logits is None:
            return self.cancelled()
        choice = self._choose(prefilled.logits)
        self._ttft_s = time.perf_counter() - began
        return self._append(choice)

    def accept(self, logits: np.ndarray) -> StreamEvent:
        """Choose the next token from logits [vocab] float32."""
        return self._append(self._choose(logits))

    def cancelled(self) -> StreamEvent:
        """End the answer with what there is."""
        return self._finish("", "cancelled", None)

    def _choose(self, logits: np.ndarray) -> TokenChoice:
        with profiling.range_of("sample", (self.request,)):
            return self._sampler.choose(logits)

    def _append(self, choice: TokenChoice) -> StreamEvent:
        token = choice.token
        self.tokens.append(token)
        if self._sampling.logprobs:
            self._choices.append(choice)
        ended = token in self._model.eos_token_ids and not self._sampling.ignore_eos
        ended = ended or token in self._sampling.stop_token_ids
        text = "" if ended else self._shown(token)
        if ended or self._stop.found:
            return self._finish(text, "stop", choice)
        if len(self.tokens) >= self._sampling.max_new_tokens:
            return self._finish(text, "length", choice)
        self._text += text
        return StreamEvent(self.row, text, (token,), choices=tuple(self._choices[-1:]))

    def _shown(self, token: int) -> str:
        """Return the text that may be shown now; stop strings do not count within `min_tokens`."""
        text = "" if self._decoder is None else self._decoder.push(token)
        if len(self.tokens) < self._sampling.min_tokens:
            return text
        text = "" if self._decoder is None else self._stop.push(text)
        if self._model.tokenizer is not None and token in self._model.tokenizer.special_ids:
            text += self._stop.push_special(token)
        return text

    def _held_back_text(self) -> str:
        """Return the text that was held back because it might have become a character or a stop string."""
        if self._decoder is None or self._stop.found:
            return ""
        return self._stop.push(self._decoder.finish()) + self._stop.flush()

    def _finish(self, text: str, reason: str, last: TokenChoice | None) -> StreamEvent:
        self.finished = True
        text += self._held_back_text()
        if self._stop.found:
            reason = "stop"
        self._text += text
        result = GenerationResult(
            text=self._text,
            token_ids=tuple(self.tokens),
            finish_reason=reason,
            logprobs=self._logprobs(),
            top_logprobs=tuple(choice.top for choice in self._choices) if self._sampling.top_logprobs else None,
            statistics=_statistics(
                self.request,
                self._model.kv_bytes_per_token,
                self._prefilled,
                self._model.cache_bytes(self.kept_lengths),
                self._model.cache_bytes(self._capacity),
                len(self.tokens),
                self._ttft_s,
                self.decode_s,
            ),
        )
        if last is None:
            return StreamEvent(self.row, text, (), result)
        choices = (last,) if self._sampling.logprobs else ()
        return StreamEvent(self.row, text, (last.token,), result, choices)

    def _logprobs(self) -> tuple[float, ...] | None:
        if not self._sampling.logprobs:
            return None
        return tuple(choice.logprob for choice in self._choices if choice.logprob is not None)


def cancelled_in_queue(request: Request, sampling: SamplingParams, kv_bytes_per_token: int) -> StreamEvent:
    """Return the only event of an answer that was cancelled before its prompt was prefilled: it never had a cache."""
    statistics = _statistics(request, kv_bytes_per_token, PrefillResult(None), request.kept_tokens * kv_bytes_per_token)
    logprobs: tuple[float, ...] | None = () if sampling.logprobs else None
    return StreamEvent(0, "", (), GenerationResult("", (), "cancelled", logprobs, statistics))


def decode_step(decoder: Decoder, answers: Sequence[Answer]) -> np.ndarray:
    """Append the last token of every answer to its row of the cache and return the logits [len(answers),vocab].

    Each answer counts the time of the whole step, because it waited as long.
    """
    started = time.perf_counter()
    with profiling.range_of("decode", [answer.request for answer in answers]):
        logits = decoder.step(
            [answer.row for answer in answers],
            [answer.tokens[-1] for answer in answers],
            [answer.next_position for answer in answers],
            _step_slots(answers),
        )
    seconds = time.perf_counter() - started
    for answer in answers:
        answer.decode_s += seconds
    return logits


def _step_slots(answers: Sequence[Answer]) -> np.ndarray:
    """Return the slots that the next step writes, [length_classes,len(answers)]; [len(answers)] for one class."""
    slots = np.array([answer.next_slots for answer in answers], np.int32).T
    return slots[0] if len(slots) == 1 else slots


def _statistics(
    request: Request,
    kv_bytes_per_token: int,
    prefilled: PrefillResult,
    cache_bytes: int,
    allocated: int = 0,
    new_tokens: int = 0,
    ttft_s: float = 0.0,
    decode_s: float = 0.0,
) -> RequestStatistics:
    return RequestStatistics(
        prompt_tokens=request.prompt_tokens,
        context_tokens=request.context_tokens,
        kept_tokens=request.kept_tokens,
        new_tokens=new_tokens,
        ttft_s=ttft_s,
        tpot_s=decode_s / (new_tokens - 1) if new_tokens > 1 else None,
        prefill_s=prefilled.prefill_s,
        compress_s=prefilled.compress_s,
        cache_bytes=cache_bytes,
        full_cache_bytes=request.prompt_tokens * kv_bytes_per_token,
        allocated_cache_bytes=allocated,
        peak_cache_bytes=allocated + prefilled.scratch_cache_bytes,
    )
