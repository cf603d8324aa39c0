"""Prompts and budgets, checked before any work is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from numbers import Integral
from typing import Any, Protocol, TypeVar, cast

import numpy as np

from chunkkv.cache_layout import Slots
from chunkkv.errors import ConfigError, EngineMismatchError, RequestError
from chunkkv.limits import KEEP_SCALE
from chunkkv.rereading import Piece
from chunkkv.settings import ChunkKVSettings, keep_ratio_to_per_10k

Message = Mapping[str, Any]  # of a conversation: "role" and "content"
Prompt = str | Sequence[int] | np.ndarray | Sequence[Message]
SHORTEST_QUESTION = 8  # tokens; fewer observers judge by the template's own tokens
_next_id = count(1).__next__


T = TypeVar("T")


class TextEncoder(Protocol):
    """Turns text into tokens; chunkkv.text.tokenizer.Tokenizer is one."""

    def encode_prompt(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`, with the begin token of the model where `add_special_tokens`."""

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation in the model's chat template."""

    def question_tokens(self, messages: Sequence[Message]) -> int | None:
        """Return how many tokens stand from the user's last question to the end of the template, if that is known."""


@dataclass(frozen=True)
class Limits:
    """The sizes that an engine was built for.

    Parameters
    ----------
    max_batch_size : int
        Prompts in one call.
    max_input_len : int
        Tokens of one prompt.
    max_seq_len : int
        Tokens of one prompt and its answer together.
    vocab_size : int
        Token ids are below this.
    budget_is_fixed : bool, default False
        The engine decides how much of a prompt stays; a request may not bring a budget of its own.
    """

    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    vocab_size: int
    budget_is_fixed: bool = False


@dataclass(frozen=True)
class Request:
    """One checked prompt.

    Parameters
    ----------
    ids : numpy.ndarray
        Token ids [L] int64.
    keep_per_10k : int
        Keep ratio times 10,000, as the engine's graph takes it.
    budget_tokens : int
        Tokens to keep instead of a ratio; 0 selects the ratio.
    kept_tokens : int
        N(L): how many of the L tokens stay in the cache, over all heads on average.
    class_lengths : tuple of int
        How many stay at most in each length class of the engine's cache. Where there is one, that is kept_tokens.
    request_id : int
        A number of its own within the process, by which profilers tell requests apart.
    window : int, default 0
        How many of the prompt's last tokens score the others, 1 to the engine's window; 0 for the engine's window.
    reread : tuple of Piece, default ()
        What is read again behind the prompt to score its tokens; empty where its last tokens score.
    """

    ids: np.ndarray
    keep_per_10k: int
    budget_tokens: int
    kept_tokens: int
    class_lengths: Slots = ()
    request_id: int = field(default_factory=_next_id)
    window: int = 0
    reread: tuple[Piece, ...] = ()

    def __post_init__(self) -> None:
        if not self.class_lengths:
            object.__setattr__(self, "class_lengths", (self.kept_tokens,))

    def slots(self, new_tokens: int) -> Slots:
        """Return the cache slots that the prompt needs at most with `new_tokens` behind it, for each length class."""
        return tuple(length + new_tokens for length in self.class_lengths)

    @property
    def prompt_ids(self) -> np.ndarray:
        """Every token before the answer [prompt_tokens] int64, also those that lie in a cache already."""
        return self.ids

    @property
    def prompt_tokens(self) -> int:
        """How many tokens stand before the answer: the logical position of its first token."""
        return len(self.ids)

    @property
    def read_tokens(self) -> int:
        """How many tokens the prefill runs, those that are read a second time among them."""
        return len(self.ids) + sum(len(piece.ids) for piece in self.reread)

    @property
    def context_tokens(self) -> int:
        """How many of them lie in a cache already, so that they are not prefilled."""
        return 0


class CallProgress:
    """Turns the progress of one prompt into that of all prompts of a call.

    Parameters
    ----------
    requests : sequence of Request
        The prompts.
    tell : callable
        Called as tell(done, total) with prefilled tokens and those of all prompts.
    """

    def __init__(self, requests: Sequence[Request], tell: Callable[[int, int], None]) -> None:
        self._tell, self._done = tell, 0
        self._total = sum(request.read_tokens for request in requests)
        self._tell(0, self._total)

    def __call__(self, done: int, total: int) -> None:
        """Take the progress of the prompt that is in work; its end is told by `add`."""
        if done < total:
            self._tell(self._done + done, self._total)

    def add(self, lengths: Iterable[int]) -> None:
        """Count prompts as done."""
        self._done += sum(lengths)
        self._tell(self._done, self._total)


