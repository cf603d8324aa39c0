"""The JSON objects of OpenAI's API: whole answers, events of a stream, usage and log probabilities."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from chunkkv.requests import Request
from chunkkv.results import GenerationResult, StreamEvent
from chunkkv.sampling import TokenChoice
from chunkkv.serve.answering import AnswerPiece
from chunkkv.serve.bodies import Ask
from chunkkv.text.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"


def server_event(value: dict[str, Any]) -> bytes:
    """Return an object as one server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def usage_object(requests: Sequence[Request], n: int, completion_tokens: int) -> dict[str, Any]:
    """Return the usage of a request: of `n` answers to one prompt, the prompt counts once."""
    once = requests[::n]
    prompt = sum(request.prompt_tokens for request in once)
    details = {
        "cached_tokens": sum(request.context_tokens for request in once),
        "kept_tokens": sum(request.kept_tokens for request in once),
    }
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt + completion_tokens,
        "prompt_tokens_details": details,
    }


@dataclass
class Reply:
    """Writes the answers of one request.

    Parameters
    ----------
    ask : Ask
        What was asked for.
    model : str
        The model's name.
    tokenizer : Tokenizer or None
        Names the tokens of log probabilities, and writes a prompt that is echoed.
    requests : list of Request
        The checked requests, one for each answer.
    """

    ask: Ask
    model: str
    tokenizer: Tokenizer | None
    requests: list[Request]
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    new_tokens: int = 0
    _begun: set[int] = field(default_factory=set)
    _offsets: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.id = self.id or ("chatcmpl-" if self.ask.is_chat else "cmpl-") + secrets.token_hex(12)

    def chunk(self, piece: AnswerPiece) -> dict[str, Any]:
        """Return one event of a stream as a chunk."""
        number, event = piece.number, piece.event
        self.new_tokens += len(event.token_ids)
        reason = _reason(event.finished)
        logprobs = self._logprobs(number, event.choices, event.text)
        is_first = number not in self._begun
        self._begun.add(number)
        choice: dict[str, Any] = {"index": number, "logprobs": logprobs, "finish_reason": reason}
        if self.ask.is_chat:
            choice["delta"] = {"role": "assistant", "content": event.text} if is_first else {"content": event.text}
        else:
            choice["text"] = self._prompt_text(number) + event.text if is_first else event.text
        chunk = self._object("chat.completion.chunk" if self.ask.is_chat else "text_completion", [choice])
        if self.ask.continuous_usage:
            chunk["usage"] = self.usage()
        return chunk

    def usage_chunk(self) -> dict[str, Any]:
        """Return the last event of a stream whose usage was asked for."""
        kind = "chat.completion.chunk" if self.ask.is_chat else "text_completion"
        return {**self._object(kind, []), "usage": self.usage()}

    def whole(self, events: Sequence[Sequence[StreamEvent]]) -> dict[str, Any]:
        """Return all answers as one object; `events` are those of each answer."""
        choices = []
        for number, own in enumerate(events):
            result = own[-1].finished
            assert result is not None, "the last event has the result"
            self.new_tokens += len(result.token_ids)
            parts = [self._logprobs(number, event.choices, event.text) for event in own]
            choice: dict[str, Any] = {"index": number, "finish_reason": _reason(result)}
            choice["logprobs"] = _joined([part for part in parts if part is not None])
            if self.ask.is_chat:
                choice["message"] = {"role": "assistant", "content": result.text}
            else:
                choice["text"] = self._prompt_text(number) + result.text
            choices.append(choice)
        kind = "chat.completion" if self.ask.is_chat else "text_completion"
        return {**self._object(kind, choices), "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Return the usage so far."""
        return usage_object(self.requests, self.ask.n, self.new_tokens)

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _prompt_text(self, number: int) -> str:
        if not self.ask.echo:
            return ""
        prompt = self.ask.prompts[number // self.ask.n]
        if isinstance(prompt, str):
            return prompt
        return "" if self.tokenizer is None else self.tokenizer.decode(cast("list[int]", prompt))

    def _logprobs(self, number: int, choices: Sequence[TokenChoice], text: str) -> dict[str, Any] | None:
        if not self.ask.sampling["logprobs"]:
            return None
        if self.ask.is_chat:
            return {"content": [self._chat_logprob(choice) for choice in choices], "refusal": None}
        offset = self._offsets.get(number, 0)
        self._offsets[number] = offset + len(text)
        return {
            "tokens": [self._text(choice.token) for choice in choices],
            "token_logprobs": [choice.logprob for choice in choices],
            "top_logprobs": [{self._text(token): value for token, value in choice.top} for choice in choices],
            "text_offset": [offset for _ in choices],
        }

    def _chat_logprob(self, choice: TokenChoice) -> dict[str, Any]:
        top = [self._named(token, value) for token, value in choice.top]
        return {**self._named(choice.token, choice.logprob), "top_logprobs": top}

    def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _text(self, token: int) -> str:
        if self.tokenizer is None or token >= self.tokenizer.size:
            return f"token_id:{token}"
        return self.tokenizer.token_text(token)


def _reason(result: GenerationResult | None) -> str | None:
    return None if result is None else result.finish_reason


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the log probabilities of pieces as those of the whole."""
    if not parts:
        return None
    joined = {}
    for name, first in parts[0].items():
        joined[name] = first if first is None else [item for part in parts for item in part[name]]
    return joined
