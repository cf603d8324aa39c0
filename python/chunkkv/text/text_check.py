"""What chunkkv doctor says of an engine's texts: what a chat message becomes, and what ends an answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from chunkkv.errors import ChunkKVError
from chunkkv.findings import Finding
from chunkkv.text.tokenizer import TOKENIZER_FILE, Tokenizer

_CORRECT = "correct chat_template in the checkpoint and build again"
_SHOWN = 24  # tokens of the message


def check_text(directory: Path, eos_token_ids: Sequence[int], vocab_size: int) -> list[Finding]:
    """Encode one chat message with the tokenizer in `directory`, and list the tokens that end an answer."""
    if not (directory / TOKENIZER_FILE).is_file():
        return [Finding.ok("tokenizer", "none: prompts and answers are token ids")]
    try:
        tokenizer = Tokenizer.from_dir(directory)
    except ChunkKVError as error:
        return [Finding.breaks("tokenizer", str(error), "build from a repaired checkpoint")]
    return [_chat_message(tokenizer, vocab_size), _ends(tokenizer, eos_token_ids)]


def _chat_message(tokenizer: Tokenizer, vocab_size: int) -> Finding:
    name = "chat message"
    if tokenizer.chat_template is None:
        return Finding.ok(name, "the tokenizer has no chat template: prompts are plain text, --chat is refused")
    try:
        ids = tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
    except ChunkKVError as error:
        return Finding.breaks(name, str(error), _CORRECT)
    shown = " ".join(repr(tokenizer.token_text(number)) for number in ids[:_SHOWN])
    more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    found = f"'Hello' becomes {len(ids)} tokens: {shown}{more}"
    if max(ids) >= vocab_size:
        return Finding.breaks(name, f"{found}; the model has no {max(ids)}", "give the model its own tokenizer")
    if ids[:2] == [tokenizer.bos_token_id] * 2:
        return Finding.warning(name, f"{found}; it begins twice", _CORRECT)
    return Finding.ok(name, found)


def _ends(tokenizer: Tokenizer, eos_token_ids: Sequence[int]) -> Finding:
    name = "end of an answer"
    if not eos_token_ids:
        return Finding.warning(name, "no token ends an answer", "name eos_token_id in generation_config.json")
    named = (f"{token} ({tokenizer.token_text(token)})" for token in sorted(eos_token_ids))
    return Finding.ok(name, f"at token {', '.join(named)}")
