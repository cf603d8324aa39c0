"""What is asked of a prompt, and how an answer is judged."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

import numpy as np

SCORINGS = ("exact", "contains", "number", "refusal")
REFUSALS = (
    "must not",
    "cannot",
    "can't",
    "can not",
    "will not",
    "won't",
    "unable to",
    "not able to",
    "refuse",
)
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


@dataclass(frozen=True)
class Question:
    """A question and the answer that is expected.

    Parameters
    ----------
    ids : tuple[int, ...]
        The question's token ids; empty where it stands in the prompt already.
    answer : str
        The expected answer as text.
    answer_ids : tuple[int, ...]
        The expected answer as token ids, with the end token where nothing may follow it.
    max_new_tokens : int
        Most tokens of an answer.
    scoring : {"exact", "contains", "number", "refusal"}, default "exact"
        "exact" compares the token ids; "contains" looks for `answer` in the text; "number" compares the text's last
        number with `answer`; "refusal" looks for any of REFUSALS.
    stop : str, default ""
        Text behind its first occurrence does not count; empty for none. Not for "exact".
    """

    ids: tuple[int, ...]
    answer: str
    answer_ids: tuple[int, ...]
    max_new_tokens: int
    scoring: str = "exact"
    stop: str = ""

    def is_settled(self, token_ids: list[int]) -> bool:
        """Return whether the tokens so far decide the score, so that no more are needed."""
        if self.scoring != "exact":
            return False
        return token_ids != list(self.answer_ids[: len(token_ids)]) or len(token_ids) >= len(self.answer_ids)

    def pieces(self) -> int:
        """Return how many parts `right_through` counts: tokens, words, or characters of a single word."""
        return len(self.answer_ids) if self.scoring == "exact" else len(_parts(self.answer)[0])

    def right_through(self, token_ids: list[int], text: str) -> int:
        """Return how many parts of the answer, from its first on, are right without a gap; all of them = right."""
        if self.scoring == "exact":
            same = [token == expected for token, expected in zip(token_ids, self.answer_ids, strict=False)]
            return same.index(False) if False in same else len(same)
        text = text.split(self.stop, maxsplit=1)[0] if self.stop else text
        parts, glue = _parts(self.answer)
        if self.scoring == "refusal":
            return len(parts) if any(word in _folded(text) for word in REFUSALS) else 0
        if self.scoring == "number":
            numbers = _NUMBER.findall(text)
            return len(parts) if numbers and number(numbers[-1]) == number(self.answer) else 0
        folded = _folded(text)
        complete = len(parts) if _stands_in(glue.join(parts), folded, whole=True) else 0
        return max(complete, *(count for count in range(len(parts)) if _stands_in(glue.join(parts[:count]), folded)))

    def is_right(self, token_ids: list[int], text: str) -> bool:
        """Return whether the answer counts as right."""
        return self.right_through(token_ids, text) == self.pieces()


PromptAndQuestions = tuple[np.ndarray, tuple[Question, ...]]  # token ids [L] int64, and what is asked of them


@dataclass(frozen=True)
class Example:
    """A context and the questions about it.

    Parameters
    ----------
    context : tuple[int, ...]
        Token ids [L].
    questions : tuple[Question, ...]
        At least one.
    spans : tuple[tuple[int, int], ...], default ()
        The [first, end) positions of the tokens that hold the answers.
    announcement : tuple[int, ...], default ()
        Token ids that end the prompt in mode "in" instead of the first question, where several questions are announced
        together.
    """

    context: tuple[int, ...]
    questions: tuple[Question, ...]
    spans: tuple[tuple[int, int], ...] = ()
    announcement: tuple[int, ...] = field(default=())

    def prompt(self, mode: str) -> PromptAndQuestions:
        """Return the prompt [L] int64 that is compressed, and the questions that follow it.

        Mode "after" compresses the context alone; mode "in" puts the announcement, or else the first question, behind
        it.
        """
        if mode == "after":
            return np.array(self.context, np.int64), self.questions
        if self.announcement:
            return np.array([*self.context, *self.announcement], np.int64), self.questions
        first, *others = self.questions
        return np.array([*self.context, *first.ids], np.int64), (replace(first, ids=()), *others)


def _folded(text: str) -> str:
    """Return a text in lower case, with single blanks and plain apostrophes."""
    return " ".join(text.lower().replace("’", "'").split())


def _parts(answer: str) -> tuple[list[str], str]:
    """Return the words of an answer, or the characters of a single word, and what stands between two of them."""
    words = _folded(answer).split()
    return (words, " ") if len(words) > 1 else (list(words[0]) if words else [], "")


def _stands_in(part: str, text: str, whole: bool = False) -> bool:
    """Return whether `part` stands in `text`, not within a longer number.

    A part of an answer may end within a number; only the whole answer may not.
    """
    start = r"(?<!\d)" if part[:1].isdigit() else ""
    end = r"(?!\d)" if whole and part[-1:].isdigit() else ""
    return re.search(start + re.escape(part) + end, text) is not None


def number(text: str) -> float | None:
    """Return the value of a text that is a number, such as "1,200" or "-3.5"; None for any other."""
    return float(text.replace(",", "")) if _NUMBER.fullmatch(text.strip()) else None
