"""Reads local files of JSON lines: examples for a suite (context and questions), and plain prompts to calibrate on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from chunkkv.engine.json_files import read_text
from chunkkv.errors import ConfigError
from chunkkv.evaluation.texts.prompt_writer import PromptFrame, PromptWriter
from chunkkv.evaluation.texts.questions import SCORINGS, Example, PromptAndQuestions, Question, number
from chunkkv.evaluation.texts.suites import Cell, Suite
from chunkkv.requests import Limits
from chunkkv.text.tokenizer import Tokenizer

FILE_SCORINGS = tuple(name for name in SCORINGS if name != "exact")
DEFAULT_NEW_TOKENS = 64


def file_suite(path: Path, tokenizer: Tokenizer, frame: PromptFrame, limits: Limits) -> Suite:
    """Return the examples of a file as a suite named after it; all are in one cell, in the order of the file.

    A line holds "context" (text, may be empty), "question" (text) and "answer" (text, not needed for scoring
    "refusal"), or "questions": a list of such objects without context. Optional are "scoring" (one of FILE_SCORINGS)
    and "max_new_tokens". Raises ConfigError, naming the line, for anything else and for what is longer than `limits`
    allow.
    """
    text = read_text(path, ConfigError)
    examples = []
    for place, values in _json_lines(path, text):
        example = _example(place, values, tokenizer, frame)
        _check_size(place, example, limits)
        examples.append(example)
    if not examples:
        raise ConfigError(f"{path} has no examples; give one JSON object per line")

    def make(writer: PromptWriter, cell: Cell) -> Example:
        return examples[cell["line"]]

    return Suite(
        path.stem,
        f"the examples of {path.name}",
        lambda *_: [{"line": n} for n in range(len(examples))],
        make,
        content=hashlib.sha256(text.encode()).hexdigest(),
    )


def file_prompts(path: Path, tokenizer: Tokenizer, limits: Limits, count: int) -> list[PromptAndQuestions]:
    """Return the first `count` prompts of a file; all have a question, or none.

    A line holds "prompt" (text) and optionally "answer" (text that a right answer contains). Raises ConfigError,
    naming the line, for anything else.
    """
    prompts: list[PromptAndQuestions] = []
    for place, values in _json_lines(path, read_text(path, ConfigError)):
        if len(prompts) == count:
            break
        prompts.append(_prompt(place, values, tokenizer, limits))
    if not prompts:
        raise ConfigError(f'{path} has no prompts; give one JSON object per line, such as {{"prompt": "…"}}')
    if len({bool(questions) for _, questions in prompts}) > 1:
        raise ConfigError(f"{path} has answers to some prompts only; give them to all or to none")
    return prompts


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place of every line that is not empty, for errors, and the JSON object on it."""
    for count, line in enumerate(text.split("\n"), 1):  # other line ends may stand within JSON texts
        if not line.strip():
            continue
        place = f"{path} line {count}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as problem:
            raise ConfigError(f"{place} is no valid JSON: {problem}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{place} is a JSON {type(values).__name__}; give an object")
        yield place, values


def _prompt(place: str, values: dict[str, Any], tokenizer: Tokenizer, limits: Limits) -> PromptAndQuestions:
    ids = np.array(tokenizer.encode(_text(place, values, "prompt", None)), np.int64)
    if values.get("answer") is None:
        return ids, ()
    answer = _text(place, values, "answer", None)
    room = max(min(DEFAULT_NEW_TOKENS, limits.max_seq_len - len(ids)), 1)
    return ids, (Question((), answer, tuple(tokenizer.encode(answer, False)), room, "contains"),)


def _example(place: str, values: dict[str, Any], tokenizer: Tokenizer, frame: PromptFrame) -> Example:
    context = _text(place, values, "context", "")
    entries = values.get("questions", [values])
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{place}: questions must be a list of objects, at least one")
    questions = tuple(_question(place, {**values, **entry}, tokenizer, frame) for entry in entries)
    ids = (*frame.before, *(tokenizer.encode(context, False) if context else ()))
    return Example(ids, questions)


def _question(place: str, values: dict[str, Any], tokenizer: Tokenizer, frame: PromptFrame) -> Question:
    scoring = values.get("scoring", "contains")
    if scoring not in FILE_SCORINGS:
        raise ConfigError(f"{place}: scoring is {scoring!r}; allowed is {' or '.join(FILE_SCORINGS)}")
    answer = _text(place, values, "answer", "i must not tell" if scoring == "refusal" else None)
    if scoring == "number" and number(answer) is None:
        raise ConfigError(f"{place}: answer is {answer!r}; scoring number needs a number such as 18 or 1,200.5")
    max_new_tokens = values.get("max_new_tokens", DEFAULT_NEW_TOKENS)
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ConfigError(f"{place}: max_new_tokens is {max_new_tokens!r}; give a whole number of at least 1")
    ids = tokenizer.encode(_text(place, values, "question", None), False)
    return Question((*ids, *frame.after), answer, tuple(tokenizer.encode(answer, False)), max_new_tokens, scoring)


def _check_size(place: str, example: Example, limits: Limits) -> None:
    prompt, questions = example.prompt("in")
    total = len(prompt) + max(len(question.ids) + question.max_new_tokens for question in questions)
    for parts, size, most in (
        ("context and question have", len(prompt), limits.max_input_len),
        ("context, question and max_new_tokens make", total, limits.max_seq_len),
    ):
        if size > most:
            raise ConfigError(f"{place}: {parts} {size} tokens; this engine takes at most {most}")


def _text(place: str, values: dict[str, Any], name: str, default: str | None) -> str:
    value = values.get(name, default)
    if not isinstance(value, str) or (not value.strip() and default != ""):
        raise ConfigError(f"{place}: {name} is {value!r}; give text")
    return value
