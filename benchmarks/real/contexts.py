"""The prompts of the measurement: real text in the chat template, one context for all questions about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from chunkkv.evaluation.texts.prompt_writer import PromptFrame
from chunkkv.evaluation.texts.real_tasks import Task, make_tasks
from chunkkv.evaluation.texts.real_texts import KINDS, real_text
from chunkkv.text.tokenizer import Tokenizer

FOLLOWING = 48  # tokens of the text behind the context whose likelihood is measured


@dataclass(frozen=True)
class Asked:
    """A task as tokens.

    `question` are the tokens behind the context, chat template included; `answer` the whole expected answer, of which
    the tokens from `first_scored` on count.
    """

    name: str
    question: tuple[int, ...]
    answer: tuple[int, ...]
    first_scored: int


@dataclass(frozen=True)
class Context:
    """One context: its name, its kind of text, its wanted length, its token ids, and what is asked of it."""

    name: str
    kind: str
    length: int
    ids: tuple[int, ...]
    asked: tuple[Asked, ...]
    following: tuple[int, ...]


def make_context(tokenizer: Tokenizer, length: int, number: int) -> Context:
    """Return context `number` of about `length` tokens; the kinds of text take turns."""
    kind = KINDS[number % len(KINDS)]
    frame = PromptFrame(tokenizer, chat=True)
    random = np.random.default_rng([length, number])

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, False)

    made = make_tasks(real_text(kind), length - len(frame.before), encode, tokenizer.decode, random)
    ids = (*frame.before, *encode(made.passage.text))
    following = tuple(encode(made.passage.text + made.passage.follows)[len(ids) - len(frame.before) :][:FOLLOWING])
    asked = tuple(_asked(task, tokenizer, frame.after) for task in made.tasks)
    return Context(f"{length}-{number}", kind, length, ids, asked, following)


def _asked(task: Task, tokenizer: Tokenizer, after: Sequence[int]) -> Asked:
    question = (*tokenizer.encode(task.question, False), *after)
    answer = tokenizer.encode(task.lead + task.answer, False)
    lead = tokenizer.encode(task.lead, False)
    same = next((i for i, (a, b) in enumerate(zip(answer, lead, strict=False)) if a != b), min(len(answer), len(lead)))
    return Asked(task.name, question, tuple(answer), same)
