"""The generated suites: what a compressed cache is asked for, from seeds; docs/evaluation.md says why each.

CONTRIBUTING.md says how to add a suite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from chunkkv.evaluation.texts import word_lists
from chunkkv.evaluation.texts.prompt_writer import ComposedText, Fact, PromptWriter
from chunkkv.evaluation.texts.questions import Example, Question
from chunkkv.evaluation.texts.suites import Cell, Suite
from chunkkv.settings import ChunkKVSettings

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
RECALL_ANSWERS = ("keeper", "home", "code", "sentence")  # of 2, 3, 5 and 14 words
DIGITS = (1, 2, 4, 8, 16, 32)


def _by_length(lengths: Sequence[int], settings: ChunkKVSettings) -> list[Cell]:
    return [{"length": length} for length in lengths]


def _crossed(name: str, values: Sequence[Any]) -> Callable[[Sequence[int], ChunkKVSettings], list[Cell]]:
    return lambda lengths, settings: [{"length": length, name: value} for length in lengths for value in values]


def _straddle_cells(lengths: Sequence[int], settings: ChunkKVSettings) -> list[Cell]:
    size = settings.chunk_size
    offsets = sorted({round(place * size / 10) for place in range(10)} if size > 10 else set(range(size)))
    return [{"length": max(lengths), "offset": offset} for offset in offsets]


def _lookup(writer: PromptWriter, cell: Cell, facts: Sequence[Fact], question: Question, **where: Any) -> Example:
    """Return an example that states the facts among filler and asks for the first."""
    stated = [writer.state(fact) for fact in facts]
    context = writer.compose(stated, writer.room(cell["length"], *stated, question.ids), **where)
    return Example(context.ids, (question,), context.spans[:1])


def _needle(writer: PromptWriter, cell: Cell) -> Example:
    facts = writer.facts(1)
    return _lookup(writer, cell, facts, writer.ask(facts[0]), depth=cell["depth"])


def _recall(writer: PromptWriter, cell: Cell) -> Example:
    answer = cell["answer"]
    facts = writer.facts(1, "code" if answer == "sentence" else answer)
    return _lookup(writer, cell, facts, writer.ask(facts[0], sentence=answer == "sentence"))


def _digits(writer: PromptWriter, cell: Cell) -> Example:
    value = " ".join(writer.word("digit") for _ in range(cell["digits"]))
    facts = [Fact("code", writer.entities(1)[0], value)]
    return _lookup(writer, cell, facts, writer.ask(facts[0]))


def _straddle(settings: ChunkKVSettings) -> Callable[[PromptWriter, Cell], Example]:
    def make(writer: PromptWriter, cell: Cell) -> Example:
        facts = writer.facts(1)
        align = (settings.chunk_size, settings.sinks + cell["offset"])
        return _lookup(writer, cell, facts, writer.ask(facts[0]), align=align)

    return make


def _store(writer: PromptWriter, cell: Cell) -> Example:
    """Facts without filler, as many as fit."""
    facts = writer.facts(cell["length"] // 12, "home", "grid")
    question = writer.ask(facts[0])
    room = writer.room(cell["length"], question.ids)
    stated = [writer.state(fact) for fact in facts]
    while sum(map(len, stated)) > room:
        stated.pop()
    context = writer.compose(stated, 0)
    return Example(context.ids, (question,), context.spans[:1])


def _questions(writer: PromptWriter, cell: Cell) -> Example:
    """Every fact is asked for, each question on the same compressed cache."""
    facts = writer.facts(cell["facts"])
    stated = [writer.state(fact) for fact in facts]
    questions = tuple(writer.ask(fact) for fact in facts)
    context = writer.compose(stated, writer.room(cell["length"], *stated, questions[0].ids))
    return Example(context.ids, questions, context.spans)


def _hops(writer: PromptWriter, cell: Cell) -> Example:
    """The keeper of a thing in one sentence, the keeper's code in another, and the same for three other things."""
    wording = writer.wording
    keepers = writer.facts(4, "keeper")
    codes = [writer.value("code") for _ in keepers]
    stated = []
    for fact, code in zip(keepers, codes, strict=True):
        stated += [writer.state(fact), writer.sentence(wording.tell, keeper=fact.value, value=code)]
    question = writer.question(wording.ask_keeper.format(entity=keepers[0].entity), codes[0])
    context = writer.compose(stated, writer.room(cell["length"], *stated, question.ids))
    return Example(context.ids, (question,), context.spans[:2])


def _distractors(writer: PromptWriter, cell: Cell) -> Example:
    """Other things share the adjective or the noun with the one asked for."""
    facts = writer.facts(1 + cell["others"], sharing="half")
    return _lookup(writer, cell, facts, writer.ask(facts[0]))


