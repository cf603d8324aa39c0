"""Contexts of real text: a novel, a speech, a manual, program code or the user's own file, with facts planted in it."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from chunkkv.engine.json_files import read_text
from chunkkv.errors import ConfigError

KINDS = ("novel", "speech", "manual", "code")
_EXCERPTS = Path(__file__).parent / "excerpts"
_CODE = (
    "argparse",
    "configparser",
    "csv",
    "difflib",
    "heapq",
    "mailbox",
    "statistics",
    "tarfile",
    "textwrap",
    "zipfile",
)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\n+")
_LINE_END = re.compile(r"\n")
_PLACES = 20  # that are drawn until a stretch from there holds as many sentences as are planted


@dataclass(frozen=True)
class RealText:
    """One text that contexts are cut from.

    Parameters
    ----------
    kind : str
        One of KINDS, or "file" for the user's own.
    text : str
        The whole text.
    comment : str, default ""
        What a planted line begins with. Where it is not empty, the text is cut at line ends, else at sentence ends.
    """

    kind: str
    text: str
    comment: str = ""

    @cached_property
    def cuts(self) -> np.ndarray:
        """Ascending character offsets at which a sentence, or a line of code, begins; the first is 0."""
        ends = _LINE_END if self.comment else _SENTENCE_END
        return np.array(sorted({0, *(match.end() for match in ends.finditer(self.text))}), np.int64)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the text: results of different texts are never mixed."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def planted(self, statement: str) -> str:
        """Return a statement as it stands between two pieces of the text."""
        return f"{self.comment}{statement}\n" if self.comment else f"{statement} "


@cache
def real_text(kind: str) -> RealText:
    """Return the text of one of KINDS; raises ConfigError for another word."""
    if kind in ("novel", "speech"):
        return RealText(kind, (_EXCERPTS / f"{kind}.txt").read_text(encoding="utf-8"))
    if kind == "manual":
        from pydoc_data.topics import topics

        return RealText(kind, "\n\n".join(topics[name] for name in sorted(topics)))
    if kind == "code":
        return RealText(kind, "\n".join(module_source(name) for name in _CODE), comment="# ")
    raise ConfigError(f"text is {kind!r}; there are {', '.join(KINDS)}")


def file_text(path: Path) -> RealText:
    """Return the user's own text, from a file of UTF-8; raises ConfigError where there is none."""
    text = read_text(path, ConfigError)
    if not text.strip():
        raise ConfigError(f"text_file {path} is empty; give a file of plain text")
    return RealText("file", text)


def module_source(module: str) -> str:
    """Return the source of a module of the standard library."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None or not found.origin.endswith(".py"):
        raise ConfigError(f"this Python has no source of its module {module}; give other texts than code")
    return Path(found.origin).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Passage:
    """A stretch of real text of a wanted number of tokens, with statements planted in it.

    Parameters
    ----------
    text : str
        The stretch, statements included.
    follows : str
        What comes next in the source, with the blank or line end before it.
    spans : tuple[tuple[int, int], ...]
        The [first, end) characters of each statement, in the order they were passed.
    """

    text: str
    follows: str
    spans: tuple[tuple[int, int], ...]


def cut_passage(
    source: RealText,
    tokens: int,
    count: Callable[[str], int],
    random: np.random.Generator,
    statements: Sequence[str] = (),
    follow_characters: int = 1_000,
) -> Passage:
    """Return a stretch of a text of at most `tokens` tokens, from a random place, with statements at random places.

    Parameters
    ----------
    source : RealText
        Where the stretch is cut.
    tokens : int
        Most tokens, statements included. The stretch is at most one sentence or line shorter.
    count : callable
        Returns the number of tokens of a text.
    random : numpy.random.Generator
        Where places come from.
    statements : sequence of str, default ()
        What is planted, each between two sentences or lines. Places are drawn in equal parts of the stretch, in random
        order, so that no two statements stand side by side.
    follow_characters : int, default 1000
        Length of `Passage.follows`.

    Raises
    ------
    ConfigError
        Where the source is too short.
    """
    planted = [source.planted(statement) for statement in statements]
    room = tokens - sum(count(piece) for piece in planted)
    characters = room * 8  # no tokenizer of general language has longer tokens on average
    last = int(np.searchsorted(source.cuts, len(source.text) - min(characters, len(source.text) // 2)))
    for _ in range(_PLACES):
        first = int(random.integers(max(last, 1)))
        end = _end_of_stretch(source, first, room, count)
        fits = end < len(source.cuts) - 1
        if fits and end > first + len(planted):
            return _plant(source, first, end, planted, random, follow_characters)
    raise ConfigError(
        f"the text ({source.kind}) has too long sentences to plant {len(planted)} others in {tokens} tokens: ask for "
        "longer prompts"
        if fits and planted
        else f"the text ({source.kind}) has no stretch of {tokens} tokens: give a longer one, or shorter prompts"
    )


def _end_of_stretch(source: RealText, first: int, room: int, count: Callable[[str], int]) -> int:
    """Return the largest cut up to which the text from cut `first` on has at most `room` tokens."""
    low, high = first, len(source.cuts) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if count(source.text[source.cuts[first] : source.cuts[middle]]) <= room:
            low = middle
        else:
            high = middle - 1
    return low


def _plant(
    source: RealText, first: int, last: int, planted: Sequence[str], random: np.random.Generator, follow: int
) -> Passage:
    bounds = np.linspace(first + 1, last, len(planted) + 1).astype(int)
    places = [int(random.integers(low, max(high, low + 1))) for low, high in pairwise(bounds)]
    order = random.permutation(len(planted))  # which statement stands in which part
    text, spans, start = "", {}, int(source.cuts[first])
    for place, number in zip(places, order, strict=True):
        text += source.text[start : source.cuts[place]]
        if text and not text[-1].isspace():
            text += " "
        spans[int(number)] = (len(text), len(text) + len(planted[number].rstrip()))
        text += planted[number]
        start = int(source.cuts[place])
    end = int(source.cuts[last])
    text += source.text[start:end]
    stretch = text.rstrip()
    follows = text[len(stretch) :] + source.text[end : end + follow]
    return Passage(stretch, follows, tuple(spans[number] for number in range(len(planted))))
