"""What a context was made from, and how a text goes on behind it: the tokens of both together are those of one text.

Two rules make a continuation exact. The tokens of a conversation are cut where every later message leaves them as they
are, so the end of the last message is left out. And what follows is rendered or encoded together with what the context
was made from; the tokens that the context holds are then taken off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from chunkkv.errors import RequestError
from chunkkv.requests import Message, Prompt
from chunkkv.text.tokenizer import Tokenizer

_BETWEEN = "\n\n"  # between the text of a user message and a question that is added to it
# Two texts that begin with different tokens: what is the same behind both does not depend on what follows.
_PROBES = ("a", "7")
_LARGEST_END = 32  # tokens that a template may write behind the last message


@dataclass(frozen=True)
class Origin:
    """What a context was made from; at most one of the two is set, none where token ids were given.

    Parameters
    ----------
    text : str or None, default None
        A text.
    messages : tuple of mappings or None, default None
        The messages of a conversation.
    """

    text: str | None = None
    messages: tuple[Message, ...] | None = None

    def begin(self, tokenizer: Tokenizer | None, add_special_tokens: bool) -> list[int]:
        """Return the token ids that stay the same whatever follows; the model's begin token is among them."""
        if tokenizer is None:
            raise RequestError("this engine was built without a tokenizer; give token ids instead of text")
        if self.messages is not None:
            return _stable_chat_ids(tokenizer, self.messages)
        assert self.text is not None
        if not self.text.strip():
            raise RequestError("the prompt is empty; give at least one word")
        return _without_end(tokenizer, self.text, add_special_tokens)

    def followed_by(self, prompt: Prompt) -> Origin:
        """Return what `prompt` makes of it; token ids leave nothing that could be rendered again.

        Text behind messages is a user message. Where the last message is the user's, it becomes a part of it, because
        many chat templates refuse two user messages in a row.
        """
        if isinstance(prompt, str):
            if self.messages is not None:
                return Origin(messages=_with_user_text(self.messages, prompt))
            return Origin(None if self.text is None else self.text + prompt)
        if is_messages(prompt):
            if self.messages is None:
                raise RequestError(
                    "messages were given behind a context that was made from text or token ids: give text or token "
                    "ids, or compress messages"
                )
            return Origin(messages=(*self.messages, *cast("Sequence[Message]", prompt)))
        return Origin()


def origin_of(prompt: Prompt) -> Origin:
    """Return the Origin of a prompt."""
    if isinstance(prompt, str):
        return Origin(text=prompt)
    if is_messages(prompt):
        return Origin(messages=tuple(cast("Sequence[Message]", prompt)))
    return Origin()


def is_messages(prompt: Prompt) -> bool:
    """Return whether a prompt is the messages of a conversation."""
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def continuation_ids(
    origin: Origin, held: np.ndarray, prompt: Prompt, tokenizer: Tokenizer | None, answers: bool
) -> list[int] | np.ndarray:
    """Return the token ids of `prompt` behind a context.

    Raises RequestError where the chat template does not leave the context's tokens as they are.

    Parameters
    ----------
    origin : Origin
        What the context was made from.
    held : numpy.ndarray
        The token ids of the context [L] int64.
    prompt : str, sequence of int or sequence of mappings
        What follows.
    tokenizer : Tokenizer or None
        None refuses text.
    answers : bool
        Whether an answer follows: conversations then end with the header of the answer. Otherwise they end where any
        later message leaves the tokens as they are.
    """
    joined = origin.followed_by(prompt)
    if not isinstance(prompt, str) and not is_messages(prompt):
        return cast("list[int] | np.ndarray", prompt)
    if tokenizer is None:
        raise RequestError("this engine was built without a tokenizer; give token ids instead of text")
    if joined.messages is not None:
        whole = tokenizer.encode_chat(joined.messages) if answers else _stable_chat_ids(tokenizer, joined.messages)
        if (at := shared_tokens(held, whole)) < len(held):
            raise RequestError(
                f"the chat template does not go on with the conversation of the context: it writes another token at "
                f"position {at} of {len(held)}; compress all messages again, or give token ids"
            )
        return whole[len(held) :]
    assert isinstance(prompt, str)
    if joined.text is not None:
        whole = _without_end(tokenizer, joined.text, add_special_tokens=bool(len(held)) and _begins(tokenizer, held))
        if shared_tokens(held, whole) == len(held):
            return whole[len(held) :]
    return tokenizer.encode(prompt, add_special_tokens=False)  # the two texts share a token, or are token ids


def shared_tokens(first: Sequence[int] | np.ndarray, second: Sequence[int] | np.ndarray) -> int:
    """Return how many tokens at their beginning two lists of token ids have in common."""
    length = min(len(first), len(second))
    differs = np.asarray(first[:length]) != np.asarray(second[:length])
    return int(differs.argmax()) if differs.any() else length


def _begins(tokenizer: Tokenizer, held: np.ndarray) -> bool:
    return tokenizer.bos_token_id is not None and int(held[0]) == tokenizer.bos_token_id


def _without_end(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """Return the token ids of a text without the end token that some tokenizers put behind it."""
    framed = tokenizer.encode_prompt(text, add_special_tokens)
    plain = tokenizer.encode(text, add_special_tokens=False)
    for start in range(len(framed) - len(plain) + 1):
        if framed[start : start + len(plain)] == plain:
            return framed[: start + len(plain)]
    return framed


def _stable_chat_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Return the token ids of a conversation that no later message changes.

    They are those that the conversation has in common with itself followed by other texts. Raises RequestError where
    there are none.
    """
    versions = [tuple(messages), *(_with_user_text(messages, probe) for probe in _PROBES)]
    if messages[-1].get("role") == "user":
        versions += [(*messages, {"role": "assistant", "content": probe}) for probe in _PROBES]
    encoded, refusal = [], None
    for version in versions:
        try:
            encoded.append(tokenizer.encode_chat(version, add_generation_prompt=False))
        except RequestError as error:  # a template may refuse a conversation that ends, or goes on, like this
            refusal = error
    if len(encoded) < len(_PROBES):
        raise refusal or RequestError("the chat template writes nothing")
    ids = encoded[0]
    for other in encoded[1:]:
        ids = ids[: shared_tokens(ids, other)]
    lost = len(encoded[0]) - len(ids)
    if not ids or lost > max(len(ids), _LARGEST_END):
        raise RequestError(
            f"the chat template writes other tokens from position {len(ids)} on as soon as a message follows, so this "
            f"conversation of {len(encoded[0])} tokens cannot be continued: give plain text or token ids"
        )
    return ids


def _with_user_text(messages: Sequence[Message], text: str) -> tuple[Message, ...]:
    """Return the conversation with `text` from the user at its end."""
    last: Mapping[str, Any] = messages[-1] if messages else {}
    if last.get("role") == "user" and isinstance(last.get("content"), str):
        return (*messages[:-1], {**last, "content": last["content"] + _BETWEEN + text})
    return (*messages, {"role": "user", "content": text})
