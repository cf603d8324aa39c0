"""Where the question of a conversation begins: what observes the document that it is about."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*")


def question_start(messages: Sequence[Mapping[str, Any]], rendered: str) -> int | None:
    """Return where in `rendered`, the conversation as text, the last sentence or sentences of the user begin.

    They are the last sentence with a question mark in the last paragraph and everything behind it; else the last
    sentence. None where the last message of the user is no text, or is not in `rendered` as it is.
    """
    content = next((message.get("content") for message in reversed(messages) if message.get("role") == "user"), None)
    if not isinstance(content, str) or not content.strip():
        return None
    content = content.strip()
    place = rendered.rfind(content)
    if place < 0:
        return None
    paragraph = content.rfind("\n") + 1
    starts = [paragraph, *(end.end() for end in _SENTENCE_END.finditer(content, paragraph) if end.end() < len(content))]
    ends = [*starts[1:], len(content)]
    asking = [
        start for start, end in zip(starts, ends, strict=True) if content[start:end].rstrip().endswith(("?", "？"))
    ]
    return place + (asking or starts)[-1]
