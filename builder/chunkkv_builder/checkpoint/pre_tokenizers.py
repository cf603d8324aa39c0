"""How byte-level tokenizers split a text before they merge: the rules that GGUF files refer to by name.

A rule is written as in tokenizer.json. The patterns are those of the models' own tokenizers; "default" is llama.cpp's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CASELESS_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = (
    _CASELESS_SUFFIXES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _CASELESS_SUFFIXES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """What comes before the merges of a byte-level tokenizer.

    Parameters
    ----------
    steps : tuple of dict
        The entries of a tokenizer.json's pre-tokenizer, in order.
    normalizer : str or None, default None
        Unicode normal form that a text is brought into, "NFC" or None.
    ignore_merges : bool, default False
        Whether a piece that is a token is taken whole, whatever the merges say.
    begins : bool, default False
        Whether a text gets the begin token where the file does not say.
    """

    steps: tuple[dict[str, Any], ...]
    normalizer: str | None = None
    ignore_merges: bool = False
    begins: bool = False


def _bytes(splits_words: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": splits_words}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_GPT2 = PreTokenizer((_bytes(splits_words=True),))
_LLAMA_BPE = PreTokenizer((_split(_LLAMA3), _bytes(splits_words=False)), ignore_merges=True, begins=True)
PRE_TOKENIZERS = {
    "default": PreTokenizer(
        (
            _split(r"[\p{P}\$\+<=>\^~\|]+"),
            _split(_WORDS),
            _split(r"\p{N}+"),
            _split("[0-9][0-9][0-9]"),
            _bytes(splits_words=False),
        )
    ),
    "gpt-2": _GPT2,
    "gpt2": _GPT2,
    "smollm": PreTokenizer(({"type": "Digits", "individual_digits": True}, _bytes(splits_words=True))),
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "llama-bpe": _LLAMA_BPE,
    "qwen2": PreTokenizer((_split(_QWEN2), _bytes(splits_words=False)), normalizer="NFC"),
    "deepseek-r1-qwen": PreTokenizer((_split(_QWEN2), _bytes(splits_words=False))),
    "tekken": PreTokenizer((_split(_TEKKEN), _bytes(splits_words=False)), ignore_merges=True, begins=True),
}
