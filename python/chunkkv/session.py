"""Drives an engine: prefill and compress once, then decode; a logical position is never a cache slot."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from chunkkv import profiling, reference
from chunkkv.engine.directory import EngineFiles
from chunkkv.errors import EngineMismatchError, RequestError
from chunkkv.executors.interface import Choice, Decoder, Executor, KVCache, Prefilled
from chunkkv.executors.load import load_executor
from chunkkv.requests import Limits, Prompt, Request, is_single, make_requests
from chunkkv.results import GenerationResult, GroupChoice, Inspection, RequestStatistics, StreamEvent
from chunkkv.sampling import Sampler, SamplingParams, StopText
from chunkkv.settings import ChunkKVSettings
from chunkkv.text.tokenizer import StreamDecoder, Tokenizer

MAX_THREADS = 1024


class ChunkKVSession:
    """An engine directory, loaded and ready to generate.

    Calls may come from several threads at once: each has its own caches, the graphs are shared.
    """

    def __init__(
        self,
        executor: Executor,
        settings: ChunkKVSettings | None,
        limits: Limits,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self._executor = executor
        self.settings = settings
        self.limits = limits
        self.tokenizer = tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)

    @property
    def executor(self) -> Executor:
        """The engine's graphs, for who schedules requests on them (chunkkv.batching.batcher)."""
        return self._executor

    @classmethod
    def from_dir(
        cls,
        engine_dir: str | PathLike[str],
        threads: int | None = None,
        max_tokens_in_paged_kv_cache: int | None = None,
    ) -> ChunkKVSession:
        """Load an engine directory after checking every file in it; the directory says which engine runs it.

        `threads` None leaves the choice to the engine. `max_tokens_in_paged_kv_cache` bounds the KV cache of a
        TensorRT-LLM engine, None takes what the GPU has free. Raises EngineError for a missing, changed or foreign
        file, EngineMismatchError for an engine that cannot be driven here, BackendUnavailableError where its backend
        is missing.
        """
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int)):
            raise RequestError(f"threads is {threads!r}; give a whole number, or none")
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise RequestError(f"threads is {threads}; allowed is 1 to {MAX_THREADS}, or none")
        with profiling.range("load"):
            files = EngineFiles.load(Path(engine_dir))
            executor = load_executor(files, threads, max_tokens_in_paged_kv_cache)
            tokenizer = Tokenizer.from_dir(files.path) if (files.path / "tokenizer.json").is_file() else None
        model, build = files.model, files.build
        sizes = (build["max_batch_size"], build["max_input_len"], build["max_seq_len"], model["vocab_size"])
        limits = Limits(*sizes, budget_is_fixed=files.budget_is_fixed)
        return cls(executor, files.settings, limits, tokenizer, model["eos_token_ids"])

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | None = None,
        *,
        keep_ratio: float | Sequence[float | None] | None = None,
        budget_tokens: int | Sequence[int | None] | None = None,
        stream: bool = False,
        cancel: threading.Event | None = None,
    ) -> Any:
        """Answer one prompt (text or token ids) or a list of them.

        Returns one GenerationResult for one prompt, a list for a list, or with stream=True an iterator of StreamEvent.
        `keep_ratio` or `budget_tokens`, one for all or one per prompt, override the engine's own within its
        limit. Setting `cancel` ends every answer within one token. Raises RequestError before any work for a
        request that the engine cannot serve.
        """
        sampling = SamplingParams() if sampling is None else sampling
        if not isinstance(sampling, SamplingParams):
            raise RequestError(f"sampling is {type(sampling).__name__}; give SamplingParams")
        if cancel is not None and not isinstance(cancel, threading.Event):
            raise RequestError(f"cancel is {type(cancel).__name__}; give a threading.Event")
        single = is_single(prompts)
        requests = self.requests([prompts] if single else list(prompts), sampling, keep_ratio, budget_tokens)
        events = _within_spans(requests, self._events(requests, sampling, cancel or threading.Event()))
        if stream:
            return events
        results = {event.row: event.finished for event in events if event.finished is not None}
        return results[0] if single else [results[row] for row in range(len(requests))]

    def requests(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        keep_ratio: float | Sequence[float | None] | None = None,
        budget_tokens: int | Sequence[int | None] | None = None,
    ) -> list[Request]:
        """Return the checked requests of `prompts`; raises as generate does, before any work."""
        if sampling.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer; this engine was built without one")
        limits, new = self.limits, sampling.max_new_tokens
        return make_requests(prompts, self.tokenizer, limits, self.settings, keep_ratio, budget_tokens, new)

    def inspect(self, prompt: Prompt, keep_ratio: float | None = None, budget_tokens: int | None = None) -> Inspection:
        """Prefill one prompt and return what every layer-reuse group would keep, and why.

        Raises EngineMismatchError for an engine without ChunkKV.
        """
        if self.settings is None:
            raise EngineMismatchError(
                "this engine was built without ChunkKV, so there is no choice to show: build with --chunkkv"
            )
        request = make_requests([prompt], self.tokenizer, self.limits, self.settings, keep_ratio, budget_tokens, 0)[0]
        cache = self._executor.new_cache(1, self._executor.capacity_for(request.kept_tokens))
        choice = self._executor.prefiller().run([request], cache, threading.Event())[0].choice
        if choice is None and request.kept_tokens < len(request.ids):
            raise EngineMismatchError(
                "this engine does not tell which tokens it keeps: inspect one built from the same checkpoint with "
                "--backend onnxruntime"
            )
        texts = [self.tokenizer.token_text(int(i)) if self.tokenizer else str(i) for i in request.ids]
        return Inspection(
            tokens=tuple(texts),
            token_ids=tuple(int(i) for i in request.ids),
            kept_tokens=request.kept_tokens,
            settings=self.settings,
            groups=tuple(self._group_choice(group, request, choice) for group in self.settings.layer_groups),
        )

    def _group_choice(self, group: tuple[int, ...], request: Request, choice: Choice | None) -> GroupChoice:
        assert self.settings is not None
        leader, length = self.settings.leader_of(group), len(request.ids)
        if choice is None:  # the whole prompt is kept, so nothing was scored
            return GroupChoice(group, leader, np.arange(length), np.zeros(length, np.float32), np.zeros(0, np.int64))
        flags = None
        if self.settings.boundaries == "delimiter" and self.tokenizer is not None:
            flags = self.tokenizer.delimiter_token_table(vocab_size=self.limits.vocab_size)[request.ids]
        starts = reference.chunk_starts(length, self.settings, flags)
        return GroupChoice(group, leader, choice.kept_indices[leader], choice.token_scores[leader], starts)

    def _events(
        self, requests: list[Request], sampling: SamplingParams, cancel: threading.Event
    ) -> Iterator[StreamEvent]:
        began = time.perf_counter()
        rows = [Answer(number, request, sampling, self) for number, request in enumerate(requests)]
        cache = self._executor.new_cache(len(rows), max(row.capacity for row in rows))
        for row in rows:
            row.capacity = cache.capacity
        prefiller = self._executor.prefiller()
        for first in range(0, len(rows), prefiller.max_rows):
            group = rows[first : first + prefiller.max_rows]
            made = prefiller.run([row.request for row in group], cache.rows(first, len(group)), cancel)
            for row, prefilled in zip(group, made, strict=True):
                yield row.begin(prefilled, began)
        del prefiller  # gives what it held back before decode
        yield from self._decode(rows, cache, cancel)

    def _decode(self, rows: list[Answer], cache: KVCache, cancel: threading.Event) -> Iterator[StreamEvent]:
        """Append a token to every open row until all are finished; finished rows ride along without effect."""
        decoder = None
        while open_rows := [row for row in rows if not row.finished]:
            if cancel.is_set():
                yield from (row.cancelled() for row in open_rows)
                return
            decoder = decoder or self._executor.decoder(cache)
            started = time.perf_counter()
            for row in open_rows:
                row.feed(decoder)
            with profiling.range_of("decode", [row.request for row in open_rows]):
                logits = decoder.run()
            seconds = time.perf_counter() - started
            for row in open_rows:
                row.decode_s += seconds
                yield row.accept(logits[row.number])


