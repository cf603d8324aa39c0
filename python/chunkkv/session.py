"""Drives an engine: prefill and compress once, then decode; a logical position is never a cache slot."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from os import PathLike
from typing import Literal, overload

import numpy as np

from chunkkv import profiling, reference
from chunkkv.answer import Answer, ModelOutput, decode_step
from chunkkv.cache_layout import Slots
from chunkkv.engine.directory import EngineFiles
from chunkkv.errors import EngineMismatchError, RequestError
from chunkkv.executors.interface import CancelSignal, Choice, Executor, KVCache, PrefillProgress, no_progress
from chunkkv.executors.load import load_executor
from chunkkv.requests import Limits, Prompt, Request, as_batch, make_requests
from chunkkv.results import GenerationResult, GroupChoice, Inspection, StreamEvent
from chunkkv.sampling import SamplingParams, check_finite
from chunkkv.settings import ChunkKVSettings
from chunkkv.text.tokenizer import Tokenizer

MAX_THREADS = 1024


def usable_cpus() -> int:
    """Return how many CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ChunkKVSession:
    """An engine directory, loaded and ready to generate; `from_dir` makes one.

    Calls may come from several threads at once: each has its own caches, the graphs are shared.

    Parameters
    ----------
    executor : Executor
        Runs the engine's graphs. Also used by chunkkv.batching and the evaluation.
    settings : ChunkKVSettings or None
        What the engine was built with; None for an engine without ChunkKV.
    limits : Limits
        The sizes that the engine was built for.
    tokenizer : Tokenizer or None, default None
        Turns text into tokens and back; without one, prompts are token ids and texts stay empty.
    eos_token_ids : sequence of int, default ()
        Tokens that end an answer.
    """

    def __init__(
        self,
        executor: Executor[KVCache],
        settings: ChunkKVSettings | None,
        limits: Limits,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self.executor = executor
        self.settings = settings
        self.limits = limits
        self.tokenizer = tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)

    @classmethod
    def from_dir(
        cls,
        engine_dir: str | PathLike[str],
        threads: int | None = None,
        max_tokens_in_paged_kv_cache: int | None = None,
    ) -> ChunkKVSession:
        """Load an engine directory after checking every file in it; the directory says which engine runs it.

        Raises EngineError for a missing, changed or foreign file, EngineMismatchError for an engine that cannot be
        driven here, BackendUnavailableError where its backend is missing.

        Parameters
        ----------
        engine_dir : path
            What chunkkv-build wrote.
        threads : int or None, default None
            Threads of an engine that runs on the CPU, 1 to 1024; never more than this process has CPUs. None leaves
            the number to ONNX Runtime.
        max_tokens_in_paged_kv_cache : int or None, default None
            Tokens that the KV cache of a TensorRT-LLM engine holds. None takes what the GPU has free.
        """
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int)):
            raise RequestError(f"threads is {threads!r}; give a whole number, or leave it out")
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise RequestError(f"threads is {threads}; allowed is 1 to {MAX_THREADS}; without it there is one per core")
        # More threads than CPUs only wait for each other, for minutes where there are hundreds.
        threads = None if threads is None else min(threads, usable_cpus())
        with profiling.range("load"):
            files = EngineFiles.load(engine_dir)
            executor = load_executor(files, threads, max_tokens_in_paged_kv_cache)
            tokenizer = Tokenizer.from_dir(files.path) if (files.path / "tokenizer.json").is_file() else None
        model, build = files.model, files.build
        sizes = (build["max_batch_size"], build["max_input_len"], build["max_seq_len"], model["vocab_size"])
        limits = Limits(*sizes, budget_is_fixed=files.traits.budget_is_fixed)
        return cls(executor, files.settings, limits, tokenizer, model["eos_token_ids"])

    # A str is also a Sequence[str], so the first two overlap; mypy takes the first that matches, as generate does.
    @overload
    def generate(  # type: ignore[overload-overlap]  # see above
        self,
        prompts: Prompt,
        sampling: SamplingParams | None = None,
        *,
        keep_ratio: float | Sequence[float | None] | None = None,
        budget_tokens: int | Sequence[int | None] | None = None,
        add_special_tokens: bool = True,
        stream: Literal[False] = False,
        cancel: threading.Event | None = None,
        on_prefill: PrefillProgress | None = None,
    ) -> GenerationResult: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | None = None,
        *,
        keep_ratio: float | Sequence[float | None] | None = None,
        budget_tokens: int | Sequence[int | None] | None = None,
        add_special_tokens: bool = True,
        stream: Literal[False] = False,
        cancel: threading.Event | None = None,
        on_prefill: PrefillProgress | None = None,
    ) -> list[GenerationResult]: ...

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | None = None,
        *,
        keep_ratio: float | Sequence[float | None] | None = None,
        budget_tokens: int | Sequence[int | None] | None = None,
        add_special_tokens: bool = True,
        stream: Literal[True],
        cancel: threading.Event | None = None,
        on_prefill: PrefillProgress | None = None,
    ) -> Iterator[StreamEvent]: ...

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | None = None,
        *,
        keep_ratio: float | Sequence[float | None] | None = None,
        budget_tokens: int | Sequence[int | None] | None = None,
        add_special_tokens: bool = True,
        stream: bool,
        cancel: threading.Event | None = None,
        on_prefill: PrefillProgress | None = None,
    ) -> GenerationResult | list[GenerationResult] | Iterator[StreamEvent]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | None = None,
        *,
        keep_ratio: float | Sequence[float | None] | None = None,
        budget_tokens: int | Sequence[int | None] | None = None,
        add_special_tokens: bool = True,
        stream: bool = False,
        cancel: threading.Event | None = None,
        on_prefill: PrefillProgress | None = None,
    ) -> GenerationResult | list[GenerationResult] | Iterator[StreamEvent]:
        """Answer one prompt or a list of them.

        Returns one GenerationResult for one prompt, a list for a list, or with stream=True an iterator of StreamEvent.
        Raises RequestError before any work for a request that the engine cannot serve, EngineRunError at the first
        token for which the model's logits are infinite or NaN.

        Parameters
        ----------
        prompts : str, sequence of int, sequence of mappings, or a sequence of these
            Text, token ids, or the messages of a conversation, mappings with "role" and "content", which are put into
            the model's chat template.
        sampling : SamplingParams or None, default None
            How tokens are chosen and what ends an answer; None takes SamplingParams().
        keep_ratio : float, or one per prompt, default None
            Share of the prompt's tokens that stay in the cache, in (0, 1]. None takes the engine's own.
        budget_tokens : int, or one per prompt, default None
            Tokens of the prompt that stay, instead of a ratio.
        add_special_tokens : bool, default True
            Whether text gets the begin token that the model was trained with. A text that has it already, as those of
            chat templates do, gets no second one.
        stream : bool, default False
            Return text as it comes.
        cancel : threading.Event or None, default None
            Once set, every answer ends within one token, with finish_reason "cancelled".
        on_prefill : callable or None, default None
            Called as on_prefill(done, total) with the prompt tokens that are prefilled and those of the whole call,
            between the blocks of a prompt and after each prompt.
        """
        sampling = SamplingParams() if sampling is None else sampling
        if not isinstance(sampling, SamplingParams):
            raise RequestError(f"sampling is {type(sampling).__name__}; give SamplingParams")
        if cancel is not None and not isinstance(cancel, threading.Event):
            raise RequestError(f"cancel is {type(cancel).__name__}; give a threading.Event")
        batch, is_single = as_batch(prompts)
        requests = self.requests(batch, sampling, keep_ratio, budget_tokens, add_special_tokens)
        events = _within_spans(requests, self._events(requests, sampling, cancel or threading.Event(), on_prefill))
        if stream:
            return events
        results = {event.row: event.finished for event in events if event.finished is not None}
        return results[0] if is_single else [results[row] for row in range(len(requests))]

    def requests(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        keep_ratio: float | Sequence[float | None] | None = None,
        budget_tokens: int | Sequence[int | None] | None = None,
        add_special_tokens: bool = True,
    ) -> list[Request]:
        """Return the checked requests of `prompts`; raises as generate does, before any work."""
        if sampling.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer; this engine was built without one")
        return make_requests(
            prompts,
            self.tokenizer,
            self.limits,
            self.settings,
            keep_ratio,
            budget_tokens,
            sampling.max_new_tokens,
            add_special_tokens,
        )

    def inspect(
        self,
        prompt: Prompt,
        keep_ratio: float | None = None,
        budget_tokens: int | None = None,
        on_prefill: PrefillProgress | None = None,
    ) -> Inspection:
        """Prefill one prompt and return what every layer-reuse group would keep, and why.

        `on_prefill` is called as in generate.

        Raises EngineMismatchError for an engine without ChunkKV, EngineRunError where the model's numbers overflow.
        """
        if self.settings is None:
            raise EngineMismatchError(
                "this engine was built without ChunkKV, so there is no choice to show: build with --chunkkv"
            )
        request = make_requests([prompt], self.tokenizer, self.limits, self.settings, keep_ratio, budget_tokens, 0)[0]
        if not self.executor.capabilities.reports_choice and request.kept_tokens < len(request.ids):
            raise EngineMismatchError(
                "this engine does not tell which tokens it keeps: inspect one built from the same checkpoint with "
                "--backend onnxruntime"
            )
        cache = self.executor.new_cache(1, self.executor.capacity_for(request.class_lengths))
        progress = _CallProgress([request], on_prefill or no_progress)
        prefilled = self.executor.prefiller().run([request], cache, threading.Event(), progress)[0]
        progress.add([len(request.ids)])
        assert prefilled.logits is not None  # nothing cancels it
        check_finite(prefilled.logits)
        texts = [self.tokenizer.token_text(int(i)) if self.tokenizer else str(i) for i in request.ids]
        return Inspection(
            tokens=tuple(texts),
            token_ids=tuple(int(i) for i in request.ids),
            kept_tokens=request.kept_tokens,
            settings=self.settings,
            groups=tuple(self._group_choice(group, request, prefilled.choice) for group in self.settings.layer_groups),
        )

    def _group_choice(self, group: tuple[int, ...], request: Request, choice: Choice | None) -> GroupChoice:
        assert self.settings is not None
        leader, length = self.settings.leader_of(group), len(request.ids)
        if choice is None:  # the whole prompt is kept, so nothing was scored
            return GroupChoice(
                group, leader, np.arange(length, dtype=np.int32), np.zeros(length, np.float32), np.zeros(0, np.int64)
            )
        flags = None
        if self.settings.boundaries == "delimiter" and self.tokenizer is not None:
            flags = self.tokenizer.delimiter_token_table(vocab_size=self.limits.vocab_size)[request.ids]
        starts = reference.chunk_starts(length, self.settings, flags)
        return GroupChoice(group, leader, choice.kept_indices[leader], choice.token_scores[leader], starts)

    def start_answer(self, row: int, request: Request, sampling: SamplingParams, capacity: Slots) -> Answer:
        """Return the answer to `request` before its first token; it decodes in `row` of a cache of `capacity` slots."""
        model = ModelOutput(
            self.limits.vocab_size,
            self.eos_token_ids,
            self.tokenizer,
            self.executor.kv_bytes_per_token,
            self.executor.cache_bytes,
        )
        return Answer(row, request, sampling, capacity, model)

    def _events(
        self,
        requests: list[Request],
        sampling: SamplingParams,
        cancel: CancelSignal,
        on_prefill: PrefillProgress | None,
    ) -> Iterator[StreamEvent]:
        began = time.perf_counter()
        progress = _CallProgress(requests, on_prefill or no_progress)
        rows_slots = [request.slots(sampling.max_new_tokens) for request in requests]
        needed = tuple(map(max, zip(*rows_slots, strict=True)))
        cache = self.executor.new_cache(len(requests), self.executor.capacity_for(needed))
        answers: list[Answer] = []
        prefiller = self.executor.prefiller()
        for first in range(0, len(requests), prefiller.max_rows):
            group = requests[first : first + prefiller.max_rows]
            prefills = prefiller.run(group, cache.rows(first, len(group)), cancel, progress)
            progress.add(len(request.ids) for request in group)
            for row, (request, prefilled) in enumerate(zip(group, prefills, strict=True), start=first):
                answers.append(self.start_answer(row, request, sampling, cache.capacity))
                yield answers[-1].begin(prefilled, began)
        del prefiller  # frees the full cache of a prompt before decode
        yield from self._decode(answers, cache, cancel)

    def _decode(self, answers: list[Answer], cache: KVCache, cancel: CancelSignal) -> Iterator[StreamEvent]:
        """Append a token to every open answer until all are finished."""
        decoder = None  # made when the first step comes: answers of one token need none
        while open_answers := [answer for answer in answers if not answer.finished]:
            if cancel.is_set():
                yield from (answer.cancelled() for answer in open_answers)
                return
            decoder = decoder or self.executor.decoder(cache)
            for answer, logits in zip(open_answers, decode_step(decoder, open_answers), strict=True):
                yield answer.accept(logits)


class _CallProgress:
    """Turns the progress of one prompt into that of all prompts of a call."""

    def __init__(self, requests: Sequence[Request], tell: PrefillProgress) -> None:
        self._tell, self._done = tell, 0
        self._total = sum(len(request.ids) for request in requests)
        self._tell(0, self._total)

    def __call__(self, done: int, total: int) -> None:
        """Take the progress of the prompt that is in work; its end is told by `add`."""
        if done < total:
            self._tell(self._done + done, self._total)

    def add(self, lengths: Iterable[int]) -> None:
        """Count prompts as done."""
        self._done += sum(lengths)
        self._tell(self._done, self._total)


def _within_spans(requests: list[Request], events: Iterator[StreamEvent]) -> Iterator[StreamEvent]:
    with ExitStack() as spans:
        for request in requests:
            spans.enter_context(profiling.range_of("request", (request,), nested=False))
        yield from events
