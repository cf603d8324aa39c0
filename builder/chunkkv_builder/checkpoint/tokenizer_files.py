"""The files of a tokenizer, under the names that Hugging Face gives them."""

from __future__ import annotations

from pathlib import Path

GENERATION_FILE = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    GENERATION_FILE,  # has the tokens that end an answer
)


def tokenizer_files(directory: Path | None) -> list[Path]:
    """Return the tokenizer's files in `directory`; none for None."""
    if directory is None:
        return []
    return [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
