"""What the files beside tokenizer.json say: special tokens, end tokens, the chat template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chunkkv.engine.json_files import read_object, read_text
from chunkkv.errors import CheckpointError

GENERATION_FILE = "generation_config.json"
SETTINGS_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
_TOKEN_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_if_there(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, an empty one where there is no file."""
    return read_object(path, CheckpointError) if path.is_file() else {}


def special_tokens_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the named special tokens, which are stored as text or as {"content": text}."""
    tokens = {}
    for role in _TOKEN_ROLES:
        value = values.get(role)
        value = value.get("content") if isinstance(value, dict) else value
        if value is not None and not isinstance(value, str):
            raise CheckpointError(f"{role} is {str(value)[:80]!r} in the tokenizer's settings; it must be text")
        if value is not None:
            tokens[role] = value
    return tokens


def generation_ends(path: Path) -> list[int]:
    """Return the end tokens that generation_config.json names; raises CheckpointError for what are none."""
    ends = read_if_there(path).get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not all(isinstance(end, int) and not isinstance(end, bool) and end >= 0 for end in ends):
        raise CheckpointError(f"{path}: eos_token_id is {ends!r}; give a token id, or a list of them")
    return ends


def template_text(path: Path, settings: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the chat template and the file it comes from."""
    file = path / TEMPLATE_FILE
    if file.is_file():
        return read_text(file, CheckpointError), str(file)
    file, template = path / SETTINGS_FILE, settings.get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict) and "template" in entry]
        named = {str(entry.get("name")): entry["template"] for entry in entries}
        if "default" not in named:
            raise CheckpointError(f"{file}: the list under chat_template has no entry named 'default'; add one")
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{file}: chat_template is a {type(template).__name__}; it must be text or a list")
    return None if template is None else (template, str(file))
