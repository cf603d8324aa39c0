"""A text, the questions about it, and what their answers gave and cost."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from chunkkv.results import GenerationResult

FULL, OURS, OURS_RECIPE, OURS_WINDOW = "full cache", "ChunkKV", "ChunkKV recipe", "ChunkKV window"
SNAPKV, STREAMING = "SnapKV-style", "StreamingLLM"
BETWEEN = "\n\n"  # text and question, as a context adds a question to a message


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
        return f"{self.text}{BETWEEN}{question.text}"


@dataclass
class Outcome:
    """What one way to hold the cache gave.

    Parameters
    ----------
    method : str
        FULL, OURS, OURS_RECIPE, OURS_WINDOW, SNAPKV or STREAMING.
    keep_ratio : float
        The share of the prompt that was to stay.
    prompt_tokens, kept_tokens, cache_bytes : list of int
        Tokens of the prompt, tokens that stayed, and bytes of KV cache they take, for each question.
    answers : list of str
        The answer to each question.
    is_right : list of bool
        Whether it is right.
    document_s : float or None
        Seconds in which the text became a context, second reading and compression included; None where the question
        stood in the prompt.
    first_token_s, per_token_s : list of float
        Seconds from the question, or else from the whole prompt, to the first token, and per further token; empty where
        the engine did not choose and decode by itself.
    """

    method: str
    keep_ratio: float
    prompt_tokens: list[int] = field(default_factory=list)
    kept_tokens: list[int] = field(default_factory=list)
    cache_bytes: list[int] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    is_right: list[bool] = field(default_factory=list)
    document_s: float | None = None
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
