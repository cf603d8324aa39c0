"""Texts to find head classes on: docstrings and code of Python itself, none of which the suites are cut from."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache

import numpy as np

from chunkkv.errors import ConfigError
from chunkkv.evaluation.texts.prompt_writer import PromptFrame
from chunkkv.evaluation.texts.real_tasks import Task, make_tasks
from chunkkv.evaluation.texts.real_texts import RealText, module_source
from chunkkv.text.tokenizer import Tokenizer

DOCSTRINGS, SOURCE = "docstrings", "source"
_MODULES = ("pickletools", "doctest", "turtle", "optparse", "inspect", "typing", "_pydecimal", "shutil")
_SHORTEST_DOCSTRING = 400  # characters; shorter ones are lists of signatures


@dataclass(frozen=True)
class AnswerTask:
    """A task as tokens.

    Parameters
    ----------
    name : str
        One of chunkkv.evaluation.texts.real_tasks.TASKS.
    question : tuple of int
        Tokens behind the prompt, the end of the chat template included.
    answer : tuple of int
        The whole answer.
    first_scored : int
        The first token of the answer that counts; those before it begin the sentence.
    """

    name: str
    question: tuple[int, ...]
    answer: tuple[int, ...]
    first_scored: int


@dataclass(frozen=True)
class CalibrationPrompt:
    """A prompt of real text, ids [L], and what is asked behind it."""

    ids: tuple[int, ...]
    tasks: tuple[AnswerTask, ...]


def calibration_texts(own_text: RealText | None = None) -> tuple[RealText, ...]:
    """Return the texts that prompts are cut from: the user's own where it is given."""
    return (_docstrings(), _code()) if own_text is None else (own_text,)


def calibration_prompt(
    tokenizer: Tokenizer, texts: tuple[RealText, ...], length: int, number: int, seed: int, chat: bool
) -> CalibrationPrompt:
    """Return prompt `number` of at most `length` tokens; the texts take turns.

    Raises ConfigError for texts that are too short.
    """
    text, frame = texts[number % len(texts)], PromptFrame(tokenizer, chat=chat)
    if length < 4 * 64:
        raise ConfigError(f"lengths has {length}; calibration prompts need at least 256 tokens")
    random = np.random.default_rng([seed, length, number])

    def encode(piece: str) -> list[int]:
        return tokenizer.encode(piece, False)

    made = make_tasks(text, length - len(frame.before), encode, tokenizer.decode, random)
    tasks = tuple(_as_tokens(task, tokenizer, tuple(frame.after)) for task in made.tasks)
    return CalibrationPrompt((*frame.before, *encode(made.passage.text)), tasks)


def _as_tokens(task: Task, tokenizer: Tokenizer, after: tuple[int, ...]) -> AnswerTask:
    lead, whole = (tokenizer.encode(text, False) for text in (task.lead, task.lead + task.answer))
    same = next((i for i, (a, b) in enumerate(zip(whole, lead, strict=False)) if a != b), min(len(whole), len(lead)))
    return AnswerTask(task.name, (*tokenizer.encode(task.question, False), *after), tuple(whole), max(same, 1))


@cache
def _docstrings() -> RealText:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for name in _MODULES for node in ast.walk(ast.parse(module_source(name))) if isinstance(node, kinds)]
    texts = [ast.get_docstring(node) or "" for node in nodes]
    return RealText(DOCSTRINGS, "\n\n".join(text for text in texts if len(text) > _SHORTEST_DOCSTRING))


@cache
def _code() -> RealText:
    return RealText(SOURCE, "\n".join(module_source(name) for name in _MODULES[3:]), comment="# ")
