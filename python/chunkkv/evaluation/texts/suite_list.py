"""Reads a list of suites, as in "needle,recall,file:questions.jsonl": generated ones by name, files by path."""

from __future__ import annotations

from pathlib import Path

from chunkkv.errors import ConfigError
from chunkkv.evaluation.requirements import settings_and_tokenizer
from chunkkv.evaluation.texts.examples_file import file_suite
from chunkkv.evaluation.texts.generated_suites import make_suites
from chunkkv.evaluation.texts.prompt_writer import PromptFrame
from chunkkv.evaluation.texts.real_suites import real_suites
from chunkkv.evaluation.texts.real_texts import RealText
from chunkkv.evaluation.texts.suites import Suite
from chunkkv.evaluation.texts.templates import Wording
from chunkkv.session import ChunkKVSession

FILE_PREFIX = "file:"


def parse_suites(
    text: str, session: ChunkKVSession, wording: Wording, chat: bool = False, own_text: RealText | None = None
) -> list[Suite]:
    """Return the suites that `text` lists, in its order.

    Parameters
    ----------
    text : str
        Names of generated suites, "all", or file:PATH, separated by commas. "all" stands for every generated suite
        that `wording` has words for.
    session : ChunkKVSession
        The engine that will answer: its settings, tokenizer and limits shape the texts.
    wording : Wording
        How the generated texts are put.
    chat : bool, default False
        Whether the examples of files are put into the engine's chat template.
    own_text : RealText, optional
        The user's own text: passages of the suites on real text come from it instead of the shipped texts.

    Raises
    ------
    ConfigError
        For an unknown name, a file that is not valid, and a suite that is listed twice.
    """
    settings, tokenizer = settings_and_tokenizer(session)
    entries = [entry.strip() for entry in text.split(",")]
    if not all(entries) or len(set(entries)) < len(entries):
        raise ConfigError(f"suite is {text!r}; give different values separated by commas")
    generated = {**make_suites(settings), **real_suites(own_text)}
    suites: list[Suite] = []
    for name in entries:
        if name.startswith(FILE_PREFIX):
            path = Path(name.removeprefix(FILE_PREFIX))
            suites.append(file_suite(path, tokenizer, PromptFrame(tokenizer, chat), session.limits))
        elif name == "all":
            suites += [suite for suite in generated.values() if wording.general or not suite.general]
        elif name in generated:
            suites.append(generated[name])
        else:
            raise ConfigError(f"suite is {name!r}; there are all, {', '.join(generated)}, and {FILE_PREFIX}PATH")
    names = [suite.name for suite in suites]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"suite is {text!r}, where {twice} comes twice; list it once, or rename the file")
    return suites
