"""Reads what a check needs of a Triton config.pbtxt: protobuf text as nested lists, template placeholders included.

Tolerant on purpose: a file that still holds ${...} is no valid configuration, but can be checked.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from chunkkv.engine.json_files import read_text
from chunkkv.errors import ConfigError

CONFIG_FILE = "config.pbtxt"
_LARGEST_BYTES = 4 << 20  # a configuration has some kilobytes
Message = dict[str, list[Any]]  # every field as the list of its values: text, or a Message
_TOKEN = re.compile(
    r"""[\s,;]+ | \#[^\n]* | (?P<text>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*') | (?P<mark>[{}<>\[\]:])
    | (?P<word>(?:\$\{[^}]*\}|[^\s{}<>\[\]:,;\#"'])+)""",
    re.VERBOSE,
)
_OPENING, _CLOSING = "{<", "}>"


def read_config(path: Path) -> Message:
    """Return the fields of a config.pbtxt; raises ConfigError for no plain file and for text that does not close."""
    if not path.is_file() or path.stat().st_size > _LARGEST_BYTES:
        raise ConfigError(
            f"{path} is no plain file of at most {_LARGEST_BYTES} bytes; give a Triton model configuration"
        )
    return parse(read_text(path, ConfigError), path)


def parse(text: str, path: Path) -> Message:
    """Return the fields in the text of the file `path`; raises as read_config does."""
    tokens = _tokens(text, path)
    try:
        message, rest = _message(tokens, 0, path)
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply; this is no Triton model configuration") from None
    if rest != len(tokens):
        raise ConfigError(f"{path}: {tokens[rest][1]!r} closes nothing; this is no Triton model configuration")
    return message


def text_of(message: Message, name: str) -> str:
    """Return the last value of a field as text, "" where it is absent."""
    values = message.get(name) or [""]
    return values[-1] if isinstance(values[-1], str) else ""


def parameters(message: Message) -> dict[str, str]:
    """Return the string parameters of a model configuration."""
    found = {}
    for entry in message.get("parameters", []):
        values = entry.get("value") if isinstance(entry, dict) else None
        if values and isinstance(values[-1], dict):
            found[text_of(entry, "key")] = text_of(values[-1], "string_value").strip()
    return found


def _tokens(text: str, path: Path) -> list[tuple[str, str]]:
    found, at = [], 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            line = text.count("\n", 0, at) + 1
            raise ConfigError(f"{path}: line {line}: a quote is not closed; this is no Triton model configuration")
        if match.lastgroup is not None:
            found.append((match.lastgroup, match.group()))
        at = match.end()
    return found


def _message(tokens: list[tuple[str, str]], at: int, path: Path) -> tuple[Message, int]:
    """Return the fields from token `at` and the place behind them: a closing brace, or the end."""
    fields: Message = {}
    while at < len(tokens) and tokens[at][1] not in _CLOSING:
        kind, name = tokens[at]
        if kind != "word":
            raise ConfigError(f"{path}: {name!r} stands where a field's name is expected")
        at += 1
        if at < len(tokens) and tokens[at][1] == ":":
            at += 1
        values, at = _values(tokens, at, path)
        fields.setdefault(name, []).extend(values)
    return fields, at


def _values(tokens: list[tuple[str, str]], at: int, path: Path) -> tuple[list[Any], int]:
    if at < len(tokens) and tokens[at] == ("mark", "["):
        values, at = [], at + 1
        while at < len(tokens) and tokens[at] != ("mark", "]"):
            value, at = _value(tokens, at, path)
            values.append(value)
        if at == len(tokens):
            raise ConfigError(f"{path}: a list is not closed")
        return values, at + 1
    value, at = _value(tokens, at, path)
    return [value], at


def _value(tokens: list[tuple[str, str]], at: int, path: Path) -> tuple[Any, int]:
    kind, text = tokens[at] if at < len(tokens) else ("end", "the end of the file")
    if kind == "mark" and text in _OPENING:
        message, at = _message(tokens, at + 1, path)
        if at == len(tokens):
            raise ConfigError(f"{path}: a brace is not closed")
        return message, at + 1
    if kind not in ("text", "word"):
        raise ConfigError(f"{path}: {text!r} stands where a value is expected")
    if kind == "word":
        return text, at + 1
    joined = ""
    while at < len(tokens) and tokens[at][0] == "text":  # neighbouring texts are one
        joined += re.sub(r"\\(.)", r"\1", tokens[at][1][1:-1])
        at += 1
    return joined, at
