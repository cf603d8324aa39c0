"""A text, questions about it, and the answers from the full KV cache and from parts of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from chunkkv import ChunkKVSession, SamplingParams
from chunkkv.evaluation.policies import parse_policies
from chunkkv.evaluation.runner import PromptRunner
from chunkkv.evaluation.texts import questions as judged
from chunkkv.results import GenerationResult, Inspection
from chunkkv.settings import keep_ratio_to_per_10k
from chunkkv.text.tokenizer import Tokenizer

KEEP_RATIOS = (0.2, 0.1)
NEW_TOKENS = 32
FULL, OURS = "full cache", "ChunkKV"
PEERS = {"snapkv": "SnapKV-style", "streaming_llm": "StreamingLLM"}  # policies of chunkkv eval, and their names here

Stage = Callable[[str], AbstractContextManager[None]]  # announces a stage and says how long it took


@dataclass(frozen=True)
class Question:
    """A question about a text.

    Parameters
    ----------
    text : str
        The question.
    accepted : tuple of str
        The answer is right where one of these stands in it as a word, in upper or lower case.
    """

    text: str
    accepted: tuple[str, ...]

    def is_right(self, answer: str) -> bool:
        """Return whether an answer counts as right."""
        return any(re.search(rf"(?<!\w){re.escape(words)}(?!\w)", answer, re.IGNORECASE) for words in self.accepted)


@dataclass(frozen=True)
class Reading:
    """A text and the questions about it; `about` says where the text is from."""

    text: str
    about: str
    questions: tuple[Question, ...]

    @classmethod
    def load(cls, path: Path) -> Reading:
        """Read a JSON file that names the text's file, sentences that are put into the text, and the questions."""
        values = json.loads(path.read_text(encoding="utf-8"))
        text = (path.parent / values["text"]).read_text(encoding="utf-8").strip()
        for place in values["inserted"]:
            if text.count(place["behind"]) != 1:
                raise ValueError(f"{path}: {place['behind']!r} does not stand in the text exactly once")
            text = text.replace(place["behind"], f"{place['behind']} {place['sentence']}")
        asked = tuple(Question(entry["question"], tuple(entry["accepted"])) for entry in values["questions"])
        return cls(text, values["about"], asked)

    def prompt(self, question: Question) -> str:
        """Return the user's message: the text, and behind it the question."""
        return f"{self.text}\n\n{question.text}"


