"""Questions on real text: a planted code, a planted keeper, and a passage of the text itself to repeat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from chunkkv.errors import ConfigError
from chunkkv.evaluation.texts import word_lists
from chunkkv.evaluation.texts.real_texts import Passage, RealText, cut_passage

TASKS = ("code", "keeper", "copy")
FACTS = 2  # planted of each kind; the first one is asked for, the others are near-duplicates
COPIED_TOKENS = 16
# Words of a passage that is asked for, and the least share of letters in them: the first that some line has.
_QUOTED = ((6, 2 / 3), (4, 2 / 3), (4, 1 / 2))
_TRIES = 20  # passages that are drawn until one has a sentence to ask for
_CITIES = tuple(
    """Porto Bergen Geneva Tallinn Verona Lisbon Dublin Ghent Krakow Malaga Naples Odessa Prague Riga Seville Turin
    Utrecht Vienna Zagreb Athens Bristol Cadiz Dresden Florence Genoa Hamburg Leipzig Milan Nantes Oslo""".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Task:
    """One question about a passage.

    Parameters
    ----------
    name : str
        One of TASKS.
    question : str
        What stands behind the passage, with the blank line before it.
    lead : str
        How a complete answer begins; it is given, and does not count.
    answer : str
        What follows the lead in a right answer.
    span : tuple[int, int]
        The [first, end) characters of the passage that hold the answer.
    """

    name: str
    question: str
    lead: str
    answer: str
    span: tuple[int, int]


@dataclass(frozen=True)
class PassageWithTasks:
    """A passage and one task of each of TASKS, in their order; plain passages of a user's own text have `copy` only."""

    passage: Passage
    tasks: tuple[Task, ...]


def make_tasks(
    source: RealText,
    tokens: int,
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
    random: np.random.Generator,
    plant: bool = True,
) -> PassageWithTasks:
    """Return a passage of at most `tokens` tokens with its tasks.

    Parameters
    ----------
    source : RealText
        Where the passage is cut.
    tokens : int
        Most tokens of the passage.
    encode, decode : callable
        Token ids of a text, without special tokens, and back.
    random : numpy.random.Generator
        Where all choices come from.
    plant : bool, default True
        Whether facts are planted; without them only `copy` is asked.

    Raises
    ------
    ConfigError
        For a text without a stretch of that length, or without a passage to repeat.
    """
    codes, keepers = (_facts(random, kind) for kind in ("code", "keeper"))
    stated = [*codes, *keepers] if plant else []
    statements = [f"{lead}{answer}." for _, lead, answer in stated]
    for _ in range(_TRIES):
        passage = cut_passage(source, tokens, lambda text: len(encode(text)), random, statements)
        copied = _copy_task(passage, source, encode, decode, random)
        if copied is not None:
            break
    else:
        raise ConfigError(f"the text ({source.kind}) has no sentence that could be asked for; give another text")
    tasks = []
    for kind, number in (("code", 0), ("keeper", FACTS)) if plant else ():
        question, lead, answer = stated[number]
        tasks.append(Task(kind, question, lead, answer, passage.spans[number]))
    return PassageWithTasks(passage, (*tasks, copied))


def _facts(random: np.random.Generator, kind: str) -> list[tuple[str, str, str]]:
    """Return question, beginning of the statement, and value of facts about different things."""

    def word(values: tuple[str, ...]) -> str:
        return values[int(random.integers(len(values)))]

    adjectives = random.permutation(word_lists.ADJECTIVES)[:FACTS]
    nouns = random.permutation(word_lists.NOUNS)[:FACTS]
    facts = []
    for adjective, noun in zip(adjectives, nouns, strict=True):
        thing = f"{adjective} {noun}"
        if kind == "code":
            value = "".join(word(word_lists.DIGITS) for _ in range(5))
            facts.append((f"\n\nWhat is the access code of the {thing}?", f"The access code of the {thing} is ", value))
        else:
            name = f"{word(word_lists.FIRST_NAMES).capitalize()} {word(word_lists.LAST_NAMES).capitalize()}"
            value = f"{name} of {word(_CITIES)}"
            facts.append((f"\n\nWho is the keeper of the {thing}?", f"The keeper of the {thing} is ", value))
    return facts


def _copy_task(
    passage: Passage,
    source: RealText,
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
    random: np.random.Generator,
) -> Task | None:
    """Return the task to repeat what follows some words that stand once in the passage; None where there are none."""
    cuts = RealText(source.kind, passage.text, source.comment).cuts
    places = random.permutation(cuts).tolist()
    for quoted, letters, place in ((*how, place) for how in _QUOTED for place in places):
        rest = passage.text[place:]
        words = rest.split(maxsplit=quoted)
        if len(words) <= quoted:
            continue
        lead = rest[: len(rest) - len(words[-1])].rstrip()
        answer = decode(encode(rest[len(lead) :])[:COPIED_TOKENS])
        start = place + len(lead)
        end = start + len(answer)
        overlaps = any(first < end + 20 and place - 20 < last for first, last in passage.spans)
        plain = sum(character.isalpha() for character in lead) > len(lead) * letters
        if overlaps or not plain or "\n" in lead or passage.text.count(lead) > 1 or end > len(passage.text):
            continue
        question = f'\n\nRepeat the passage that begins with "{lead.strip()}".'
        return Task("copy", question, lead.lstrip(), answer, (start, end))
    return None
