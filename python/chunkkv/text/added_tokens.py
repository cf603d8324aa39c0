"""Tokens that a checkpoint adds to its tokenizer in other files than tokenizer.json, as transformers reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken

from chunkkv.errors import CheckpointError

ADDED_TOKENS_FILE = "added_tokens.json"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def add_stated_tokens(
    backend: tokenizers.Tokenizer, added: Mapping[str, Any], settings: Mapping[str, Any], special: Mapping[str, Any]
) -> None:
    """Give a tokenizer the tokens that stand in added_tokens.json or tokenizer_config.json.

    Raises CheckpointError for an entry that is no token, and for one that does not get the id that is stated for it.

    Parameters
    ----------
    backend : tokenizers.Tokenizer
        Takes the tokens.
    added : Mapping[str, Any]
        The content of added_tokens.json: {text: id}.
    settings : Mapping[str, Any]
        The content of tokenizer_config.json. What its `added_tokens_decoder` says of a token replaces what
        tokenizer.json says of it.
    special : Mapping[str, Any]
        The content of special_tokens_map.json.
    """
    texts = _special_texts(special) | _special_texts(settings)
    stated = _decoder_tokens(settings.get("added_tokens_decoder"))
    # added_tokens.json says nothing but the id, so what is known of a token stays.
    known = {token.content for _, token in stated} | {t.content for t in backend.get_added_tokens_decoder().values()}
    for text, number in added.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise CheckpointError(f"{ADDED_TOKENS_FILE}: token {text!r} has id {number!r}; give a whole number")
        is_special = text in texts
        if text not in known:
            stated.append((number, AddedToken(text, special=is_special, normalized=not is_special)))
        elif backend.token_to_id(text) not in (None, number):
            raise _other_id(text, number, backend)
    for number, token in sorted(stated, key=lambda entry: entry[0]):
        present = backend.token_to_id(token.content)
        if present is None or backend.get_added_tokens_decoder().get(present) != token:
            backend.add_tokens([token])  # a text that is there already keeps its id
        if backend.token_to_id(token.content) != number:
            raise _other_id(token.content, number, backend)


def _other_id(text: str, number: int, backend: tokenizers.Tokenizer) -> CheckpointError:
    return CheckpointError(
        f"added token {text!r} is to have id {number}, but has {backend.token_to_id(text)}: tokenizer.json has other "
        "tokens than the files beside it; save the tokenizer again with transformers' save_pretrained"
    )


def _decoder_tokens(entries: Any) -> list[tuple[int, AddedToken]]:
    """Return the ids and tokens of `added_tokens_decoder`, {"id": {"content": text, flags}}."""
    if not isinstance(entries, Mapping):
        if entries is None:
            return []
        raise CheckpointError(f"added_tokens_decoder is a {type(entries).__name__}; it must be an object")
    tokens = []
    for number, values in entries.items():
        content = values.get("content") if isinstance(values, Mapping) else None
        if not str(number).isdecimal() or not isinstance(content, str) or not content:
            raise CheckpointError(
                f"added_tokens_decoder has {str(number)[:40]!r}: {str(values)[:80]}; give an id and an object with "
                "'content'"
            )
        flags = {name: values[name] for name in _FLAGS if isinstance(values.get(name), bool)}
        tokens.append((int(number), AddedToken(content, **flags)))
    return tokens


def _special_texts(values: Mapping[str, Any]) -> set[str]:
    """Return every text that a settings file calls a special token, by itself or in a list."""
    entries: list[Any] = []
    for name, value in values.items():
        if name.endswith("_token"):
            entries.append(value)
        elif name in ("additional_special_tokens", "extra_special_tokens"):
            entries += value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else []
    texts = (entry.get("content") if isinstance(entry, Mapping) else entry for entry in entries)
    return {text for text in texts if isinstance(text, str)}
