"""The tokens of a GGUF file: ids, types, special tokens, and the merges that build the others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from chunkkv.engine.fields import Fields, shown
from chunkkv.errors import CheckpointError

UNDEFINED, NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(7)
_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_NO_ID = 2**32 - 1  # what some converters write for "none"
# Special tokens that end a turn or a text in the models of today; many files state only one of theirs.
_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>")
_LONGEST_PIECE = 512  # characters; a longer one has too many pairs of parts to look up
_DAMAGED = "the file is damaged: convert the model again"


class Vocabulary:
    """The tokens of a GGUF file; those of type UNUSED and those without text, which no text leads to, are left out.

    Parameters
    ----------
    fields : Fields
        The metadata under "tokenizer.ggml".

    Raises
    ------
    CheckpointError
        For tokens, types or ids that are missing, contradict each other or appear twice.

    Attributes
    ----------
    ids : dict[str, int]
        Id of each token, by its text.
    """

    def __init__(self, fields: Fields) -> None:
        self._fields = fields
        self._tokens = fields.texts("tokens")
        count = len(self._tokens)
        self._types = (NORMAL,) * count
        if fields.get("token_type") is not None:
            self._types = fields.integers("token_type", UNDEFINED, BYTE, count)
        self.ids: dict[str, int] = {}
        for number, (token, kind) in enumerate(zip(self._tokens, self._types, strict=True)):
            if kind != UNUSED and token and self.ids.setdefault(token, number) != number:
                raise CheckpointError(
                    f"{fields.source}: tokens {self.ids[token]} and {number} are both {shown(token)}; {_DAMAGED}"
                )

    def special_tokens(self, defaults: Mapping[str, int]) -> dict[str, str]:
        """Return the text of each named special token; `defaults` are ids of roles that the file does not state."""
        special = {}
        for role, key in _ROLES.items():
            number = self._id(key, defaults.get(role))
            if number is not None:
                special[role] = self._tokens[number]
        return special

    def end_ids(self, eos_token: str | None) -> tuple[int, ...]:
        """Return the tokens that end an answer, that of `eos_token` first."""
        stated = [self._id(key, None) for key in _END_KEYS]
        known = [self.ids[text] for text in _ENDS if text in self.ids and self._types[self.ids[text]] == CONTROL]
        first = [] if eos_token is None else [self.ids[eos_token]]
        return tuple(dict.fromkeys(number for number in (*first, *stated, *known) if number is not None))

    def added_tokens(self) -> list[dict[str, Any]]:
        """Return the tokens that are found in a text before it is split, as in tokenizer.json."""
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return [
            {"id": number, "content": token, **flags, "special": kind != USER_DEFINED}
            for number, (token, kind) in enumerate(zip(self._tokens, self._types, strict=True))
            if kind in (UNKNOWN, CONTROL, USER_DEFINED) and token
        ]

    def stated_merges(self) -> list[tuple[str, str]]:
        """Return the merges that the file lists, the most urgent first."""
        merges = []
        for text in self._fields.texts("merges"):
            space = text.find(" ", 1)
            left, right = text[:space], text[space + 1 :]
            if space < 0 or not {left, right, left + right} <= self.ids.keys():
                raise CheckpointError(
                    f"{self._fields.source}: the merge {shown(text)} is not of two tokens into a third; {_DAMAGED}"
                )
            merges.append((left, right))
        return merges

    def merges_by_score(self) -> list[tuple[str, str]]:
        """Return merges that do what SentencePiece does: join the pair whose whole has the highest score.

        Every way to build a token of two others is a merge. Of merges with the same score the one with the longer left
        part comes first, as in the tokenizer.json that transformers makes of a SentencePiece model.
        """
        if len(scores := self._scores()) != len(self._tokens):
            raise self._fields.error("scores", f"expected one number for each of {len(self._tokens)} tokens")
        normal = {token: number for token, number in self.ids.items() if self._types[number] == NORMAL}
        ranked = []
        for token, number in normal.items():
            if len(token) > _LONGEST_PIECE:
                raise CheckpointError(
                    f"{self._fields.source}: token {number} has {len(token)} characters; expected at most "
                    f"{_LONGEST_PIECE}: {_DAMAGED}"
                )
            parts = ((token[:end], token[end:]) for end in range(1, len(token)))
            ranked += [
                (-scores[number], -len(left), -len(right), left, right)
                for left, right in parts
                if left in normal and right in normal
            ]
        return [(left, right) for *_, left, right in sorted(ranked)]

    def _scores(self) -> list[float]:
        scores = self._fields.items("scores")
        # NaN would leave the order of the merges to chance.
        if not all(isinstance(score, float) and not math.isnan(score) for score in scores):
            raise self._fields.error("scores", "expected a list of numbers")
        return scores

    def _id(self, key: str, default: int | None) -> int | None:
        number = self._fields.integer(key, low=0, high=_NO_ID, default=default)
        if number is None or number == _NO_ID:
            return None
        if number >= len(self._tokens) or self.ids.get(self._tokens[number]) != number:
            raise self._fields.error(key, f"expected the id of one of {len(self._tokens)} tokens: {_DAMAGED}")
        return number
