"""What a test asks of an error's message: the names and values in it, not the words between them."""

from __future__ import annotations

import re


def naming(*parts: object) -> str:
    """Return a pattern for `match=`: each part stands in the message as a word of its own, in whatever order.

    A string is split at its spaces, so `naming("window 129 1 128")` asks for a name, a value and what is allowed.
    """
    words = [word for part in parts for word in str(part).split()]
    assert words, "a message without names or values would match anything"
    return "(?s)" + "".join(rf"(?=.*(?<![\w-])(?<!\d\.){_spaced(word)}(?!\w|\.\d))" for word in words)


def _spaced(word: str) -> str:
    return re.escape(word).replace(",", r",\s*")  # [0,1] is [0, 1] too