def _within_spans(requests: list[Request], events: Iterator[StreamEvent]) -> Iterator[StreamEvent]:
    with ExitStack() as spans:
        for request in requests:
            spans.enter_context(profiling.range_of("request", (request,), nested=False))
        yield from events


class Answer:
    """One prompt's answer as it grows; `number` is its row of the cache that it decodes in."""

    def __init__(self, number: int, request: Request, sampling: SamplingParams, session: ChunkKVSession) -> None:
        self.number, self.request, self._sampling, self._session = number, request, sampling, session
        self._sampler = Sampler(sampling, request.ids, session.limits.vocab_size)
        self._decoder = StreamDecoder(session.tokenizer) if session.tokenizer else None
        self._stop = StopText(sampling.stop)
        self.tokens: list[int] = []
        self._logprobs: list[float] = []
        self._text = ""
        self.finished = False
        self.capacity = session._executor.capacity_for(request.kept_tokens + sampling.max_new_tokens)
        self._prefilled = Prefilled(None)
        self.decode_s = self._ttft_s = 0.0

    def begin(self, prefilled: Prefilled, began: float) -> StreamEvent:
        """Choose the first token after prefill; `began` is when the call came."""
        self._prefilled = prefilled
        if prefilled.logits is None:
            return self.cancelled()
        token, logprob = self._choose(prefilled.logits)
        self._ttft_s = time.perf_counter() - began
        return self._append(token, logprob)

    def feed(self, decoder: Decoder) -> None:
        """Put the last token, its logical position and its cache slot where the next decode step reads them."""
        decoder.input_ids[self.number] = self.tokens[-1]
        decoder.position_ids[self.number] = len(self.request.ids) + len(self.tokens) - 1
        decoder.cache_lengths[self.number] = self.request.kept_tokens + len(self.tokens) - 1

    def accept(self, logits: np.ndarray) -> StreamEvent:
        """Choose the next token from logits [vocab]."""
        return self._append(*self._choose(logits))

    def _choose(self, logits: np.ndarray) -> tuple[int, float | None]:
        with profiling.range_of("sample", (self.request,)):
            return self._sampler.choose(logits)

    def _append(self, token: int, logprob: float | None) -> StreamEvent:
        self.tokens.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        ended = token in self._session.eos_token_ids and not self._sampling.ignore_eos
        text = "" if ended or self._decoder is None else self._stop.push(self._decoder.push(token))
        if ended or self._stop.found:
            return self._finish(text, "stop", token)
        if len(self.tokens) >= self._sampling.max_new_tokens:
            return self._finish(text, "length", token)
        self._text += text
        return StreamEvent(self.number, text, (token,))

    def cancelled(self) -> StreamEvent:
        """End the answer with what there is."""
        return self._finish("", "cancelled", None)

    def _finish(self, text: str, reason: str, token: int | None) -> StreamEvent:
        self.finished = True
        if not self._stop.found and self._decoder is not None:
            text += self._stop.push(self._decoder.finish())
            text += self._stop.flush()
            if self._stop.found:
                reason = "stop"
        self._text += text
        result = GenerationResult(
            text=self._text,
            token_ids=tuple(self.tokens),
            finish_reason=reason,
            logprobs=tuple(self._logprobs) if self._sampling.logprobs else None,
            statistics=self._statistics(),
        )
        return StreamEvent(self.number, text, () if token is None else (token,), result)

    def _statistics(self) -> RequestStatistics:
        per_token = self._session._executor.kv_bytes_per_token
        kept, new = self.request.kept_tokens, len(self.tokens)
        return RequestStatistics(
            prompt_tokens=len(self.request.ids),
            kept_tokens=kept,
            new_tokens=new,
            ttft_s=self._ttft_s,
            tpot_s=self.decode_s / (new - 1) if new > 1 else None,
            prefill_s=self._prefilled.prefill_s,
            compress_s=self._prefilled.compress_s,
            cache_bytes=kept * per_token,
            full_cache_bytes=len(self.request.ids) * per_token,
            allocated_cache_bytes=self.capacity * per_token,
            peak_cache_bytes=self.capacity * per_token + self._prefilled.scratch_cache_bytes,
        )
