"""Documents of the needle model: filler, facts, rules, questions; built as token ids, in a fixed order from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

import numpy as np
from vocabulary import (
    ADJECTIVES,
    BOS_ID,
    DIGITS,
    DIRECTIONS,
    EOS_ID,
    FILLER,
    FIRST_NAMES,
    KINDS,
    LAST_NAMES,
    LEAD_INS,
    LIST_AGAIN,
    LIST_START,
    NOUNS,
    PLACES,
    QUESTION,
    REFUSAL,
    RULE,
    SENTENCE_QUESTION,
    STREET_KINDS,
    STREETS,
    TIMES,
    TOKEN_ID,
    VERBS,
    ids_of,
)

Value = TypeVar("Value")
Slots = list["int | list[int]"]


def _class(words: tuple[str, ...]) -> list[int]:
    return [TOKEN_ID[word] for word in words]


CLASSES: Final = {
    "person": _class(FIRST_NAMES),
    "adjective": _class(ADJECTIVES),
    "noun": _class(NOUNS),
    "verb": _class(VERBS),
    "place": _class(PLACES),
    "time": _class(TIMES),
    "digit": _class(DIGITS),
    "last": _class(LAST_NAMES),
    "direction": _class(DIRECTIONS),
    "street": _class(STREETS),
    "street_kind": _class(STREET_KINDS),
}
VALUE_SLOTS: Final = {
    "code": ("digit",) * 5,
    "home": ("direction", "street", "street_kind"),
    "keeper": ("person", "last"),
}
SHARING: Final = ("none", "none", "adjective", "noun", "grid", "grid")  # which words the entities of a document share
KIND_NAMES: Final = tuple(KINDS)


def _slots(template: str) -> Slots:
    return [CLASSES[word[1:-1]] if word.startswith("{") else TOKEN_ID[word] for word in template.split()]


_FILLER: Final = [_slots(template) for template in FILLER]
_LEAD_INS: Final = [ids_of(text) for text in LEAD_INS]
_SUBJECT: Final = {kind: ids_of(f"the {name} of the") for kind, name in KINDS.items()}
_RULE: Final = {kind: ids_of(RULE.format(kind=name)) for kind, name in KINDS.items()}
_ASK: Final = {kind: ids_of(QUESTION.format(kind=name)) for kind, name in KINDS.items()}
_SAY: Final = {kind: ids_of(SENTENCE_QUESTION.format(kind=name)) for kind, name in KINDS.items()}
_REFUSAL: Final = [*ids_of(REFUSAL), EOS_ID]
_ANSWER: Final = ids_of("answer :")
_STOP, _COMMA, _ASKED, _THE, _IS = ids_of(". , ? the is")
_LINE_BREAK: Final = TOKEN_ID["\n"]

ENTITY_LENGTH: Final = 2
LONGEST_QUESTION: Final = 1 + 16 + 14 + 1  # a line break, a code's sentence form, its answer, the end token


class Picker:
    """Fast choices from one seeded NumPy generator."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator
        self._uniform: list[float] = []

    def chance(self) -> float:
        """A number in [0, 1)."""
        if not self._uniform:
            self._uniform = self._generator.random(8192).tolist()
        return self._uniform.pop()

    def below(self, limit: int) -> int:
        """A whole number in [0, limit)."""
        return int(self.chance() * limit)

    def pick(self, values: Sequence[Value]) -> Value:
        """One of the values."""
        return values[int(self.chance() * len(values))]

    def fill(self, slots: Slots) -> list[int]:
        """The template's tokens with every slot filled."""
        return [slot if isinstance(slot, int) else self.pick(slot) for slot in slots]

    def shuffled(self, values: Sequence[Value]) -> list[Value]:
        """A new list in random order."""
        return [value for _, value in sorted(((self.chance(), index), value) for index, value in enumerate(values))]


@dataclass(frozen=True)
class Fact:
    """One thing to look up: the entity's code, home or keeper."""

    kind: str
    entity: tuple[int, int]
    value: tuple[int, ...]

    def sentence(self) -> list[int]:
        """'the access code of the amber kettle is 5 3 9 1 2 .'"""
        return [*_SUBJECT[self.kind], *self.entity, _IS, *self.value, _STOP]


@dataclass(frozen=True)
class Question:
    """Where a document asks for a fact: answer tokens are tokens[start:end], the last of them the end token."""

    kind: str
    start: int
    end: int
    refused: bool = False
    sentence: bool = False


@dataclass
class Document:
    """Token ids, the places whose next token is worth learning, and the questions asked."""

    tokens: list[int] = field(default_factory=lambda: [BOS_ID])
    answer_places: list[int] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    label: str = "recall"

    def extend_learned(self, tokens: list[int]) -> None:
        """Append tokens that the loss counts."""
        start = len(self.tokens)
        self.tokens.extend(tokens)
        self.answer_places.extend(range(start, len(self.tokens)))


