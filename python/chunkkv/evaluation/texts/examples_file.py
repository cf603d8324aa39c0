"""Reads a suite from a local file: one JSON object per line, with a context, questions and expected answers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from chunkkv.engine.json_files import read_text
from chunkkv.errors import ConfigError
from chunkkv.evaluation.texts.questions import SCORINGS, Example, Question, number
from chunkkv.evaluation.texts.suites import Cell, Suite
from chunkkv.evaluation.texts.writing import Frame, Writer
from chunkkv.requests import Limits
from chunkkv.text.tokenizer import Tokenizer

FILE_SCORINGS = tuple(name for name in SCORINGS if name != "exact")
DEFAULT_NEW_TOKENS = 64


def file_suite(path: Path, tokenizer: Tokenizer, frame: Frame, limits: Limits) -> Suite:
    """Return the examples of a file as a suite named after it; all are in one cell, in the order of the file.

    A line holds "context" (text, may be empty), "question" (text) and "answer" (text, not needed for scoring
    "refusal"), or "questions": a list of such objects without context; and if wanted "scoring" (one of
    FILE_SCORINGS) and "max_new_tokens". Raises ConfigError, naming the line, for anything else and for what is longer
    than `limits` allow.
    """
    examples = []
    text = read_text(path, ConfigError)
    for count, line in enumerate(text.split("\n"), 1):  # other line ends may stand within JSON texts
        if line.strip():
            example = _example(f"{path} line {count}", line, tokenizer, frame)
            _check_size(f"{path} line {count}", example, limits)
            examples.append(example)
    if not examples:
        raise ConfigError(f"{path} has no examples; give one JSON object per line")

    def make(writer: Writer, cell: Cell) -> Example:
        return examples[cell["line"]]

    return Suite(
        path.stem,
        f"the examples of {path.name}",
        lambda *_: [{"line": n} for n in range(len(examples))],
        make,
        content=hashlib.sha256(text.encode()).hexdigest(),
    )


def _example(place: str, line: str, tokenizer: Tokenizer, frame: Frame) -> Example:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise ConfigError(f"{place} is no valid JSON: {problem}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{place} is a JSON {type(values).__name__}; give an object")
    context = _text(place, values, "context", "")
    asked = values.get("questions", [values])
    if not isinstance(asked, list) or not asked or not all(isinstance(entry, dict) for entry in asked):
        raise ConfigError(f"{place}: questions must be a list of objects, at least one")
    questions = tuple(_question(place, {**values, **entry}, tokenizer, frame) for entry in asked)
    ids = (*frame.before, *(tokenizer.encode(context, False) if context else ()))
    return Example(ids, questions)


def _question(place: str, values: dict[str, Any], tokenizer: Tokenizer, frame: Frame) -> Question:
    scoring = values.get("scoring", "contains")
    if scoring not in FILE_SCORINGS:
        raise ConfigError(f"{place}: scoring is {scoring!r}; allowed is {' or '.join(FILE_SCORINGS)}")
    answer = _text(place, values, "answer", "i must not tell" if scoring == "refusal" else None)
    if scoring == "number" and number(answer) is None:
        raise ConfigError(f"{place}: answer is {answer!r}; scoring number needs a number such as 18 or 1,200.5")
    room = values.get("max_new_tokens", DEFAULT_NEW_TOKENS)
    if isinstance(room, bool) or not isinstance(room, int) or room < 1:
        raise ConfigError(f"{place}: max_new_tokens is {room!r}; give a whole number of at least 1")
    ids = tokenizer.encode(_text(place, values, "question", None), False)
    return Question((*ids, *frame.after), answer, tuple(tokenizer.encode(answer, False)), room, scoring)


def _check_size(place: str, example: Example, limits: Limits) -> None:
    prompt, questions = example.prompt("in")
    whole = len(prompt) + max(len(question.ids) + question.max_new_tokens for question in questions)
    for name, size, most in (("prompt", len(prompt), limits.max_input_len), ("whole", whole, limits.max_seq_len)):
        if size > most:
            what = "context and question have" if name == "prompt" else "context, question and max_new_tokens make"
            raise ConfigError(f"{place}: {what} {size} tokens; this engine takes at most {most}")


def _text(place: str, values: dict[str, Any], name: str, default: str | None) -> str:
    value = values.get(name, default)
    if not isinstance(value, str) or (not value.strip() and default != ""):
        raise ConfigError(f"{place}: {name} is {value!r}; give text")
    return value
