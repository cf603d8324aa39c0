"""Prompts and budgets, checked before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from numbers import Integral

import numpy as np

from chunkkv.errors import ConfigError, EngineMismatchError, RequestError
from chunkkv.settings import KEEP_SCALE, ChunkKVSettings, keep_ratio_to_per_10k
from chunkkv.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
_next_id = count(1).__next__


@dataclass(frozen=True)
class Limits:
    """What an engine was built for; `budget_is_fixed`: a request may not bring a budget of its own."""

    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    vocab_size: int
    budget_is_fixed: bool = False


@dataclass(frozen=True)
class Request:
    """One checked prompt: token ids [L] int64, its budget as the graph takes it, N(L), and a number of its own."""

    ids: np.ndarray
    keep_per_10k: int
    budget_tokens: int
    kept_tokens: int
    request_id: int = field(default_factory=_next_id)


def is_single(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Return whether `prompts` is one prompt, text or token ids, or else a list; raises RequestError for neither."""
    if isinstance(prompts, str):
        return True
    if isinstance(prompts, bytes) or not isinstance(prompts, (Sequence, np.ndarray)):
        raise RequestError(f"prompts is {type(prompts).__name__}; give text, a list of token ids, or a list of these")
    return isinstance(prompts, np.ndarray) or (len(prompts) > 0 and isinstance(prompts[0], (Integral, np.integer)))


def make_requests(
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer | None,
    limits: Limits,
    settings: ChunkKVSettings | None,
    keep_ratio: float | Sequence[float | None] | None,
    budget_tokens: int | Sequence[int | None] | None,
    max_new_tokens: int,
) -> list[Request]:
    """Return the checked requests.

    Raises RequestError for a prompt or budget outside the engine's limits, EngineMismatchError where a budget is asked
    of an engine built without ChunkKV.
    """
    count = len(prompts)
    if not 0 < count <= limits.max_batch_size:
        raise RequestError(
            f"{count} prompts were given; this engine takes 1 to {limits.max_batch_size} at once: "
            "give fewer, or build it with a larger --max_batch_size"
        )
    ratios = _per_prompt("keep_ratio", keep_ratio, count)
    budgets = _per_prompt("budget_tokens", budget_tokens, count)
    requests = []
    for number, (prompt, ratio, budget) in enumerate(zip(prompts, ratios, budgets, strict=True)):
        ids = _token_ids(prompt, number, tokenizer, limits.vocab_size)
        _check_length(len(ids), number, limits, max_new_tokens)
        made = Request(ids, *_budget(len(ids), settings, ratio, budget))
        if limits.budget_is_fixed and settings and made.kept_tokens != settings.kept_tokens(len(ids)):
            raise RequestError(
                f"prompt {number} was to keep {made.kept_tokens} of {len(ids)} tokens; this engine keeps "
                f"{settings.kept_tokens(len(ids))}, which is fixed when it is built: leave keep_ratio and "
                "budget_tokens out, or build with another --chunkkv_keep_ratio"
            )
        requests.append(made)
    return requests


def _per_prompt(name: str, value, count: int) -> list:
    if isinstance(value, (list, tuple, np.ndarray)) and np.ndim(value) > 0:
        if len(value) != count:
            raise RequestError(
                f"{name} has {len(value)} entries for {count} prompts; give one value, or one per prompt"
            )
        return list(value)
    return [value] * count


def _token_ids(prompt: Prompt, number: int, tokenizer: Tokenizer | None, vocab_size: int) -> np.ndarray:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise RequestError("this engine was built without a tokenizer; give token ids instead of text")
        if not prompt.strip():
            raise RequestError(f"prompt {number} is empty; give at least one word")
        prompt = tokenizer.encode(prompt)
    try:
        wide = np.asarray(prompt)
        if wide.ndim != 1 or (wide.size and wide.dtype.kind not in "iu"):
            raise ValueError
    except (ValueError, TypeError):
        raise RequestError(f"prompt {number} is neither text nor a list of token ids") from None
    if wide.size == 0:
        raise RequestError(f"prompt {number} is empty; give at least one token")
    outside = (wide < 0) | (wide >= vocab_size)
    if outside.any():
        place = int(outside.argmax())
        raise RequestError(
            f"prompt {number} has token id {wide[place]} at position {place}; allowed is 0 to {vocab_size - 1}"
        )
    return np.ascontiguousarray(wide, dtype=np.int64)


def _check_length(length: int, number: int, limits: Limits, max_new_tokens: int) -> None:
    if length > limits.max_input_len:
        raise RequestError(
            f"prompt {number} has {length} tokens; this engine takes at most {limits.max_input_len}: "
            "shorten it, or build with a larger --max_input_len"
        )
    if length + max_new_tokens > limits.max_seq_len:
        raise RequestError(
            f"prompt {number} has {length} tokens and max_new_tokens is {max_new_tokens}, together "
            f"{length + max_new_tokens}; this engine takes at most {limits.max_seq_len}: lower max_new_tokens to "
            f"{max(limits.max_seq_len - length, 0)} or less, or build with a larger --max_seq_len"
        )


def _budget(
    length: int, settings: ChunkKVSettings | None, ratio: float | None, budget: int | None
) -> tuple[int, int, int]:
    """Return keep_per_10k, budget_tokens (0 = ratio mode) and N(L)."""
    if ratio is not None and budget is not None:
        raise RequestError(f"keep_ratio {ratio} and budget_tokens {budget} were both given; give one of them")
    if budget is not None and (
        isinstance(budget, bool) or not isinstance(budget, (Integral, np.integer)) or not 0 < budget < 2**31
    ):
        raise RequestError(f"budget_tokens is {budget!r}; give a whole number from 1 to {2**31 - 1}")
    try:
        per_10k = None if ratio is None else keep_ratio_to_per_10k(ratio)
    except ConfigError as error:
        raise RequestError(str(error)) from None
    if settings is None:
        if budget is not None or (per_10k is not None and per_10k != KEEP_SCALE):
            given = f"keep_ratio {ratio}" if budget is None else f"budget_tokens {budget}"
            raise EngineMismatchError(
                f"{given} was asked for, but this engine was built without ChunkKV and keeps every token: "
                "build it with --chunkkv"
            )
        return KEEP_SCALE, 0, length
    if per_10k is None and budget is None:
        return settings.keep_per_10k, settings.budget_tokens, settings.kept_tokens(length)
    kept = settings.kept_tokens(length, per_10k, budget)
    most = settings.kept_tokens(length, settings.max_keep_per_10k)
    if kept > most:
        given = f"keep_ratio {ratio}" if budget is None else f"budget_tokens {budget}"
        raise RequestError(
            f"{given} keeps {kept} of {length} tokens; "
            f"this engine was built for at most {most} (max_keep_ratio {settings.max_keep_per_10k / KEEP_SCALE}): "
            "ask for less, or build with a larger --chunkkv_max_keep_ratio"
        )
    return settings.keep_per_10k if per_10k is None else per_10k, int(budget or 0), kept