class Writer:
    """Writes documents of at most a given number of tokens; all randomness comes from one seed.

    `words` limits how many adjectives, nouns, names and streets are in use; training starts with few.
    """

    def __init__(self, seed: int | list[int], words: int | None = None) -> None:
        self.picker = Picker(np.random.default_rng(seed))
        self.classes = {name: ids if name == "digit" else ids[:words] for name, ids in CLASSES.items()}

    def value(self, kind: str) -> tuple[int, ...]:
        """A random value of a kind."""
        return tuple(self.picker.pick(self.classes[slot]) for slot in VALUE_SLOTS[kind])

    def facts(self, count: int, kinds: tuple[str, ...] = KIND_NAMES, sharing: str | None = None) -> list[Fact]:
        """Facts about different (kind, entity) pairs; `sharing` (random when None) says which words entities share."""
        picker = self.picker
        sharing = sharing or picker.pick(list(SHARING))
        size = count if len(kinds) == 1 else max(2, count * 2 // 3)
        side = int(size**0.5) + 1
        adjectives = picker.shuffled(self.classes["adjective"])[: {"adjective": 1, "grid": side}.get(sharing, size)]
        nouns = picker.shuffled(self.classes["noun"])[: {"noun": 1, "grid": side}.get(sharing, size)]
        if sharing == "none":
            entities = list(zip(adjectives, nouns, strict=False))  # as many as both classes have
        else:
            entities = [(adjective, noun) for adjective in adjectives for noun in nouns]
        subjects = picker.shuffled([(kind, entity) for kind in kinds for entity in entities])
        return [Fact(kind, entity, self.value(kind)) for kind, entity in subjects[:count]]

    def joined(self, sentences: list[list[int]]) -> list[int]:
        """The sentences as one text; half of the texts end in a line break, which sets the question apart."""
        tokens = [token for sentence in sentences for token in sentence]
        return [*tokens, _LINE_BREAK] if self.picker.chance() < 0.5 else tokens

    def filler(self) -> list[int]:
        """One sentence that matters to no question."""
        return self.picker.fill(self.picker.pick(_FILLER))

    def ask(self, document: Document, fact: Fact, *, refused: bool = False, sentence: bool = False) -> None:
        """Append a question and its answer."""
        ask = _SAY if sentence else _ASK
        mark = _STOP if sentence else _ASKED
        document.tokens += [*ask[fact.kind], *fact.entity, mark, *_ANSWER]
        if refused:
            answer = _REFUSAL
        else:
            answer = [*(fact.sentence() if sentence else fact.value), EOS_ID]
        start = len(document.tokens)
        document.extend_learned(answer)
        document.questions.append(Question(fact.kind, start, len(document.tokens), refused, sentence))

    def pairs(self, length: int, key: str | None = "noun", value: str | None = "digit") -> Document:
        """'kettle 7 anchor 2' stated, then asked for again and again; None stands for a random class of words."""
        picker, document = self.picker, Document()
        keys = self.classes[key or picker.pick(["noun", "adjective", "person", "street", "digit"])]
        values = self.classes[value or picker.pick(["digit", "noun", "person", "last", "street", "place"])]
        items = list(zip(picker.shuffled(keys), picker.shuffled(values), strict=False))[:4]
        for item in items:
            document.tokens += item
        while len(document.tokens) + 2 <= length:
            word, answer = picker.pick(items)
            document.tokens.append(word)
            document.extend_learned([answer])
        return document

    def recall(self, length: int, level: int, sharing: str | None = None) -> Document:
        """'amber kettle 7 .' stated, then asked for again and again; level 1 adds 'the' and 'is'."""
        picker, document = self.picker, Document()
        unit = 4 + 2 * level
        count = min(3 + picker.below(length // unit // 4), 40)
        facts = self.facts(count, ("code",), sharing)
        pool = self.classes[picker.pick(["digit", "digit", "digit", "person", "street"])]
        items = []
        for fact in facts:
            head = [_THE, *fact.entity, _IS] if level else list(fact.entity)
            items.append((head, picker.pick(pool)))
        for head, value in items:
            document.tokens += [*head, value, _STOP]
        while len(document.tokens) + unit <= length:
            head, value = picker.pick(items)
            document.tokens += head
            document.extend_learned([value])
            document.tokens.append(_STOP)
        return document

    def name_list(self, length: int) -> Document:
        """Names or addresses in a list, then again in random order; all words but the first are learned."""
        picker, document = self.picker, Document(label="list")
        kind = picker.pick(["code", "home", "home", "keeper"])
        width = len(VALUE_SLOTS[kind])
        count = min(3 + picker.below(length // (width + 1) // 3), 60)
        values = list({value[0]: value for value in (self.value(kind) for _ in range(count))}.values())
        document.tokens += ids_of(LIST_START)
        for value in values:
            document.tokens += [*value, _COMMA]
        again = ids_of(LIST_AGAIN)
        document.tokens += again
        while True:
            for value in picker.shuffled(values):
                if len(document.tokens) + width + 1 > length:
                    return document
                document.tokens.append(value[0])
                document.extend_learned([*value[1:], _COMMA])

    def dense(self, length: int, share: float = 0.45, rules: int = 0, kinds: tuple[str, ...] = KIND_NAMES) -> Document:
        """Facts only, then as many questions as fit; rules forbid some facts, others are near-duplicates of these."""
        count = max(2, int((length - 14 * rules) * share / 14))
        return self.full(length, count, count * 3, rules=rules, filler=False, kinds=kinds)

    def full(
        self,
        length: int,
        fact_count: int,
        question_count: int,
        *,
        rules: int = 0,
        filler: bool = True,
        kinds: tuple[str, ...] = KIND_NAMES,
        sentences: float = 0.2,
        lead_ins: float = 0.3,
    ) -> Document:
        """Rules, then facts at random places among filler, then questions."""
        picker, document = self.picker, Document()
        facts = self.facts(fact_count, kinds)
        forbidden = set(facts[:rules])
        for fact in facts[:rules]:
            document.tokens += [*_RULE[fact.kind], *fact.entity, _STOP]
        stated = []
        for fact in picker.shuffled(facts):
            lead_in = picker.pick(_LEAD_INS) if picker.chance() < lead_ins else []
            stated.append([*lead_in, *fact.sentence()])
        asked = self._asked(facts, forbidden, question_count)
        room = length - len(document.tokens) - sum(map(len, stated)) - LONGEST_QUESTION * min(len(asked), 2)
        if filler:
            room -= 24 * max(0, len(asked) - 2)
            stated = self.scatter(stated, room)
        document.tokens += self.joined(stated)
        for fact in asked:
            if len(document.tokens) + LONGEST_QUESTION > length:
                break
            self.ask(document, fact, refused=fact in forbidden, sentence=picker.chance() < sentences)
        return document

    def _asked(self, facts: list[Fact], forbidden: set[Fact], count: int) -> list[Fact]:
        """Facts in the order of the questions; with rules, about half of the questions are to be refused."""
        picker = self.picker
        if not forbidden:
            rounds = -(-count // len(facts))
            return [fact for _ in range(rounds) for fact in picker.shuffled(facts)][:count]
        barred = [fact for fact in facts if fact in forbidden]
        allowed = [fact for fact in facts if fact not in forbidden] or barred
        return [picker.pick(barred if picker.chance() < 0.4 else allowed) for _ in range(count)]

    def scatter(self, stated: list[list[int]], room: int) -> list[list[int]]:
        """The stated facts in their order, at random places among filler of at most `room` tokens."""
        fillers = []
        while True:
            sentence = self.filler()
            if len(sentence) > room:
                break
            room -= len(sentence)
            fillers.append(sentence)
        is_fact = self.picker.shuffled([True] * len(stated) + [False] * len(fillers))
        facts, rest = iter(stated), iter(fillers)
        return [next(facts) if fact else next(rest) for fact in is_fact]


@dataclass(frozen=True)
class Task:
    """What a test prompt asks: one fact among `facts` of its kind, with or without a rule about it or its neighbour."""

    kind: str = "code"
    facts: int = 1
    sharing: str = "none"  # the words that distractors share, as for Writer.facts
    sentence: bool = False  # the question wants a complete sentence
    rule: str = ""  # "forbidden": the rule names the fact asked for; "neighbour": it names another one


def test_prompt(writer: Writer, length: int, task: Task, depth: float | None = None) -> tuple[list[int], list[int]]:
    """A prompt of at most `length` tokens that ends in 'answer :', and its answer with the end token.

    The fact asked for stands at `depth` (0 to 1) of the document, at a random place when `depth` is None; raises
    ValueError when the facts alone are longer than `length`.
    """
    asked_for, *others = writer.facts(task.facts, (task.kind,), task.sharing)
    question = Document([])
    writer.ask(question, asked_for, refused=task.rule == "forbidden", sentence=task.sentence)
    start = question.questions[0].start
    ending, answer = question.tokens[:start], question.tokens[start:]
    rules = []
    if task.rule:
        barred = asked_for if task.rule == "forbidden" else others[0]
        rules = [*_RULE[barred.kind], *barred.entity, _STOP]
    stated = [fact.sentence() for fact in others]
    room = length - 2 - len(rules) - len(ending) - len(asked_for.sentence()) - sum(map(len, stated))
    if room < 0:
        raise ValueError(f"{task.facts} facts and a question need {length - room} tokens; length is {length}")
    body = writer.scatter(stated, room)
    place = writer.picker.below(len(body) + 1) if depth is None else round(depth * len(body))
    body.insert(place, asked_for.sentence())
    return [BOS_ID, *rules, *(token for sentence in body for token in sentence), _LINE_BREAK, *ending], answer
