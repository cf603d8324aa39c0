"""The 1024 words of the needle model, and its tokenizer.

Texts of this model are built as token ids; `tokenizer.json` gives the same ids for the same text.
"""

from __future__ import annotations

from typing import Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from chunkkv.evaluation.texts.word_lists import (
    ADJECTIVES,
    DIGITS,
    DIRECTIONS,
    FILLER,
    FIRST_NAMES,
    KINDS,
    LAST_NAMES,
    NOUNS,
    PLACES,
    QUESTION,
    REFUSAL,
    RULE,
    SENTENCE_QUESTION,
    STREET_KINDS,
    STREETS,
    TIMES,
    VERBS,
)

VOCABULARY_SIZE: Final = 1024

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIAL: Final = (PAD, BOS, EOS, UNK)
PUNCTUATION: Final = (".", ",", ":", ";", "?", "!", "\n")


LEAD_INS: Final = ("please note that", "remember that", "it is known that", "by the way ,", "for the record ,")
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
    tidy: list[tuple[str | Regex, str]] = [(" :", ":"), (" ;", ";"), (" \n", "\n"), ("\n ", "\n")]
    tidy.append((Regex(r"(?<=\d) (?=\d)"), ""))
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
