"""The tokens that end an answer, from every file of a checkpoint that names one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chunkkv.engine.json_files import read_object
from chunkkv.errors import CheckpointError, ChunkKVError
from chunkkv.text.tokenizer import SETTINGS_FILE, Tokenizer
from chunkkv_builder.checkpoint.model_config import ModelConfig
from chunkkv_builder.checkpoint.tokenizer_files import GENERATION_FILE

CONFIG_FILE = "config.json"
_ANSWER = "chunkkvanswer"  # a text that no template writes by itself


def united_end_tokens(
    config: ModelConfig, tokenizer: Tokenizer | None, directory: Path
) -> tuple[tuple[int, ...], str | None]:
    """Return the end tokens that any file names, and a sentence on those that `config` lacks, None where it has all.

    Raises CheckpointError for a chat template that does not compile.

    Parameters
    ----------
    config : ModelConfig
        Its end tokens are those that transformers generates with: of generation_config.json, else of config.json.
        Tokens at or above its `vocab_size` cannot come.
    tokenizer : Tokenizer or None
        The checkpoint's tokenizer.
    directory : Path
        Where the checkpoint's files are.
    """
    known = config.eos_token_ids
    sources = {name: _stated(directory / name) for name in (CONFIG_FILE, GENERATION_FILE)}
    if tokenizer is not None:
        tokenizer.check_chat_template()
        sources[SETTINGS_FILE] = tokenizer.own_end_ids
        sources["the chat template"] = turn_end(tokenizer)
    added: dict[int, list[str]] = {}
    for source, ids in sources.items():
        for token in ids:
            if token not in known and token < config.vocab_size:
                added.setdefault(token, []).append(source)
    if not added:
        return known, None
    listed = "; ".join(f"{_named(token, tokenizer)} of {' and '.join(names)}" for token, names in added.items())
    first = ", ".join(_named(token, tokenizer) for token in known) or "none"
    united = (*known, *added)
    return united, f"the checkpoint's files name different end tokens, and answers end at each: {first}; also {listed}"


def tokenizer_end_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the end tokens that a tokenizer's own files name, its chat template included."""
    return tuple(dict.fromkeys((*tokenizer.eos_token_ids, *tokenizer.own_end_ids, *turn_end(tokenizer))))


def turn_end(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the token that the chat template writes behind an answer, nothing where it writes none."""
    if tokenizer.chat_template is None:
        return ()
    talk = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(talk, add_generation_prompt=False)
    except ChunkKVError:  # a template that wants other messages; it compiles, which was checked
        return ()
    behind = text.rpartition(_ANSWER)[2].lstrip() if _ANSWER in text else ""
    prefixes = [added for added in tokenizer.added_texts if behind.startswith(added)]
    return (tokenizer.added_texts[max(prefixes, key=len)],) if prefixes else ()


def _stated(path: Path) -> tuple[int, ...]:
    values: Mapping[str, Any] = read_object(path, CheckpointError) if path.is_file() else {}
    ids = values.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    return tuple(token for token in ids if isinstance(token, int) and not isinstance(token, bool) and token >= 0)


def _named(token: int, tokenizer: Tokenizer | None) -> str:
    return str(token) if tokenizer is None or token >= tokenizer.size else f"{token} ({tokenizer.token_text(token)})"
