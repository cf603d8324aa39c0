"""The prompts to calibrate on: from suites by name, or from a file of JSON lines."""

from __future__ import annotations

import itertools
from pathlib import Path

from chunkkv.evaluation.requirements import settings_and_tokenizer
from chunkkv.evaluation.texts.examples_file import file_prompts
from chunkkv.evaluation.texts.prompt_writer import PromptFrame, PromptWriter
from chunkkv.evaluation.texts.questions import PromptAndQuestions
from chunkkv.evaluation.texts.suite_list import FILE_PREFIX, parse_suites
from chunkkv.evaluation.texts.suites import check_suite
from chunkkv.evaluation.texts.templates import Wording, choose_wording
from chunkkv.session import ChunkKVSession


def calibration_prompts(
    session: ChunkKVSession,
    data: str,
    wording: str,
    lengths: tuple[int, ...],
    count: int,
    seed: int,
    chat: bool | None = None,
) -> list[PromptAndQuestions]:
    """Return the prompts to calibrate on.

    Parameters
    ----------
    session : ChunkKVSession
        The engine that is calibrated.
    data : str
        The path of a file of prompts (see file_prompts), or a list of suites (see parse_suites). A name without a
        suffix is a path only where such a file exists.
    wording : str
        How a suite's texts are put: "needle", "english" or "auto".
    lengths : tuple[int, ...]
        Lengths in tokens of a suite's prompts.
    count : int
        How many prompts are wanted; there are fewer where the file, or the suite's file, has fewer.
    seed : int
        Seed of a suite's texts.
    chat : bool or None, default None
        Whether a suite's prompts are in the model's chat template. None: where there is one, with wording english.

    Raises
    ------
    ConfigError
        For suites, wordings and files that do not exist or are not valid.
    EngineMismatchError
        For an engine without ChunkKV or without a tokenizer.
    """
    _, tokenizer = settings_and_tokenizer(session)
    chosen = choose_wording(wording, tokenizer)
    path = Path(data)
    if not data.startswith(FILE_PREFIX) and (path.suffix or path.exists()):
        return file_prompts(path, tokenizer, session.limits, count)
    if chat is None:
        chat = tokenizer.chat_template is not None and chosen.general
    return suite_prompts(session, data, chosen, lengths, count, seed, chat)


def suite_prompts(
    session: ChunkKVSession,
    names: str,
    wording: Wording,
    lengths: tuple[int, ...],
    count: int,
    seed: int,
    chat: bool = False,
) -> list[PromptAndQuestions]:
    """Return `count` prompts of the named suites with their questions, dealt round-robin over all (suite, cell) pairs.

    Fewer where the suites are files with fewer examples.
    """
    settings, tokenizer = settings_and_tokenizer(session)
    frame = PromptFrame(tokenizer, chat=chat)
    cells = []
    for suite in parse_suites(names, session, wording, chat):
        check_suite(suite, wording.general)
        cells += [(suite, cell) for cell in suite.cells(lengths, settings)]
    prompts: list[PromptAndQuestions] = []
    for index in itertools.count():
        # A cell of a file is one example of it; a generated cell has as many as are asked for.
        remaining = [(suite, cell) for suite, cell in cells if index == 0 or "line" not in cell]
        for suite, cell in remaining[: count - len(prompts)]:
            writer = PromptWriter(tokenizer, wording, frame, suite.seed(seed, cell, index))
            prompts.append(suite.make(writer, cell).prompt("in"))
        if not remaining or len(prompts) == count:
            break
    return prompts
