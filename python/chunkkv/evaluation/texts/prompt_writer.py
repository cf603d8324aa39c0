"""Writes contexts and questions as token ids: facts at known places among filler, from a seed, for any tokenizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from chunkkv.errors import ConfigError
from chunkkv.evaluation.texts import word_lists
from chunkkv.evaluation.texts.questions import Question
from chunkkv.evaluation.texts.templates import Wording
from chunkkv.text.tokenizer import Tokenizer

CLASSES = {
    "person": word_lists.FIRST_NAMES,
    "last": word_lists.LAST_NAMES,
    "adjective": word_lists.ADJECTIVES,
    "noun": word_lists.NOUNS,
    "verb": word_lists.VERBS,
    "place": word_lists.PLACES,
    "time": word_lists.TIMES,
    "digit": word_lists.DIGITS,
    "direction": word_lists.DIRECTIONS,
    "street": word_lists.STREETS,
    "street_kind": word_lists.STREET_KINDS,
}
VALUES = {"code": ("digit",) * 5, "home": ("direction", "street", "street_kind"), "keeper": ("person", "last")}
_NAMES = ("person", "last", "direction", "street", "street_kind")
_ANCHOR = "."  # a text that follows another one is encoded behind this mark
_MARKER = "CONTENT"
_ALIGN_TRIES = 2000
_ALIGN_SENTENCES = 4  # filler sentences before the aligned piece that may be replaced


@dataclass(frozen=True)
class Fact:
    """One thing to look up, as in "the access code of the amber kettle is 5 3 9 1 2": kind, entity and value."""

    kind: str
    entity: str
    value: str


@dataclass(frozen=True)
class ComposedText:
    """Token ids of a text, and the [first, end) positions of each stated piece, in the order they were passed."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