def _arithmetic(writer: PromptWriter, cell: Cell) -> Example:
    """Solved sums, then one to solve."""

    def numbers() -> dict[str, str]:
        a, b = 1 + writer.below(4), 1 + writer.below(4)
        c = 1 + writer.below(9)
        product = a * b
        total = product + c if writer.wording.general else a + b
        names = {"person": writer.word("person"), "other": writer.word("person")}
        return names | {"a": f"{a}", "b": f"{b}", "c": f"{c}", "product": f"{product}", "sum": f"{total}"}

    wording = writer.wording
    shots = [writer.piece(wording.shot.format(**numbers())) for _ in range(cell["shots"])]
    last = numbers()
    question = writer.question(
        wording.ask_shot.format(**last), last["sum"], "number", ended=False, room=48, stop="Question"
    )
    context = writer.compose([], 0, head=shots)
    return Example(context.ids, (question,))


def _rule(writer: PromptWriter, cell: Cell) -> Example:
    """A rule at the start: about the fact asked for, or about another one, which must not spoil the answer."""
    facts = writer.facts(2, sharing="half")
    forbidden = cell["about"] == "asked"
    head = writer.rule(facts[0] if forbidden else facts[1])
    question = writer.ask(facts[0], word_lists.REFUSAL if forbidden else None, scoring="refusal" if forbidden else None)
    stated = [writer.state(fact) for fact in facts]
    context = writer.compose(stated, writer.room(cell["length"], head, *stated, question.ids), head=[head])
    start = next(i for i in range(len(context.ids)) if list(context.ids[i : i + len(head)]) == head)
    return Example(context.ids, (question,), ((start, start + len(head)), context.spans[0]))


def _count(writer: PromptWriter, cell: Cell) -> Example:
    """How often one sentence occurs: every occurrence counts, so nothing can be dropped."""
    times = 2 + writer.below(7)
    stated = [writer.sentence("a whistle blew in the {place} .", place=writer.word("place")) for _ in range(times)]
    question = writer.question(
        "\n\nQuestion : How often did a whistle blow in the text ? Reply with a number only .\nAnswer :",
        f"{times}",
        "number",
        room=8,
    )
    context = writer.compose(stated, writer.room(cell["length"], *stated, question.ids))
    return Example(context.ids, (question,), context.spans)


def _dense(writer: PromptWriter, cell: Cell) -> Example:
    """Facts of one token each, scattered: a chunk spends all its tokens to keep one of them."""
    wording = writer.wording
    entities = writer.entities(cell["facts"])
    values = [writer.word("digit") for _ in entities]
    stated, questions = [], []
    for entity, value in zip(entities, values, strict=True):
        stated.append(writer.sentence(wording.number, entity=entity, value=value))
        text = wording.ask_number.format(entity=entity)
        questions.append(writer.question(text, value, ended=False))
    ends = tuple(token for question in questions for token in question.ids)
    context: ComposedText = writer.compose(stated, writer.room(cell["length"], *stated, ends))
    spans = tuple((end - 2, end - 1) for _, end in context.spans)
    return Example(context.ids, tuple(questions), spans, announcement=ends)


def make_suites(settings: ChunkKVSettings) -> dict[str, Suite]:
    """Return the generated suites by name; `settings` tell suite "straddle" where the engine's chunks begin."""
    suites = (
        Suite("needle", "one fact, by depth and length", _crossed("depth", DEPTHS), _needle),
        Suite("recall", "answers of 2 to 14 words", _crossed("answer", RECALL_ANSWERS), _recall),
        Suite("digits", "answers of 1 to 32 digits", _crossed("digits", DIGITS), _digits),
        Suite("straddle", "a fact by where it begins in a chunk", _straddle_cells, _straddle(settings)),
        Suite("store", "a key-value store without filler", _by_length, _store),
        Suite("questions", "every one of several facts asked for", _crossed("facts", (2, 8)), _questions),
        Suite("hops", "two facts that lead to the answer", _by_length, _hops),
        Suite("distractors", "near-duplicates of the key", _crossed("others", (1, 3, 7)), _distractors),
        Suite("arithmetic", "solved sums, then one to solve", lambda *_: [{"shots": n} for n in (8, 24)], _arithmetic),
        Suite("rule", "an instruction at the start", _crossed("about", ("asked", "another")), _rule),
        Suite("count", "how often a sentence occurs", _by_length, _count, general=True),
        Suite("dense", "many facts of one token: chunks lose", _crossed("facts", (2, 4)), _dense),
    )
    return {suite.name: suite for suite in suites}
