"""Writes contexts token by token: facts at known places among filler, from a seed, for any tokenizer."""

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
SHARING = ("none", "half", "grid")  # the words of the names of things: all different, one of two shared, few in all
_NAMES = ("person", "last", "direction", "street", "street_kind")
_ANCHOR = "."
_MARKER = "CONTENT"
_ALIGN_TRIES, _CHANGED = 2000, 4


@dataclass(frozen=True)
class Fact:
    """One thing to look up."""

    kind: str
    entity: str
    value: str


@dataclass(frozen=True)
class Context:
    """Token ids of a text, and where each of its stated pieces lies, in the order they were given."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


class PromptFrame:
    """What stands before and after a prompt: the begin token, or the chat template around one user message."""

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
    """Writes texts for one example; all randomness comes from `seed`, so that the same seed gives the same tokens."""

    def __init__(self, tokenizer: Tokenizer, wording: Wording, frame: PromptFrame, seed: Sequence[int]) -> None:
        self.wording = wording
        self.random = np.random.default_rng(list(seed))
        self._tokenizer, self._frame = tokenizer, frame
        self._anchor = tokenizer.encode(_ANCHOR, False)
        self._end = next(iter(sorted(tokenizer.eos_token_ids)), None)

    def pick(self, values: Sequence[str]) -> str:
        """Return one of the values."""
        return values[int(self.random.integers(len(values)))]

    def below(self, limit: int) -> int:
        """Return a whole number in [0, limit)."""
        return int(self.random.integers(limit))

    def piece(self, text: str) -> list[int]:
        """Return the token ids of a text that follows other text; sentences begin with a blank."""
        text = tidy(text)
        joined = _ANCHOR + (text if text.startswith("\n") else f" {text}")
        ids = self._tokenizer.encode(joined, False)
        if ids[: len(self._anchor)] == self._anchor:
            return ids[len(self._anchor) :]
        return self._tokenizer.encode(joined[len(_ANCHOR) :], False)  # the mark melts into what follows

    def sentence(self, template: str, **values: str) -> list[int]:
        """Return the token ids of a filled sentence, with a capital first where the wording has capitals."""
        text = template.format(**values)
        return self.piece(text[0].upper() + text[1:] if self.wording.capitals else text)

    def filler(self) -> list[int]:
        """Return one sentence that matters to no question."""
        template = self.pick(word_lists.FILLER)
        return self.sentence(re.sub(r"\{(\w+)\}", lambda slot: self.word(slot[1]), template))

    def word(self, name: str) -> str:
        """Return a word of a class of CLASSES."""
        word = self.pick(CLASSES[name])
        return word.capitalize() if self.wording.capitals and name in _NAMES else word

    def value(self, kind: str) -> str:
        """Return the value of a new fact, words separated by blanks."""
        return " ".join(self.word(name) for name in VALUES[kind])

    def entities(self, count: int, sharing: str = "none") -> list[str]:
        """Return different things, an adjective and a noun each.

        With sharing "half" every other one has the adjective or the noun of the first, with "grid" few words make all.
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
        """Return facts of one kind about different things."""
        return [Fact(kind, entity, self.value(kind)) for entity in self.entities(count, sharing)]

    def state(self, fact: Fact) -> list[int]:
        """Return the sentence that states a fact."""
        return self.sentence(self.wording.fact, **_named(fact))

    def rule(self, fact: Fact) -> list[int]:
        """Return the sentence that forbids to tell a fact."""
        return self.sentence(self.wording.rule, **_named(fact))

    def ask(
        self, fact: Fact, answer: str | None = None, sentence: bool = False, scoring: str | None = None
    ) -> Question:
        """Return the question for a fact's value, for the sentence that states it, or with another answer expected."""
        template = self.wording.say if sentence else self.wording.ask
        expected = answer or (self.wording.fact.format(**_named(fact)) if sentence else fact.value)
        return self.question(template.format(**_named(fact)), expected, scoring)

    def question(
        self, text: str, answer: str, scoring: str | None = None, *, ended: bool = True, room: int = 0, stop: str = ""
    ) -> Question:
        """Return a question in words; `ended` says that nothing may follow an exact answer, `room` adds tokens."""
        scoring = self.wording.scoring if scoring is None or self.wording.scoring == "exact" else scoring
        ids = self.piece(answer)
        exact = scoring == "exact"
        if exact and ended and self._end is not None:
            ids = [*ids, self._end]
        most = len(ids) + (0 if exact else room or self.wording.spare_tokens)
        answer = tidy(answer).rstrip(".") if scoring == "contains" else tidy(answer)
        return Question((*self.piece(text), *self._frame.after), answer, tuple(ids), most, scoring, stop)

    def room(self, length: int, *parts: Sequence[int]) -> int:
        """Return how many tokens of filler a prompt of `length` has room for beside its parts; raises ConfigError."""
        used = len(self._frame.before) + len(self._before()) + sum(map(len, parts))
        if used > length:
            raise ConfigError(f"the facts and the question of one prompt take {used} tokens; length is {length}")
        return length - used

    def _before(self) -> list[int]:
        return self._tokenizer.encode(self.wording.before, False) if self.wording.before else []

    def compose(
        self,
        stated: Sequence[Sequence[int]],
        room: int,
        *,
        head: Sequence[Sequence[int]] = (),
        depth: float | None = None,
        align: tuple[int, int] | None = None,
    ) -> Context:
        """Return the head, then the stated pieces at random places among filler of at most `room` tokens.

        The first piece stands at `depth` (0 to 1) of the filler where given; `align` (n, r) lets it begin at a position
        that leaves r when divided by n.
        """
        fillers, spare = [], 0 if align is None else align[0]  # what alignment may add
        while (left := room - spare - sum(map(len, fillers))) > 0 and len(sentence := self.filler()) <= left:
            fillers.append(sentence)
        places = [self.below(len(fillers) + 1) for _ in stated]
        if depth is not None and stated:
            places[0] = round(depth * len(fillers))
        ids = [*self._frame.before, *self._before(), *(token for piece in head for token in piece)]
        if align is not None:
            places[0] = min(max(places[0], _CHANGED), len(fillers))  # so that there is filler to change
            start = len(ids) + sum(len(piece) for piece, place in zip(stated, places, strict=True) if place < places[0])
            self._align(fillers, places[0], room, (align[0], align[1] - start))
        spans: dict[int, tuple[int, int]] = {}
        for place in range(len(fillers) + 1):
            for number, piece in enumerate(stated):
                if places[number] == place:
                    spans[number] = (len(ids), len(ids) + len(piece))
                    ids += piece
            ids += fillers[place] if place < len(fillers) else []
        return Context(tuple(ids), tuple(spans[number] for number in range(len(stated))))

    def _align(self, fillers: list[list[int]], place: int, room: int, align: tuple[int, int]) -> None:
        """Change fillers before `place` until they have align[1] tokens modulo align[0]."""
        modulus, remainder = align
        for _ in range(_ALIGN_TRIES if fillers else 0):
            if (sum(map(len, fillers[:place])) - remainder) % modulus == 0:
                return
            changed, new = max(place - 1 - self.below(_CHANGED), 0), self.filler()
            if sum(map(len, fillers)) - len(fillers[changed]) + len(new) <= room:
                fillers[changed] = new
        raise ConfigError("no filler was found that lets a fact begin where it should: give a larger length")


def tidy(text: str) -> str:
    """Return a text without the blanks before marks and between digits."""
    return re.sub(r" (?=[.,?!;:])|(?<=\d) (?=\d)", "", text)


def _named(fact: Fact) -> dict[str, str]:
    return {"kind": word_lists.KINDS[fact.kind], "entity": fact.entity, "value": fact.value}
