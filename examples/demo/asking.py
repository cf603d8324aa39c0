"""How the two halves are asked: with the question in the prompt, and after the text was compressed without one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np

from chunkkv import ChunkKVSession, Context, SamplingParams
from chunkkv.evaluation.policies import parse_policies
from chunkkv.evaluation.runner import PromptRunner
from chunkkv.evaluation.texts import questions as judged
from chunkkv.executors.host_cache import HostKVCache
from chunkkv.requests import Prompt
from chunkkv.results import GenerationResult, Inspection
from chunkkv.settings import ChunkKVSettings, keep_ratio_to_per_10k
from chunkkv.text.tokenizer import Tokenizer
from examples.demo.reading import (
    BETWEEN,
    FULL,
    OURS,
    OURS_WINDOW,
    SNAPKV,
    STREAMING,
    Half,
    Outcome,
    Question,
    Reading,
)

KEEP_RATIOS = (0.2, 0.1)  # with the question in the prompt
KEEP_AFTERWARDS = 0.2
SAMPLING = SamplingParams(max_new_tokens=32, temperature=0.0)
POLICIES = {OURS: "engine", SNAPKV: "snapkv", STREAMING: "streaming_llm"}  # their names in chunkkv eval

Stage = Callable[[str], AbstractContextManager[None]]  # announces a stage and says how long it took


@dataclass(frozen=True)
class Held:
    """A text as a context, and the seconds that this took."""

    context: Context
    seconds: float


def hold(session: ChunkKVSession, text: str, keep_ratio: float, scorer: str | None = None) -> Held:
    """Prefill a text and keep a share of it for questions that come later."""
    started = time.perf_counter()
    context = session.compress(message(session, text), keep_ratio=keep_ratio, scorer=scorer)
    return Held(context, time.perf_counter() - started)


def ask(session: ChunkKVSession, held: Held, reading: Reading, method: str, keep_ratio: float, stage: Stage) -> Outcome:
    """Ask all questions of one context, one after the other."""
    outcome = Outcome(method, keep_ratio, document_s=held.seconds)
    with stage(f"Asking {len(reading.questions)} questions afterwards: {outcome.name}"):
        for question in reading.questions:
            text = question.text if has_template(session) else BETWEEN + question.text
            outcome.add_result(question, session.generate(text, SAMPLING, context=held.context))
    return outcome


def ask_in_prompt(session: ChunkKVSession, reading: Reading, full: Outcome, stage: Stage) -> Half:
    """Ask every question behind the text: from the full cache, and from what ChunkKV and others keep of it.

    `full` are the answers of a context that holds the whole text: the same tokens as text and question in one prompt.
    Each prompt is prefilled once, and every method chooses from that cache. For the first question the engine also does
    everything by itself, which gives ChunkKV's times.
    """
    once = full.document_s or 0.0
    whole = replace(full, document_s=None, first_token_s=[once + seconds for seconds in full.first_token_s])
    ours = [Outcome(OURS, keep) for keep in KEEP_RATIOS]
    peers = [Outcome(method, keep) for method in (SNAPKV, STREAMING) for keep in KEEP_RATIOS]
    for number, question in enumerate(reading.questions, 1):
        with stage(f"Question {number} of {len(reading.questions)} in the prompt: {question.text}"):
            prompt = reading.prompt(question)
            if number == 1:
                for outcome in ours:
                    outcome.add_result(question, answer(session, prompt, outcome.keep_ratio))
            _ask_chosen(session, prompt, question, peers if number == 1 else [*ours, *peers])
    note = (
        "The question stands behind the text, so it is there when the engine chooses what stays. Times of the full "
        "cache are means, those of ChunkKV are of question 1."
    )
    return Half("Asked in the prompt", note, reading.questions, [whole, *ours, *peers])


def ask_afterwards(
    session: ChunkKVSession,
    tuned: Mapping[str, ChunkKVSession],
    reading: Reading,
    whole: Held,
    full: Outcome,
    stage: Stage,
) -> Half:
    """Compress the text once without a question, then ask all questions of what stayed.

    `tuned` are engines for later questions, by the name they are shown with. `session` keeps equally much in every head
    and chooses by the text's last tokens. `whole` is the whole text as a context of `session`, and `full` what it
    answered.
    """
    keep = KEEP_AFTERWARDS
    with stage(f"Compressing the text once, without a question, to {keep:.0%}"):
        ours = [(engine, hold(engine, reading.text, keep), method) for method, engine in tuned.items()]
        by_window = hold(session, reading.text, keep, scorer="window")
        streaming = _streaming(session, whole, keep)
    rows = (*ours, (session, by_window, OURS_WINDOW), (session, streaming, STREAMING))
    outcomes = [full, *(ask(engine, held, reading, method, keep, stage) for engine, held, method in rows)]
    unevenly = " ".join(f"{_unevenly(method, engine.settings)}." for method, engine in tuned.items() if engine.settings)
    note = (
        f"The text was compressed once, before any question was known. {unevenly} "
        f"{OURS_WINDOW} keeps equally much everywhere and chooses by the text's last tokens."
    )
    return Half("Asked afterwards", note, reading.questions, outcomes)


def _unevenly(method: str, settings: ChunkKVSettings) -> str:
    """Say how an engine for later questions divides the cache."""
    if settings.budget_split != "classes":
        return f"{method} ranks the tokens of all KV heads together, by a second reading of the text"
    reading = sum(map(len, settings.reading_heads))
    others = "recent tokens" if settings.local_policy == "recent" else "what a second reading of the text chooses"
    return f"In {method}, {reading} KV heads that read far keep most, and the others {others}"


def _streaming(session: ChunkKVSession, whole: Held, keep_ratio: float) -> Held:
    """Return the first tokens of a context and its most recent ones, which costs no time."""
    settings, context = session.settings, whole.context
    assert settings is not None
    length, kept = len(context), settings.kept_tokens(len(context), keep_ratio_to_per_10k(keep_ratio))
    positions = np.r_[: settings.sinks, length - (kept - settings.sinks) : length]
    assert isinstance(context.cache, HostKVCache), "the demo's engines run on ONNX Runtime"
    cache = session.executor.blockwise_prefiller().new_cache(1, kept)
    for sources, targets in ((context.cache.keys, cache.keys), (context.cache.values, cache.values)):
        for source, target in zip(sources, targets, strict=True):
            target[:, :, :kept] = source[:, :, positions]
    return Held(replace(context, slots=(kept,), cache=cache, scorer=STREAMING), whole.seconds)


def answer(session: ChunkKVSession, prompt: str, keep_ratio: float) -> GenerationResult:
    """Return the session's greedy answer to a message of the user."""
    return session.generate(message(session, prompt), SAMPLING, keep_ratio=keep_ratio)