class PromptFrame:
    """The tokens around a prompt: the begin token before it, or the chat template around one user message.

    `before` and `after` hold their ids. Raises RequestError for `chat` where the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Tokenizer, chat: bool) -> None:
        if chat:
            text = tokenizer.apply_chat_template([{"role": "user", "content": _MARKER}])
            before, _, after = text.partition(_MARKER)
            self.before, self.after = (tuple(tokenizer.encode(part, False)) if part else () for part in (before, after))
        else:
            plain, framed = (tokenizer.encode(_MARKER.lower(), special) for special in (False, True))
            start = next(i for i in range(len(framed) - len(plain) + 1) if framed[i : i + len(plain)] == plain)
            self.before, self.after = tuple(framed[:start]), ()


class PromptWriter:
    """Writes the texts of one example; the same parameters give the same tokens.

    Parameters
    ----------
    tokenizer : Tokenizer
        The engine's.
    wording : Wording
        How facts and questions are put.
    frame : PromptFrame
        The tokens around the prompt.
    seed : Sequence[int]
        Where all randomness comes from (see Suite.seed).
    """

    def __init__(self, tokenizer: Tokenizer, wording: Wording, frame: PromptFrame, seed: Sequence[int]) -> None:
        self.wording = wording
        self.random = np.random.default_rng(list(seed))
        self.tokenizer, self.frame = tokenizer, frame
        self._anchor = tokenizer.encode(_ANCHOR, False)
        self._end = next(iter(sorted(tokenizer.eos_token_ids)), None)

    def pick(self, values: Sequence[str]) -> str:
        """Return one of the values."""
        return values[int(self.random.integers(len(values)))]

    def below(self, limit: int) -> int:
        """Return a whole number in [0, limit)."""
        return int(self.random.integers(limit))

    def piece(self, text: str) -> list[int]:
        """Return the token ids of a text as it stands behind another sentence, with a blank before it."""
        text = tidy(text)
        joined = _ANCHOR + (text if text.startswith("\n") else f" {text}")
        ids = self.tokenizer.encode(joined, False)
        if ids[: len(self._anchor)] == self._anchor:
            return ids[len(self._anchor) :]
        return self.tokenizer.encode(joined[len(_ANCHOR) :], False)  # the tokenizer merges anchor and text

    def sentence(self, template: str, **values: str) -> list[int]:
        """Return the token ids of a filled template, with a capital first where the wording has capitals."""
        text = template.format(**values)
        return self.piece(text[0].upper() + text[1:] if self.wording.capitals else text)

    def filler(self) -> list[int]:
        """Return the token ids of one sentence that matters to no question."""
        template = self.pick(word_lists.FILLER)
        return self.sentence(re.sub(r"\{(\w+)\}", lambda slot: self.word(slot[1]), template))

    def word(self, name: str) -> str:
        """Return a random word of a class of CLASSES."""
        word = self.pick(CLASSES[name])
        return word.capitalize() if self.wording.capitals and name in _NAMES else word

    def value(self, kind: str) -> str:
        """Return the value of a new fact of a kind of VALUES, words separated by blanks."""
        return " ".join(self.word(name) for name in VALUES[kind])

    def entities(self, count: int, sharing: str = "none") -> list[str]:
        """Return `count` different things, each an adjective and a noun.

        `sharing` says which words they share. "none": all words differ. "half": every other thing has the adjective
        or the noun of the first. "grid": about sqrt(count) adjectives and as many nouns make all. Raises ConfigError
        for more things than there are words for.
        """
        side = int(count**0.5) + 1 if sharing == "grid" else max(count, 2)
        if side > len(word_lists.ADJECTIVES):
            raise ConfigError(f"{count} facts were asked for; there are words for {len(word_lists.ADJECTIVES)}")
        adjectives = [str(word) for word in self.random.permutation(word_lists.ADJECTIVES)[:side]]
        nouns = [str(word) for word in self.random.permutation(word_lists.NOUNS)[:side]]
        if sharing == "grid":
            pairs = [(adjective, noun) for adjective in adjectives for noun in nouns]
            pairs = [pairs[index] for index in self.random.permutation(len(pairs))[:count]]
        elif sharing == "half":
            others = [(adjectives[0], noun) for noun in nouns[1::2]] + [(word, nouns[0]) for word in adjectives[2::2]]
            pairs = [(adjectives[0], nouns[0]), *others[: count - 1]]
        else:
            pairs = list(zip(adjectives, nouns, strict=True))[:count]
        return [" ".join(pair) for pair in pairs]

    def facts(self, count: int, kind: str = "code", sharing: str = "none") -> list[Fact]:
        """Return `count` facts of one kind about different things; `sharing` as in entities()."""
        return [Fact(kind, entity, self.value(kind)) for entity in self.entities(count, sharing)]

    def state(self, fact: Fact) -> list[int]:
        """Return the sentence that states a fact."""
        return self.sentence(self.wording.fact, **_slots(fact))

    def rule(self, fact: Fact) -> list[int]:
        """Return the sentence that forbids to tell a fact."""
        return self.sentence(self.wording.rule, **_slots(fact))

    def ask(
        self, fact: Fact, answer: str | None = None, sentence: bool = False, scoring: str | None = None
    ) -> Question:
        """Return a question about a fact.

        The expected answer is the fact's value; with `sentence` the sentence that states it; `answer` where that is
        not None. `scoring` None is the wording's.
        """
        template = self.wording.say if sentence else self.wording.ask
        expected = answer or (self.wording.fact.format(**_slots(fact)) if sentence else fact.value)
        return self.question(template.format(**_slots(fact)), expected, scoring)

    def question(
        self, text: str, answer: str, scoring: str | None = None, *, ended: bool = True, room: int = 0, stop: str = ""
    ) -> Question:
        """Return a question.

        Parameters
        ----------
        text : str
            The question in words.
        answer : str
            The expected answer in words.
        scoring : str, optional
            One of SCORINGS; None for the wording's. A wording that scores exactly scores every question so.
        ended : bool, default True
            Whether the end token must follow an exact answer.
        room : int, default 0
            Tokens that an answer may have beyond the expected ones; 0 for the wording's. Not for exact answers.
        stop : str, default ""
            Text behind it does not count.
        """
        scoring = self.wording.scoring if scoring is None or self.wording.scoring == "exact" else scoring
        ids = self.piece(answer)
        exact = scoring == "exact"
        if exact and ended and self._end is not None:
            ids = [*ids, self._end]
        most = len(ids) + (0 if exact else room or self.wording.spare_tokens)
        answer = tidy(answer).rstrip(".") if scoring == "contains" else tidy(answer)
        return Question((*self.piece(text), *self.frame.after), answer, tuple(ids), most, scoring, stop)

    def room(self, length: int, *parts: Sequence[int]) -> int:
        """Return how many tokens of filler a prompt of `length` tokens has room for beside its parts.

        Raises ConfigError where the parts alone are longer.
        """
        used = len(self.frame.before) + len(self._before()) + sum(map(len, parts))
        if used > length:
            raise ConfigError(f"the facts and the question of one prompt take {used} tokens; length is {length}")
        return length - used

    def _before(self) -> list[int]:
        return self.tokenizer.encode(self.wording.before, False) if self.wording.before else []

    def compose(
        self,
        stated: Sequence[Sequence[int]],
        room: int,
        *,
        head: Sequence[Sequence[int]] = (),
        depth: float | None = None,
        align: tuple[int, int] | None = None,
    ) -> ComposedText:
        """Return a context: the head, then the stated pieces at random places among filler.

        Parameters
        ----------
        stated : Sequence[Sequence[int]]
            Token ids of the pieces that stand among the filler.
        room : int
            Most tokens of filler.
        head : Sequence[Sequence[int]], default ()
            Token ids of pieces before everything else.
        depth : float, optional
            Where the first piece stands, as a share of the filler, 0 to 1; None for a random place.
        align : tuple[int, int], optional
            (n, r): the first piece begins at a position that leaves r when divided by n.

        Raises
        ------
        ConfigError
            Where no filler was found that aligns the first piece.
        """
        fillers: list[list[int]] = []
        spare = 0 if align is None else align[0]  # tokens that alignment may add
        while (left := room - spare - sum(map(len, fillers))) > 0 and len(sentence := self.filler()) <= left:
            fillers.append(sentence)
        places = [self.below(len(fillers) + 1) for _ in stated]
        if depth is not None and stated:
            places[0] = round(depth * len(fillers))
        ids = [*self.frame.before, *self._before(), *(token for piece in head for token in piece)]
        if align is not None:
            places[0] = min(max(places[0], _ALIGN_SENTENCES), len(fillers))  # so that there is filler to change
            start = len(ids) + sum(len(piece) for piece, place in zip(stated, places, strict=True) if place < places[0])
            self._align(fillers, places[0], room, (align[0], align[1] - start))
        spans: dict[int, tuple[int, int]] = {}
        for place in range(len(fillers) + 1):
            for number, piece in enumerate(stated):
                if places[number] == place:
                    spans[number] = (len(ids), len(ids) + len(piece))
                    ids += piece
            ids += fillers[place] if place < len(fillers) else []
        return ComposedText(tuple(ids), tuple(spans[number] for number in range(len(stated))))

    def _align(self, fillers: list[list[int]], place: int, room: int, align: tuple[int, int]) -> None:
        """Replace fillers before `place` until they have align[1] tokens modulo align[0]."""
        modulus, remainder = align
        for _ in range(_ALIGN_TRIES if fillers else 0):
            if (sum(map(len, fillers[:place])) - remainder) % modulus == 0:
                return
            replaced, new = max(place - 1 - self.below(_ALIGN_SENTENCES), 0), self.filler()
            if sum(map(len, fillers)) - len(fillers[replaced]) + len(new) <= room:
                fillers[replaced] = new
        raise ConfigError("no filler was found that lets a fact begin where it should: give a larger length")


def tidy(text: str) -> str:
    """Return a text without the blanks that templates have before punctuation marks and between digits."""
    return re.sub(r" (?=[.,?!;:])|(?<=\d) (?=\d)", "", text)


def _slots(fact: Fact) -> dict[str, str]:
    return {"kind": word_lists.KINDS[fact.kind], "entity": fact.entity, "value": fact.value}
