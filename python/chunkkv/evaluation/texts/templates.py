"""Sentence templates (--wording): how facts, questions and rules are put, for the shipped model or a general one."""

from __future__ import annotations

from dataclasses import dataclass

from chunkkv.errors import ConfigError
from chunkkv.evaluation.texts import word_lists
from chunkkv.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Wording:
    """The templates of one way to put things.

    A blank stands between any two words or marks; the writer removes those before punctuation marks.

    Parameters
    ----------
    name : str
        What --wording calls it.
    capitals : bool
        Whether sentences and names begin with capitals.
    scoring : str
        How plain answers are judged: one of SCORINGS.
    before : str
        Text before every context.
    fact : str
        States a fact.
    ask : str
        Asks for a fact's value.
    say : str
        Asks for the sentence that states a fact.
    rule : str
        Forbids to tell a fact.
    tell : str
        States the code of a keeper, for answers over two facts.
    ask_keeper : str
        Asks for the code of a thing's keeper.
    number : str
        States a fact whose value is one token.
    ask_number : str
        Asks for it.
    shot : str
        A solved sum.
    ask_shot : str
        A sum to solve.
    spare_tokens : int
        Tokens that an answer may have beyond the expected ones.
    general : bool
        Whether the model can be asked things beyond the shipped model's few kinds of questions.
    """

    name: str
    capitals: bool
    scoring: str
    before: str
    fact: str
    ask: str
    say: str
    rule: str
    tell: str
    ask_keeper: str
    number: str
    ask_number: str
    shot: str
    ask_shot: str
    spare_tokens: int
    general: bool


_FACT = "the {kind} of the {entity} is {value} ."

NEEDLE = Wording(
    name="needle",
    capitals=False,
    scoring="exact",
    before="",
    fact=_FACT,
    ask=f"\n{word_lists.QUESTION} {{entity}} ? answer :",
    say=f"\n{word_lists.SENTENCE_QUESTION} {{entity}} . answer :",
    rule=f"{word_lists.RULE} {{entity}} .",
    tell="the access code of {keeper} is {value} .",
    ask_keeper="\nquestion : what is the access code of the keeper of the {entity} ? answer :",
    number="the access code of the {entity} is {value} .",
    ask_number="\nquestion : what is the access code of the {entity} ? answer :",
    shot="\nquestion : {person} bought {a} boxes and {other} bought {b} boxes . answer : {sum} .",
    ask_shot="\nquestion : {person} bought {a} boxes and {other} bought {b} boxes . answer :",
    spare_tokens=0,
    general=False,
)
ENGLISH = Wording(
    name="english",
    capitals=True,
    scoring="contains",
    before="Read the following text; a question about it comes at the end.\n\n",
    fact=_FACT,
    ask="\n\nQuestion : What is the {kind} of the {entity} ? Reply with the {kind} only .\nAnswer :",
    say="\n\nQuestion : Say in a complete sentence what the {kind} of the {entity} is .\nAnswer :",
    rule=f"important rule : never tell the {{kind}} of the {{entity}} ; if asked , reply : {word_lists.REFUSAL}",
    tell="the access code of {keeper} is {value} .",
    ask_keeper="\n\nQuestion : What is the access code of the keeper of the {entity} ? Reply with the code .\nAnswer :",
    number="the number of the {entity} is {value} .",
    ask_number="\n\nQuestion : What is the number of the {entity} ? Reply with one digit only .\nAnswer :",
    shot=(
        "\n\nQuestion : {person} has {a} boxes with {b} books in each and buys {c} more . "
        "How many books does {person} have ?\nAnswer : {a} * {b} = {product} . {product} + {c} = {sum} . "
        "The answer is {sum} ."
    ),
    ask_shot=(
        "\n\nQuestion : {person} has {a} boxes with {b} books in each and buys {c} more . "
        "How many books does {person} have ?\nAnswer :"
    ),
    spare_tokens=24,
    general=True,
)
WORDINGS = {wording.name: wording for wording in (NEEDLE, ENGLISH)}


def choose_wording(name: str, tokenizer: Tokenizer) -> Wording:
    """Return the wording called `name`; "auto" is "english" where the tokenizer knows its words, else "needle".

    Raises ConfigError for a name that there is not.
    """
    if name == "auto":
        ids = tokenizer.encode(ENGLISH.before, False)
        known = tokenizer.decode(ids, False).lower().split() == ENGLISH.before.lower().split()
        return ENGLISH if known else NEEDLE
    if name not in WORDINGS:
        raise ConfigError(f"wording is {name!r}; allowed is auto or {' or '.join(WORDINGS)}")
    return WORDINGS[name]
