"""The 1024 words of the needle model, and its tokenizer.

Texts of this model are built as token ids; `tokenizer.json` gives the same ids for the same text.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

VOCABULARY_SIZE: Final = 1024

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIAL: Final = (PAD, BOS, EOS, UNK)
PUNCTUATION: Final = (".", ",", ":", ";", "?", "!", "\n")
DIGITS: Final = tuple("0123456789")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES: Final = _words(
    """amber ancient azure bold brass brave bright broken bronze calm clever coarse cold copper coral crimson crooked
    curious dark distant dusty eager early empty faded faithful fierce fragile frozen gentle gilded golden grand green
    grey hidden hollow humble iron ivory jade jolly late little lonely loyal lucky marble mellow misty modest narrow
    noble olive pale patient plain proud purple rapid rough sacred"""
)
NOUNS: Final = _words(
    """anchor anvil archive badge barrel basket beacon bell bottle bridge bucket cabin camera candle carpet cart castle
    chapel chest clock compass crane crown curtain dagger desk drum engine fountain furnace garden gate globe hammer
    harp helmet kettle kite ladder lantern ledger lens lever locker loom mirror needle oven paddle piano pillar pump
    quilt saddle sail shelf shovel spindle statue tower trunk tunnel violin wagon"""
)
FIRST_NAMES: Final = _words(
    """ada agnes albert amos anna arthur bella boris clara conrad dora edgar edith elias elsa emil ezra fanny felix
    flora greta gustav hanna hector helga hugo ida igor irene ivan jonas julia karl klara leo lena magda marta milo
    nadia nina oscar otto paula petra rosa rufus selma"""
)
LAST_NAMES: Final = _words(
    """abbott adler barlow becker bishop brandt carver cole conway dalton dawson draper ellis farrow fisher foster
    fuller gibson glover graham harper hayes holt hooper ingram jensen keller kramer larsen lowell marsh mercer miller
    nolan norris osborn parker porter quinn ramsey reeves sawyer sutton tanner thorne turner vance weaver"""
)
DIRECTIONS: Final = _words("north south east west upper lower central outer")
STREETS: Final = _words(
    """acorn alder apple ash aspen beech birch briar cedar cherry chestnut clover cypress daisy elder elm fern fig
    hazel heather holly ivy juniper larch laurel lilac lily linden maple moss myrtle nettle oak orchid palm pear pine
    plum poplar poppy reed rose rowan sage spruce thistle walnut willow"""
)
STREET_KINDS: Final = _words("street road lane avenue square court terrace walk")
VERBS: Final = _words(
    """admired bought borrowed carried cleaned described examined found ignored lifted mended moved noticed opened
    ordered painted photographed polished repaired sketched sold studied tested weighed"""
)
PLACES: Final = _words(
    """airport bakery bank barn beach cafe canteen cellar church clinic college factory farm forest gallery harbour
    hospital hotel island kitchen library market meadow mill museum office palace park prison quarry river school
    shop stable stadium station studio theatre village warehouse"""
)
TIMES: Final = _words(
    """morning afternoon evening night spring summer autumn winter monday tuesday wednesday thursday friday saturday
    sunday weekend"""
)

FILLER: Final = (
    "{person} {verb} the {adjective} {noun} in the {place} .",
    "in the {time} the {place} was quiet and {person} went home .",
    "the {noun} near the {place} looked {adjective} to {person} .",
    "{person} and {person} met at the {place} in the {time} .",
    "there were {digit} {adjective} boxes in the {place} .",
    "a {adjective} {noun} stood beside the {place} all {time} .",
    "the train to the {place} left {digit} minutes late .",
    "{person} waited {digit} hours for the {adjective} {noun} .",
    "nobody at the {place} had seen the {noun} since {time} .",
    "it rained over the {place} , so {person} stayed inside .",
    "the report from the {place} was {digit} {digit} pages long .",
    "{person} {verb} a {noun} , then {verb} a {noun} .",
    "after the {time} , {person} {verb} the {noun} again .",
    "the {adjective} door of the {place} was open in the {time} .",
    "{person} told {person} about the {adjective} {place} .",
    "people said that the {place} had a {adjective} {noun} .",
    "the price of the {noun} rose to {digit} {digit} coins .",
    "every {time} {person} walked from the {place} to the {place} .",
    "the {place} sold {digit} {noun} parts in the {time} .",
    "why did {person} leave the {noun} at the {place} ?",
)
KINDS: Final = {"code": "access code", "home": "home", "keeper": "keeper"}
LEAD_INS: Final = ("please note that", "remember that", "it is known that", "by the way ,", "for the record ,")
RULE: Final = "rule : never tell the {kind} of the"
REFUSAL: Final = "i must not tell that ."
QUESTION: Final = "question : what is the {kind} of the"
SENTENCE_QUESTION: Final = "question : say in a sentence the {kind} of the"
LIST_START, LIST_AGAIN = "list :", "again :"


def _all_words() -> list[str]:
    words = [*SPECIAL, *PUNCTUATION, *DIGITS]
    for group in (ADJECTIVES, NOUNS, FIRST_NAMES, LAST_NAMES, DIRECTIONS, STREETS, STREET_KINDS, VERBS, PLACES, TIMES):
        words.extend(group)
    templates = (
        *FILLER,
        *KINDS.values(),
        *LEAD_INS,
        RULE,
        REFUSAL,
        QUESTION,
        SENTENCE_QUESTION,
        LIST_START,
        LIST_AGAIN,
    )
    for template in templates:
        words.extend(word for word in template.split() if not word.startswith("{"))
    words.extend(["answer", "the"])
    unique = list(dict.fromkeys(words))
    return unique + [f"<spare_{i}>" for i in range(VOCABULARY_SIZE - len(unique))]


WORDS: Final = tuple(_all_words())
TOKEN_ID: Final = {word: index for index, word in enumerate(WORDS)}
PAD_ID, BOS_ID, EOS_ID, UNK_ID = (TOKEN_ID[word] for word in SPECIAL)


def ids_of(text: str) -> list[int]:
    """Token ids of words written with a blank between any two tokens; raises KeyError for a word the model lacks."""
    return [TOKEN_ID[word] for word in text.split()]


def build_tokenizer() -> Tokenizer:
    """The tokenizer of the model: lower case; one token per word, digit, punctuation mark or inner line break."""
    tokenizer = Tokenizer(models.WordLevel(TOKEN_ID, unk_token=UNK))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\d|[^\W\d]+|[^\w\s]"), behavior="removed", invert=True)
    # WordPiece's decoder puts the blanks between words and removes those before . , ? !
    tidy = [(" :", ":"), (" ;", ";"), (" \n", "\n"), ("\n ", "\n"), (Regex(r"(?<=\d) (?=\d)"), "")]
    tokenizer.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix="##", cleanup=True), decoders.Fuse(), *(decoders.Replace(a, b) for a, b in tidy)]
    )
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    return tokenizer


_TOKENIZER: Final = build_tokenizer()


def text_of(token_ids: list[int]) -> str:
    """The text of token ids, without special tokens, as the tokenizer writes it."""
    return _TOKENIZER.decode(token_ids, skip_special_tokens=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name, then renames it, so that no reader sees half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
