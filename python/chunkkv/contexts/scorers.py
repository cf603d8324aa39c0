"""Scorers: what decides which tokens of a context stay, by name."""

from __future__ import annotations

from dataclasses import dataclass

from chunkkv.errors import RequestError


@dataclass(frozen=True)
class Scorer:
    """A way to score the tokens of a prompt.

    Parameters
    ----------
    name : str
        What a request calls it.
    summary : str
        What it reads, in a few words.
    needs_given_scores : bool, default False
        The engine must take scores from outside.
    """

    name: str
    summary: str
    needs_given_scores: bool = False


WINDOW = Scorer("window", "the attention of the prompt's last tokens")
SCORERS = {scorer.name: scorer for scorer in (WINDOW,)}
DEFAULT = WINDOW  # of contexts, whose questions come later


def scorer_of(name: str | None) -> Scorer:
    """Return the scorer of that name, the default for None; raises RequestError for an unknown one."""
    if name is None:
        return DEFAULT
    if not isinstance(name, str) or name not in SCORERS:
        raise RequestError(f"scorer is {name!r}; allowed is {' or '.join(map(repr, SCORERS))}")
    return SCORERS[name]
