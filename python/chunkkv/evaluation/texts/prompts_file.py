"""Prompts to calibrate on: from a suite by name, or from a file of JSON lines with answers or without."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from chunkkv.cli.evaluate import suites_named
from chunkkv.engine.json_files import read_text
from chunkkv.errors import ConfigError
from chunkkv.evaluation.texts.questions import Question
from chunkkv.evaluation.texts.suites import check_suite
from chunkkv.evaluation.texts.wording import Wording
from chunkkv.evaluation.texts.writing import Frame, Writer
from chunkkv.session import ChunkKVSession

Prompts = list[tuple[np.ndarray, tuple[Question, ...]]]
NEW_TOKENS = 64  # of an answer that is looked for in the text


def suite_prompts(
    session: ChunkKVSession, names: str, wording: Wording, lengths: tuple[int, ...], count: int, seed: int
) -> Prompts:
    """Return `count` prompts of the named suites with their questions, as evenly from all cells as they go round.

    Fewer where the suites are files with fewer examples.
    """
    assert session.tokenizer is not None and session.settings is not None
    frame = Frame(session.tokenizer, chat=False)
    cells = []
    for suite in suites_named(names, session, wording, False):
        check_suite(suite, wording.general)
        cells += [(suite, cell) for cell in suite.cells(lengths, session.settings)]
    prompts: Prompts = []
    for index in itertools.count():
        there = [(suite, cell) for suite, cell in cells if index == 0 or "line" not in cell]
        for suite, cell in there[: count - len(prompts)]:
            writer = Writer(session.tokenizer, wording, frame, suite.seed(seed, cell, index))
            prompts.append(suite.make(writer, cell).prompt("in"))
        if not there or len(prompts) == count:
            return prompts
    raise AssertionError("count() does not end")


def file_prompts(session: ChunkKVSession, path: Path, count: int) -> Prompts:
    """Return the first `count` prompts of a file; all have a question, or none.

    A line holds "prompt" (text) and, if wanted, "answer" (text that a right answer contains). Raises ConfigError,
    naming the line, for anything else.
    """
    prompts: Prompts = []
    for number, line in enumerate(read_text(path, ConfigError).split("\n"), 1):
        if line.strip() and len(prompts) < count:
            prompts.append(_prompt(f"{path} line {number}", line, session))
    if not prompts:
        raise ConfigError(f'{path} has no prompts; give one JSON object per line, such as {{"prompt": "…"}}')
    if len({bool(questions) for _, questions in prompts}) > 1:
        raise ConfigError(f"{path} has answers to some prompts only; give them to all or to none")
    return prompts


def _prompt(place: str, line: str, session: ChunkKVSession) -> tuple[np.ndarray, tuple[Question, ...]]:
    assert session.tokenizer is not None
    try:
        values: Any = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise ConfigError(f"{place} is no valid JSON: {problem}") from None
    texts = {name: values.get(name) for name in ("prompt", "answer")} if isinstance(values, dict) else {"prompt": None}
    for name, text in texts.items():
        if not (isinstance(text, str) and text.strip()) and not (name == "answer" and text is None):
            raise ConfigError(f"{place}: {name} is {text!r}; give text")
    ids = np.array(session.tokenizer.encode(texts["prompt"]), np.int64)
    if texts["answer"] is None:
        return ids, ()
    answer = texts["answer"]
    room = min(NEW_TOKENS, session.limits.max_seq_len - len(ids))
    return ids, (Question((), answer, tuple(session.tokenizer.encode(answer, False)), max(room, 1), "contains"),)