def inspect(session: ChunkKVSession, prompt: str, keep_ratio: float) -> Inspection:
    """Return what the engine keeps of a message of the user."""
    return session.inspect(message(session, prompt), keep_ratio)


def message(session: ChunkKVSession, text: str) -> Prompt:
    """Return a message of the user as the model expects it: in its chat template, where it has one."""
    return [{"role": "user", "content": text}] if has_template(session) else text


def has_template(session: ChunkKVSession) -> bool:
    """Return whether the model has a chat template."""
    return tokenizer_of(session).chat_template is not None


def tokenizer_of(session: ChunkKVSession) -> Tokenizer:
    """Return the engine's tokenizer."""
    if session.tokenizer is None:
        raise SystemExit("this checkpoint has no tokenizer, so it cannot be asked about a text")
    return session.tokenizer


def _ask_chosen(session: ChunkKVSession, prompt: str, question: Question, outcomes: Sequence[Outcome]) -> None:
    """Prefill once, let each policy choose from the full cache, and answer from what it chose."""
    settings = session.settings
    assert settings is not None
    (request,) = session.requests([message(session, prompt)], SAMPLING)
    runner = PromptRunner(session)
    prefilled = runner.prefill(request.ids, window=request.window)
    named = {policy.name: policy for policy in parse_policies(",".join(POLICIES.values()), settings)}
    kept = [settings.kept_tokens(len(prefilled), keep_ratio_to_per_10k(outcome.keep_ratio)) for outcome in outcomes]
    choices = [
        named[POLICIES[outcome.method]].keep(prefilled, count) for outcome, count in zip(outcomes, kept, strict=True)
    ]
    expected = judged.Question((), "-", (), SAMPLING.max_new_tokens, "contains")
    answers = runner.answer(prefilled, choices, [expected])
    for outcome, count, (tokens,) in zip(outcomes, kept, answers, strict=True):
        size = count * session.executor.kv_bytes_per_token
        outcome.add(question, tokenizer_of(session).decode(tokens), len(prefilled), count, size)


def ask_both_halves(
    session: ChunkKVSession, tuned: Mapping[str, ChunkKVSession], reading: Reading, stage: Stage
) -> list[Half]:
    """Ask in the prompt and afterwards; the full cache is the same in both, and is asked once."""
    with stage("Prefilling the text once, to keep all of it"):
        whole = hold(session, reading.text, 1.0)
    full = ask(session, whole, reading, FULL, 1.0, stage)
    return [
        ask_in_prompt(session, reading, full, stage),
        ask_afterwards(session, tuned, reading, whole, full, stage),
    ]
