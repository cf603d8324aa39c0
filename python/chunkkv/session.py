"""Drives an engine: prefill and compress once, then decode; a logical position is never a cache slot."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from os import PathLike
from typing import Literal, overload

from chunkkv import profiling
from chunkkv.answer import Answer, ModelOutput
from chunkkv.cache_layout import Slots
from chunkkv.contexts import Context, continue_requests, make_context
from chunkkv.contexts.context import check_continues
from chunkkv.contexts.make import context_request
from chunkkv.contexts.scorers import with_scorer
from chunkkv.engine.directory import EngineFiles
from chunkkv.errors import RequestError
from chunkkv.executors.cpus import usable_cpus
from chunkkv.executors.interface import Executor, KVCache, PrefillProgress, no_progress
from chunkkv.executors.load import load_executor
from chunkkv.generation import ContextListener, Generation
from chunkkv.inspection import check_inspects, inspect_prompt
from chunkkv.requests import CallProgress, Limits, Prompt, Request, as_batch, make_requests
from chunkkv.results import GenerationResult, Inspection, StreamEvent
from chunkkv.sampling import SamplingParams, check_bias
from chunkkv.settings import ChunkKVSettings
from chunkkv.text.tokenizer import Tokenizer

MAX_THREADS = 1024


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
    engine_sha256 : str, default ""
        Digest of the engine's files, by which a saved context finds its engine.
    """

    def __init__(
        self,
        executor: Executor[KVCache],
        settings: ChunkKVSettings | None,
        limits: Limits,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: Sequence[int] = (),
        engine_sha256: str = "",
    ) -> None:
        self.executor = executor
        self.settings = settings
        self.limits = limits
        self.tokenizer = tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)
        self.engine_sha256 = engine_sha256

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
            # Before the graphs, which then take the memory that reading a large vocabulary leaves behind.
            tokenizer = Tokenizer.from_dir(files.path) if (files.path / "tokenizer.json").is_file() else None
            executor = load_executor(files, threads, max_tokens_in_paged_kv_cache)
        model, build = files.model, files.build
        sizes = (build["max_batch_size"], build["max_input_len"], build["max_seq_len"], model["vocab_size"])
        limits = Limits(*sizes, budget_is_fixed=files.traits.budget_is_fixed)
        return cls(executor, files.settings, limits, tokenizer, model["eos_token_ids"], files.sha256)

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
        context: Context | None = None,
        scorer: str | None = None,
        stream: Literal[False] = False,
        cancel: threading.Event | None = None,
        on_prefill: PrefillProgress | None = None,
        on_context: ContextListener | None = None,
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
        context: Context | None = None,
        scorer: str | None = None,
        stream: Literal[False] = False,
        cancel: threading.Event | None = None,
        on_prefill: PrefillProgress | None = None,
        on_context: ContextListener | None = None,
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
        context: Context | None = None,
        scorer: str | None = None,
        stream: Literal[True],
        cancel: threading.Event | None = None,
        on_prefill: PrefillProgress | None = None,
        on_context: ContextListener | None = None,
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
        context: Context | None = None,
        scorer: str | None = None,
        stream: bool,
        cancel: threading.Event | None = None,
        on_prefill: PrefillProgress | None = None,
        on_context: ContextListener | None = None,
    ) -> GenerationResult | list[GenerationResult] | Iterator[StreamEvent]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | None = None,
        *,
        keep_ratio: float | Sequence[float | None] | None = None,
        budget_tokens: int | Sequence[int | None] | None = None,
        add_special_tokens: bool = True,
        context: Context | None = None,
        scorer: str | None = None,
        stream: bool = False,
        cancel: threading.Event | None = None,
        on_prefill: PrefillProgress | None = None,
        on_context: ContextListener | None = None,
    ) -> GenerationResult | list[GenerationResult] | Iterator[StreamEvent]:
        """Return one GenerationResult for one prompt, a list for a list, an iterator of StreamEvent with stream=True.

        Raises RequestError before any work for a request that the engine cannot serve, EngineRunError at the first
        token for which the model's logits are infinite or NaN.

        Parameters
        ----------
        prompts : str, sequence of int, sequence of mappings, or a sequence of these
            Text, token ids, or the messages of a conversation, mappings with "role" and "content", which are put into
            the model's chat template. Of messages, the user's last question alone observes, within the engine's window.
        sampling : SamplingParams or None, default None
            How tokens are chosen and what ends an answer; None takes SamplingParams().
        keep_ratio : float, or one per prompt, default None
            Share of the prompt's tokens that stay in the cache, in (0, 1]. None takes the engine's own.
        budget_tokens : int, or one per prompt, default None
            Tokens of the prompt that stay, instead of a ratio.
        add_special_tokens : bool, default True
            Whether text gets the begin token that the model was trained with. A text that has it already, as those of
            chat templates do, gets no second one. Text behind a context gets none.
        context : Context or None, default None
            What stands before every prompt, from `compress`: only the prompts themselves are prefilled, and all of
            their tokens stay, so it goes without a budget. Text behind messages is a message of the user.
        scorer : {"window", "reread"} or None, default None
            Whether the prompt's last tokens choose what stays, or a second reading of it. None is what fits the engine.
        stream : bool, default False
            Return text as it comes.
        cancel : threading.Event or None, default None
            Once set, every answer ends within one token, with finish_reason "cancelled".
        on_prefill : callable or None, default None
            Called as on_prefill(done, total) with the prompt tokens that are prefilled and those of the whole call,
            between the blocks of a prompt and after each prompt.
        on_context : callable or None, default None
            Called as on_context(row, context) at the end of each answer with a Context that holds its prompt and the
            answer, without its last token, which no step has read.
        """
        sampling = SamplingParams() if sampling is None else sampling
        self._check_call(sampling, cancel, on_context)
        batch, is_single = as_batch(prompts)
        requests = self.requests(batch, sampling, keep_ratio, budget_tokens, add_special_tokens, context, scorer)
        generation = Generation(self, requests, sampling, cancel or threading.Event(), on_prefill, on_context)
        if stream:
            return generation.events()
        results = {event.row: event.finished for event in generation.events() if event.finished is not None}
        return results[0] if is_single else [results[row] for row in sorted(results)]

    def requests(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        keep_ratio: float | Sequence[float | None] | None = None,
        budget_tokens: int | Sequence[int | None] | None = None,
        add_special_tokens: bool = True,
        context: Context | None = None,
        scorer: str | None = None,
    ) -> list[Request]:
        """Return the checked requests of `prompts`; raises as generate does, before any work."""
        if sampling.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer; this engine was built without one")
        check_bias(sampling, self.limits.vocab_size)
        if context is not None:
            if keep_ratio is not None or budget_tokens is not None or scorer is not None:
                raise RequestError("a question behind a context is kept whole: give budget and scorer to compress()")
            return [*continue_requests(self, prompts, context, sampling.max_new_tokens)]
        requests = make_requests(
            prompts,
            self.tokenizer,
            self.limits,
            self.settings,
            keep_ratio,
            budget_tokens,
            sampling.max_new_tokens,
            add_special_tokens,
            self.executor.capabilities.window_per_request,
        )
        return [with_scorer(self, request, scorer)[0] for request in requests]

    def compress(
        self,
        prompt: Prompt,
        *,
        keep_ratio: float | None = None,
        budget_tokens: int | None = None,
        scorer: str | None = None,
        add_special_tokens: bool = True,
        on_prefill: PrefillProgress | None = None,
    ) -> Context:
        """Prefill and compress a prompt once, for any number of questions: `generate(question, context=...)`.

        Raises RequestError for a prompt, budget or scorer that the engine cannot serve, BackendUnavailableError for an
        engine that cannot continue a context.

        Parameters
        ----------
        prompt : str, sequence of int or sequence of mappings
            Text, token ids, or messages. Of messages, the end of the last one is left out, so that the text of the
            user may go on.
        keep_ratio, budget_tokens : optional
            As for generate.
        scorer : {"window", "reread"} or None, default None
            As for generate. None is "reread" where layers or heads keep unequal numbers of tokens, because then it
            serves later questions best and the engine can run it.
        add_special_tokens, on_prefill : optional
            As for generate.
        """
        return make_context(self, prompt, keep_ratio, budget_tokens, scorer, add_special_tokens, on_prefill)

    def inspect(
        self,
        prompt: Prompt,
        keep_ratio: float | None = None,
        budget_tokens: int | None = None,
        on_prefill: PrefillProgress | None = None,
        *,
        scorer: str | None = None,
        as_context: bool = False,
    ) -> Inspection:
        """Prefill one prompt and return what every layer-reuse group would keep, and why.

        Raises EngineMismatchError for an engine without ChunkKV, EngineRunError where the model's numbers overflow,
        and as generate does for the request.

        Parameters
        ----------
        prompt, keep_ratio, budget_tokens, on_prefill : optional
            As for generate.
        scorer : {"window", "reread"} or None, default None
            What chooses. None is what generate would take, or compress with `as_context`.
        as_context : bool, default False
            Show what `compress` keeps of the prompt, for questions that come later, instead of what generate keeps.
        """
        settings = check_inspects(self.settings)
        if as_context:
            request, used, _ = context_request(self, prompt, keep_ratio, budget_tokens, scorer)
        else:
            able = self.executor.capabilities.window_per_request
            budget = keep_ratio, budget_tokens
            (request,) = make_requests(
                [prompt], self.tokenizer, self.limits, settings, *budget, 0, window_per_request=able
            )
            request, used = with_scorer(self, request, scorer)
        progress = CallProgress([request], on_prefill or no_progress)
        known = settings, self.limits.vocab_size, self.tokenizer
        inspection = inspect_prompt(self.executor, *known, request, progress, used.name)
        progress.add([request.read_tokens])
        return inspection

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

    def _check_call(self, sampling: object, cancel: object, on_context: ContextListener | None) -> None:
        if not isinstance(sampling, SamplingParams):
            raise RequestError(f"sampling is {type(sampling).__name__}; give SamplingParams")
        if cancel is not None and not isinstance(cancel, threading.Event):
            raise RequestError(f"cancel is {type(cancel).__name__}; give a threading.Event")
        if on_context is not None:
            check_continues(self)
