"""Scorers: what decides which tokens of a prompt stay, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from chunkkv.contexts.engine import Engine
from chunkkv.errors import BackendUnavailableError, EngineMismatchError, RequestError
from chunkkv.requests import Request
from chunkkv.rereading import pieces_of
from chunkkv.text.repeat_words import repeat_words


@dataclass(frozen=True)
class Scorer:
    """A way to score the tokens of a prompt.

    Parameters
    ----------
    name : str
        What a request calls it.
    summary : str
        What it reads, in a few words.
    rereads : bool, default False
        The prompt is read a second time.
    """

    name: str
    summary: str
    rereads: bool = False


WINDOW = Scorer("window", "the attention of the prompt's last tokens")
REREAD = Scorer("reread", "the attention of a second reading of the prompt, behind an instruction to repeat it", True)
SCORERS = {scorer.name: scorer for scorer in (WINDOW, REREAD)}


def with_scorer(
    engine: Engine,
    request: Request,
    name: str | None,
    of_context: bool = False,
    *,
    default: str | None = None,
    before: Sequence[int] | np.ndarray = (),
) -> tuple[Request, Scorer]:
    """Return a request as a scorer needs it, and the scorer.

    Raises RequestError for an unknown name and where the engine has no room for a second reading,
    BackendUnavailableError or EngineMismatchError for a scorer that the engine cannot run.

    Parameters
    ----------
    engine : Engine
        The session that is to run the request.
    request : Request
        The prompt with its budget.
    name : str or None
        The scorer; None for the default, or "window" where a second reading finds no room.
    of_context : bool, default False
        Whether the questions come later.
    default : str or None, default None
        The scorer where none is named; None for the one that serves best.
    before : sequence of int or numpy.ndarray, default ()
        Token ids of the context that the prompt goes on with.
    """
    wanted = default if name is None else name
    scorer = default_scorer(engine, of_context) if wanted is None else _named(wanted, engine)
    if not scorer.rereads or not _chooses(engine, request):
        return request, scorer
    assert engine.tokenizer is not None and engine.settings is not None
    room = engine.limits.max_seq_len - len(before) - len(request.ids)
    try:
        pieces = pieces_of(request.ids, repeat_words(engine.tokenizer), room, before)
    except RequestError:
        if name is None and engine.settings.score != "given":
            return request, WINDOW
        raise
    return dataclasses.replace(request, reread=pieces), scorer


def _named(name: str, engine: Engine) -> Scorer:
    """Return the scorer of that name, which the engine can run."""
    if not isinstance(name, str) or name not in SCORERS:
        raise RequestError(f"scorer is {name!r}; allowed is {' or '.join(map(repr, SCORERS))}")
    scorer, settings = SCORERS[name], engine.settings
    if not scorer.rereads:
        if settings is not None and settings.score == "given":
            raise EngineMismatchError(
                f"scorer is {name!r}; this engine was built with score 'given' and has no attention scores: use "
                f"scorer {REREAD.name!r}, or build with --chunkkv_score softmax"
            )
        return scorer
    if not engine.executor.capabilities.rereads:
        raise BackendUnavailableError(
            f"scorer is {name!r}; this engine cannot read a prompt a second time: use scorer {WINDOW.name!r}, or build "
            "the checkpoint for backend onnxruntime"
        )
    if settings is None:
        raise EngineMismatchError(
            f"scorer is {name!r}; this engine was built without ChunkKV and keeps every token: build it with --chunkkv"
        )
    if engine.tokenizer is None:
        raise EngineMismatchError(
            f"scorer is {name!r}, whose instruction is text; this engine was built without a tokenizer: use scorer "
            f"{WINDOW.name!r}"
        )
    return scorer


def default_scorer(engine: Engine, of_context: bool = False) -> Scorer:
    """Return what serves best: a question in the prompt observes for itself, later questions need a second reading.

    Parameters
    ----------
    engine : Engine
        The session that is to run the request.
    of_context : bool, default False
        Whether the questions come later.
    """
    settings, executor = engine.settings, engine.executor
    able = executor.capabilities.rereads and settings is not None and engine.tokenizer is not None
    if not able or settings is None:
        return WINDOW
    uneven = settings.budget_split != "uniform"
    return REREAD if settings.score == "given" or (of_context and uneven) else WINDOW


def _chooses(engine: Engine, request: Request) -> bool:
    """Return whether scores decide anything: not where all tokens stay in every part that scores."""
    settings = engine.settings
    assert settings is not None
    if settings.budget_split == "classes" and settings.local_policy == "recent":
        return request.class_lengths[0] < len(request.ids)
    return request.kept_tokens < len(request.ids)