@dataclass
class Outcome:
    """What one way to hold the cache gave.

    Parameters
    ----------
    method : str
        FULL, OURS or a name in PEERS.
    keep_ratio : float
        The share of the prompt that was to stay.
    prompt_tokens, kept_tokens, cache_bytes : list of int
        Tokens of the prompt, tokens that stayed, and bytes of KV cache they take, for each question.
    answers : list of str
        The answer to each question.
    is_right : list of bool
        Whether it is right.
    first_token_s, per_token_s : list of float
        Seconds to the first token, compression included, and per further token; empty for PEERS, which are chosen
        and decoded outside of the engine.
    """

    method: str
    keep_ratio: float
    prompt_tokens: list[int] = field(default_factory=list)
    kept_tokens: list[int] = field(default_factory=list)
    cache_bytes: list[int] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    is_right: list[bool] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    per_token_s: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The method and its share."""
        return self.method if self.method == FULL else f"{self.method}, {self.keep_ratio:.0%}"

    def add(self, question: Question, answer: str, prompt_tokens: int, kept_tokens: int, cache_bytes: int) -> None:
        """Note the answer to the next question."""
        self.answers.append("".join(c if c.isprintable() else "·" for c in " ".join(answer.split())))
        self.is_right.append(question.is_right(answer))
        self.prompt_tokens.append(prompt_tokens)
        self.kept_tokens.append(kept_tokens)
        self.cache_bytes.append(cache_bytes)

    def add_result(self, question: Question, result: GenerationResult) -> None:
        """Note a result of a session."""
        costs = result.statistics
        self.add(question, result.text, costs.prompt_tokens, costs.kept_tokens, costs.cache_bytes)
        self.first_token_s.append(costs.ttft_s)
        if costs.tpot_s is not None:
            self.per_token_s.append(costs.tpot_s)


@dataclass(frozen=True)
class Half:
    """One half of the demo: a heading, a sentence on how it was asked, the questions, and an outcome per method."""

    heading: str
    note: str
    questions: tuple[Question, ...]
    outcomes: list[Outcome]


def ask_in_prompt(full: ChunkKVSession, chunked: ChunkKVSession, reading: Reading, stage: Stage) -> Half:
    """Ask every question behind the text: from the full cache, and from what ChunkKV and others keep of it.

    `full` answers from an engine without ChunkKV, `chunked` from one with it. The others choose from the cache of
    `chunked`, with as many kept tokens.
    """
    outcomes = [Outcome(FULL, 1.0)]
    outcomes += [Outcome(method, keep) for method in (OURS, *PEERS.values()) for keep in KEEP_RATIOS]
    for number, question in enumerate(reading.questions, 1):
        with stage(f"Question {number} of {len(reading.questions)}: {question.text}"):
            prompt = reading.prompt(question)
            outcomes[0].add_result(question, answer(full, prompt))
            for outcome in outcomes[1 : 1 + len(KEEP_RATIOS)]:
                outcome.add_result(question, answer(chunked, prompt, outcome.keep_ratio))
            _ask_peers(chunked, prompt, question, outcomes[1 + len(KEEP_RATIOS) :])
    note = "The question stands behind the text, so it is there when the engine chooses what stays."
    return Half("Asked in the prompt", note, reading.questions, outcomes)


def answer(session: ChunkKVSession, prompt: str, keep_ratio: float | None = None) -> GenerationResult:
    """Return the session's greedy answer to a message of the user."""
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0)
    return session.generate(_request(session, prompt), sampling, keep_ratio=keep_ratio)


def inspect(session: ChunkKVSession, prompt: str, keep_ratio: float) -> Inspection:
    """Return what the engine keeps of a message of the user."""
    return session.inspect(_request(session, prompt), keep_ratio)


def _request(session: ChunkKVSession, prompt: str) -> str | list[dict[str, str]]:
    """Return the message as the model expects it: in its chat template, where it has one."""
    has_template = tokenizer_of(session).chat_template is not None
    return [{"role": "user", "content": prompt}] if has_template else prompt


def tokenizer_of(session: ChunkKVSession) -> Tokenizer:
    """Return the engine's tokenizer."""
    if session.tokenizer is None:
        raise SystemExit("this checkpoint has no tokenizer, so it cannot be asked about a text")
    return session.tokenizer


def token_ids(session: ChunkKVSession, prompt: str) -> np.ndarray:
    """Return the token ids [L] int64 of a message of the user, as the session makes them."""
    tokenizer = tokenizer_of(session)
    has_template = tokenizer.chat_template is not None
    messages = [{"role": "user", "content": prompt}]
    ids = tokenizer.encode_chat(messages) if has_template else tokenizer.encode_prompt(prompt)
    return np.array(ids, np.int64)


def _ask_peers(session: ChunkKVSession, prompt: str, question: Question, outcomes: Sequence[Outcome]) -> None:
    """Prefill once, let each policy choose from the full cache, and answer from what it chose."""
    assert session.settings is not None
    runner = PromptRunner(session)
    prefilled = runner.prefill(token_ids(session, prompt))
    named = {PEERS[policy.name]: policy for policy in parse_policies(",".join(PEERS), session.settings)}
    shares = [keep_ratio_to_per_10k(outcome.keep_ratio) for outcome in outcomes]
    kept = [session.settings.kept_tokens(len(prefilled), share) for share in shares]
    choices = [named[outcome.method].keep(prefilled, count) for outcome, count in zip(outcomes, kept, strict=True)]
    expected = judged.Question((), "-", (), NEW_TOKENS, "contains")
    answers = runner.answer(prefilled, choices, [expected])
    for outcome, count, (tokens,) in zip(outcomes, kept, answers, strict=True):
        size = count * session.executor.kv_bytes_per_token
        outcome.add(question, tokenizer_of(session).decode(tokens), len(prefilled), count, size)