def as_batch(prompts: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """Return the prompts as a list, and whether `prompts` was one prompt; raises RequestError for neither of both."""
    if isinstance(prompts, str):
        return [prompts], True
    if isinstance(prompts, bytes) or not isinstance(prompts, (Sequence, np.ndarray)):
        raise RequestError(f"prompts is {type(prompts).__name__}; give text, token ids, messages, or a list of these")
    if isinstance(prompts, np.ndarray) or (len(prompts) > 0 and isinstance(prompts[0], (Integral, Mapping))):
        return [cast(Prompt, prompts)], True
    return list(cast("Sequence[Prompt]", prompts)), False


def make_requests(
    prompts: Sequence[Prompt],
    tokenizer: TextEncoder | None,
    limits: Limits,
    settings: ChunkKVSettings | None,
    keep_ratio: float | Sequence[float | None] | None,
    budget_tokens: int | Sequence[int | None] | None,
    max_new_tokens: int,
    add_special_tokens: bool = True,
    window_per_request: bool = False,
) -> list[Request]:
    """Return the checked requests of `prompts`, with the budget of each.

    Raises RequestError for a prompt or budget outside the engine's limits, EngineMismatchError where a budget is asked
    of an engine built without ChunkKV.

    Parameters
    ----------
    prompts : sequence of str, sequence of int or sequence of mappings
        Text, token ids, or the messages of a conversation.
    tokenizer : TextEncoder or None
        None refuses text.
    limits : Limits
        The sizes that the engine was built for.
    settings : ChunkKVSettings or None
        What the engine was built with; None for an engine that keeps every token.
    keep_ratio : float, or one per prompt, or None
        Share of the tokens that stay, in (0, 1]; None takes the engine's own.
    budget_tokens : int, or one per prompt, or None
        Tokens that stay, instead of a ratio.
    max_new_tokens : int
        Room that each answer needs.
    add_special_tokens : bool, default True
        Whether text gets the model's begin token, where it does not have it.
    window_per_request : bool, default False
        Whether the engine takes a window with each request: that of messages begins with the user's last question.
    """
    count = len(prompts)
    _check_count(count, limits)
    ratios = _per_prompt("keep_ratio", keep_ratio, count)
    budgets = _per_prompt("budget_tokens", budget_tokens, count)
    requests = []
    for number, (prompt, ratio, budget) in enumerate(zip(prompts, ratios, budgets, strict=True)):
        ids = check_token_ids(_encoded(prompt, number, tokenizer, add_special_tokens), number, limits.vocab_size)
        _check_length(len(ids), number, limits, max_new_tokens)
        window = _window(prompt, settings, tokenizer) if window_per_request else 0
        request = _request(ids, settings, window, *_budget(len(ids), settings, ratio, budget))
        if limits.budget_is_fixed and settings and request.kept_tokens != settings.kept_tokens(len(ids)):
            raise RequestError(
                f"prompt {number} was to keep {request.kept_tokens} of {len(ids)} tokens; this engine keeps "
                f"{settings.kept_tokens(len(ids))}, which is fixed when it is built: leave keep_ratio and "
                "budget_tokens out, or build with another --chunkkv_keep_ratio"
            )
        requests.append(request)
    return requests


def _check_count(count: int, limits: Limits) -> None:
    if count == 0:
        raise RequestError(
            "0 prompts were given: the list is empty; give text, token ids, messages, or a list of 1 to "
            f"{limits.max_batch_size} of them"
        )
    if count > limits.max_batch_size:
        raise RequestError(
            f"{count} prompts were given; this engine takes 1 to {limits.max_batch_size} at once: "
            "give fewer, or build it with a larger --max_batch_size"
        )


def _request(
    ids: np.ndarray,
    settings: ChunkKVSettings | None,
    window: int,
    keep_per_10k: int,
    budget_tokens: int,
    kept_tokens: int,
) -> Request:
    """Return a request with the lengths of its cache."""
    lengths: Slots = ()
    if settings is not None:
        lengths = settings.class_capacities(len(ids), keep_per_10k, budget_tokens)
    return Request(ids, keep_per_10k, budget_tokens, kept_tokens, lengths, window=window)


def _window(prompt: Prompt, settings: ChunkKVSettings | None, tokenizer: TextEncoder | None) -> int:
    """Return how many last tokens observe: those of the question of messages, at least SHORTEST_QUESTION; else 0."""
    if settings is None or tokenizer is None or not _is_chat(prompt):
        return 0
    tokens = tokenizer.question_tokens(cast("Sequence[Message]", prompt))
    return 0 if tokens is None else min(max(tokens, SHORTEST_QUESTION), settings.window)


def _is_chat(prompt: Prompt) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _per_prompt(name: str, value: T | Sequence[T | None] | None, count: int) -> list[T | None]:
    if isinstance(value, (list, tuple, np.ndarray)) and np.ndim(value) > 0:
        if len(value) != count:
            raise RequestError(
                f"{name} has {len(value)} entries for {count} prompts; give one value, or one per prompt"
            )
        return list(value)
    return [cast("T | None", value)] * count


def _encoded(prompt: Prompt, number: int, tokenizer: TextEncoder | None, add_special_tokens: bool) -> Prompt:
    """Return text and messages as token ids, anything else as it is."""
    if not _is_chat(prompt) and not isinstance(prompt, str):
        return prompt
    if tokenizer is None:
        raise RequestError("this engine was built without a tokenizer; give token ids instead of text")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise RequestError(f"prompt {number} is empty; give at least one word")
        return tokenizer.encode_prompt(prompt, add_special_tokens)
    return tokenizer.encode_chat(cast("Sequence[Message]", prompt))


def check_token_ids(prompt: object, number: int, vocab_size: int) -> np.ndarray:
    """Return token ids as [L] int64; raises RequestError, which calls them prompt `number`, for anything else."""
    try:
        ids = np.asarray(prompt)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError
    except (ValueError, TypeError):
        raise RequestError(f"prompt {number} is neither text nor a list of token ids or messages") from None
    if ids.size == 0:
        raise RequestError(f"prompt {number} is empty; give at least one token")
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        position = int(outside.argmax())
        raise RequestError(
            f"prompt {number} has token id {ids[position]} at position {position}; allowed is 0 to {vocab_size - 1}"
        )
    return np.ascontiguousarray(ids, dtype=np.int64)


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
    if budget is not None:
        if not (_is_whole(budget) and 0 < budget < 2**31):
            raise RequestError(f"budget_tokens is {budget!r}; give a whole number from 1 to {2**31 - 1}")
        budget = int(budget)  # NumPy's integers would overflow in sizes of caches
    try:
        per_10k = None if ratio is None else keep_ratio_to_per_10k(ratio)
    except ConfigError as error:
        raise RequestError(str(error)) from None
    if settings is None:
        if budget is not None or (per_10k is not None and per_10k != KEEP_SCALE):
            asked = f"keep_ratio {ratio}" if budget is None else f"budget_tokens {budget}"
            raise EngineMismatchError(
                f"{asked} was asked for, but this engine was built without ChunkKV and keeps every token: "
                "build it with --chunkkv"
            )
        return KEEP_SCALE, 0, length
    if per_10k is None and budget is None:
        return settings.keep_per_10k, settings.budget_tokens, settings.kept_tokens(length)
    kept = settings.kept_tokens(length, per_10k, budget)
    most = settings.kept_tokens(length, settings.max_keep_per_10k)
    if kept > most:
        asked = f"keep_ratio {ratio}" if budget is None else f"budget_tokens {budget}"
        raise RequestError(
            f"{asked} keeps {kept} of {length} tokens; "
            f"this engine was built for at most {most} (max_keep_ratio {settings.max_keep_per_10k / KEEP_SCALE}): "
            "ask for less, or build with a larger --chunkkv_max_keep_ratio"
        )
    return settings.keep_per_10k if per_10k is None else per_10k, budget or 0, kept


def _is_whole(value: object) -> bool:
    return isinstance(value, (Integral, np.integer)) and not isinstance(value, bool)
