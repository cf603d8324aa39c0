"""Renders a checkpoint's chat template in jinja2's sandbox, with the helpers that transformers gives it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import ext, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.parser import Parser

from chunkkv.errors import CheckpointError, RequestError
from chunkkv.text.template_limits import (
    BoundedEnvironment,
    TemplateTooLargeError,
    begin_steps,
    check_length,
    take_steps,
)


class _MessagesRejected(TemplateError):
    """The template itself rejects the messages."""


class _GenerationBlock(ext.Extension):
    """Accepts {% generation %} around an answer, which only matters for training."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares tags as an instance's, so ClassVar does not fit

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One compiled chat template.

    Parameters
    ----------
    text : str
        The template, in the dialect of jinja2 that transformers renders.
    source : str
        The name of its file, for errors.

    Raises
    ------
    CheckpointError
        Where the template does not compile.
    """

    def __init__(self, text: str, source: str) -> None:
        self._source = source
        environment = BoundedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(
                f"{source}: the chat template has a syntax error in line {error.lineno}: {error.message}; correct it"
            ) from None
        except Exception as error:  # the compiler fails in its own ways on hostile input
            raise CheckpointError(f"{source}: the chat template does not compile: {error!r}; correct it") from None

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """Return the conversation as text.

        `messages` are mappings with "role" and "content"; `variables` are what else the template may read, such as the
        special tokens and add_generation_prompt.

        Raises RequestError for messages that are malformed or that the template rejects, CheckpointError for a template
        that breaks, tries to leave the sandbox, or goes beyond the limits of chunkkv.text.template_limits.
        """
        _check_messages(messages)
        try:
            begin_steps()
            return self._rendered({"messages": [dict(message) for message in messages], **variables})
        except _MessagesRejected as error:
            raise RequestError(f"the chat template rejects these messages: {error.message}; change them") from None
        except TemplateTooLargeError as error:
            raise CheckpointError(
                f"{self._source}: the chat template was stopped: {error.message}; do not use this checkpoint's template"
            ) from None
        except SecurityError as error:
            raise CheckpointError(
                f"{self._source}: the chat template tried to leave its sandbox ({error.message}) and was stopped: "
                "do not use this checkpoint's template"
            ) from None
        except Exception as error:  # a template is foreign code: whatever it raises is reported as its fault
            raise CheckpointError(
                f"{self._source}: the chat template failed with {type(error).__name__}: {error}; check that "
                "the messages have what it reads, or correct it"
            ) from None

    def _rendered(self, variables: Mapping[str, Any]) -> str:
        pieces, length = [], 0
        for piece in self._template.generate(variables):
            take_steps(1)
            pieces.append(piece)
            length += len(piece)
            check_length(length)
        return "".join(pieces)


def _check_messages(messages: Any) -> None:
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
        raise RequestError(
            f"messages is {type(messages).__name__} {str(messages)[:40]!r}; give a non-empty list such as "
            "[{'role': 'user', 'content': 'Hello'}]"
        )
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"message {number} is {str(message)[:80]!r}; give a mapping with 'role' and 'content'")
        if not isinstance(message.get("content"), (str, list, type(None))):
            raise RequestError(f"message {number}: content is {type(message['content']).__name__}; give text")


def _raise_exception(message: str) -> NoReturn:
    raise _MessagesRejected(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
