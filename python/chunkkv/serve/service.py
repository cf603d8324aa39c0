"""Everything behind the HTTP doors: the engine, the batcher, and what is held between requests."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import numpy as np

from chunkkv.batching import ContinuousBatcher
from chunkkv.batching.bounds import cache_bytes
from chunkkv.contexts import Context, check_continues
from chunkkv.contexts.origin import Origin, continuation_ids, is_messages, origin_of
from chunkkv.contexts.scorers import with_scorer
from chunkkv.errors import ConfigError, OverloadedError
from chunkkv.requests import Message, Prompt, check_token_ids
from chunkkv.sampling import SamplingParams
from chunkkv.serve.answering import AnswerGroup
from chunkkv.serve.bodies import Ask
from chunkkv.serve.errors import ApiError
from chunkkv.serve.held import Budget, ContextStore, Held
from chunkkv.session import ChunkKVSession
from chunkkv.settings import keep_ratio_to_per_10k

FULL = 10_000  # keep_per_10k of what keeps everything
CONTEXT_SHARE = 0.25  # of the memory for KV caches


@dataclass(frozen=True)
class ServiceLimits:
    """What a server takes on beside the batcher's limits; raises ConfigError for a value out of range.

    Parameters
    ----------
    default_max_tokens : int, default 1024
        Longest answer of a chat that says no limit.
    max_body_bytes : int, default 1 MiB
        Largest body of a request.
    context_bytes : int, default 0
        Bytes of what is held between requests; 0 holds nothing.
    context_age_s : float, default 3600
        Seconds after its last use for which a conversation is held.
    """

    default_max_tokens: int = 1024
    max_body_bytes: int = 1 << 20
    context_bytes: int = 0
    context_age_s: float = 3600.0

    def __post_init__(self) -> None:
        for name, low in (("default_max_tokens", 1), ("max_body_bytes", 1), ("context_bytes", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name} is {getattr(self, name)}; give at least {low}")
        if not 0 < self.context_age_s < math.inf:
            raise ConfigError(f"context_age_s is {self.context_age_s}; give a number of seconds above 0")


def shared_memory(session: ChunkKVSession, kv_bytes: int | None, context_bytes: int | None) -> tuple[int | None, int]:
    """Return the bytes for the caches of requests and those for what is held between them.

    Raises ConfigError where nothing is left for requests.

    Parameters
    ----------
    session : ChunkKVSession
        The engine.
    kv_bytes : int or None
        Bytes of both; None for a share of the free memory, if the engine runs on a CPU.
    context_bytes : int or None
        Bytes of contexts; None for CONTEXT_SHARE, and none where the sum is not bounded.
    """
    total = cache_bytes(session, kv_bytes)
    if context_bytes is None:
        continues = session.executor.capabilities.continues_rows
        context_bytes = int(total * CONTEXT_SHARE) if continues and total is not None else 0
    if total is None:
        return None, context_bytes
    if not 0 <= context_bytes < total:
        raise ConfigError(f"context_bytes is {context_bytes}; give 0 to {total - 1}: kv_bytes {total} holds both")
    return total - context_bytes, context_bytes


@dataclass(frozen=True)
class Planned:
    """How one prompt of a request is answered.

    Parameters
    ----------
    prompt : str, sequence of int or sequence of mappings
        What is prefilled.
    length : int
        Tokens before the answer.
    base : Held or None
        What is held of them.
    context : Context or None
        The part of it to go on from.
    budget : Budget
        How it is compressed.
    """

    prompt: Prompt
    length: int
    base: Held | None
    context: Context | None
    budget: Budget


class Service:
    """Answers requests on one engine. All methods may be called from several threads.

    Parameters
    ----------
    batcher : ContinuousBatcher
        Answers.
    model : str
        The name by which clients call the model.
    limits : ServiceLimits
        What it takes on.
    """

    def __init__(self, batcher: ContinuousBatcher, model: str, limits: ServiceLimits) -> None:
        self.batcher, self.model, self.limits = batcher, model, limits
        self.session: ChunkKVSession = batcher.session
        self.created = int(time.time())
        self.store = ContextStore(limits.context_bytes, limits.context_age_s)
        self.is_closing = False
        capabilities = self.session.executor.capabilities
        self._holds = capabilities.continues_rows and limits.context_bytes > 0

    def begin(self, ask: Ask, group: AnswerGroup) -> None:
        """Queue all answers of a request; raises what ends the request as a whole, and then none is answered."""
        try:
            number = 0
            for planned in [self._plan(ask, prompt) for prompt in ask.prompts]:
                max_new = self._max_new_tokens(ask, planned.length)
                self._submit(ask, planned, [ask.params(max_new, number + each) for each in range(ask.n)], group)
                number += ask.n
        except BaseException:
            group.cancel()
            raise

    def begin_context(
        self,
        name: str,
        prompt: Prompt,
        keep_ratio: float | None,
        budget_tokens: int | None,
        scorer: str | None,
        group: AnswerGroup,
    ) -> Callable[[], Held]:
        """Queue the prefill of a prompt; returns what holds it by name, to be called once `group` has ended.

        Raises ApiError where contexts cannot be held or the name is taken; else as ChunkKVSession.compress. What it
        returns raises as ContextStore.add.
        """
        self._check_holds()
        self._check_name(name)
        budget = self._budget(keep_ratio, budget_tokens, scorer)
        origin = origin_of(prompt)
        ids = prompt if origin == Origin() else cast(Prompt, origin.begin(self.session.tokenizer, True))
        made: list[Context] = []
        sampling = SamplingParams(max_new_tokens=1, ignore_eos=True)  # an answer of one token leaves exactly the prompt
        (request,) = self.session.requests([ids], sampling, keep_ratio, budget_tokens)
        scored_by = with_scorer(self.session, request, scorer, of_context=True)[1].name
        self.batcher.submit(
            ids,
            sampling,
            group.listener(),
            keep_ratio=keep_ratio,
            budget_tokens=budget_tokens,
            scorer=scored_by,
            on_context=made.append,
        )

        def hold() -> Held:
            if not made:
                raise OverloadedError("the prompt was not prefilled to its end; send it again")
            context = replace(made[0], origin=origin, scorer=scored_by)
            self._check_name(name)
            held = Held(context, budget, 0 if context.kept_tokens == len(context) else len(context), name)
            self.store.add(held)
            return held

        return hold

    def encode(self, prompt: Prompt, add_special_tokens: bool, add_generation_prompt: bool = True) -> np.ndarray:
        """Return the token ids of a prompt [L] int64."""
        tokenizer = self.session.tokenizer
        if isinstance(prompt, str) or is_messages(prompt):
            if tokenizer is None:
                raise ApiError(400, "this engine was built without a tokenizer; give token ids instead of text")
            if isinstance(prompt, str):
                prompt = tokenizer.encode_prompt(prompt, add_special_tokens)
            else:
                messages = cast("list[Message]", prompt)
                prompt = tokenizer.encode_chat(messages, add_generation_prompt=add_generation_prompt)
        return check_token_ids(prompt, 0, self.session.limits.vocab_size)

    def _check_holds(self) -> None:
        check_continues(self.session)
        if not self._holds:
            raise ApiError(400, "this server holds no contexts: start it with --context_bytes above 0", "context")

    def _check_name(self, name: str) -> None:
        if self.store.named(name) is not None:
            raise ApiError(409, f"there is a context {name!r} already; delete it first, or choose another id", "id")

    def _plan(self, ask: Ask, prompt: Prompt) -> Planned:
        if ask.context is not None:
            return self._plan_behind(ask.context, prompt)
        budget = self._budget(ask.keep_ratio, ask.budget_tokens, ask.scorer)
        if isinstance(prompt, str) and not prompt.strip():
            raise ApiError(400, "the prompt is empty; give at least one word", "prompt")
        ids = self.encode(prompt, ask.add_special_tokens)
        found = None
        if self._holds and ask.cache_prompt:
            found = self.store.find(ids, budget, self._fresh_tokens(len(ids), budget))
        if found is None:  # of messages, the question alone observes, so they are handed on as they are
            return Planned(prompt if is_messages(prompt) else ids, len(ids), None, None, budget)
        base, context = found
        return Planned(ids[len(context) :], len(ids), base, context, budget)

    def _plan_behind(self, name: str, prompt: Prompt) -> Planned:
        """Plan a prompt behind the context of that name, or behind what was answered there before."""
        self._check_holds()
        named = self.store.named(name)
        if named is None:
            raise ApiError(404, f"there is no context {name!r}; make it with POST /v1/contexts", "context", "not_found")
        held = named.context
        rest = continuation_ids(held.origin, held.token_ids, prompt, self.session.tokenizer, answers=True)
        ids = np.concatenate([held.token_ids, check_token_ids(rest, 0, self.session.limits.vocab_size)])
        base, context = self.store.find(ids, named.budget, 0, root=name) or (named, held)
        return Planned(ids[len(context) :], len(ids), base, context, named.budget)

    def _submit(self, ask: Ask, planned: Planned, samplings: list[SamplingParams], group: AnswerGroup) -> None:
        fresh = planned.context is None
        on_context: Callable[[Context], None] | None = None
        if self._holds and ask.cache_prompt:
            on_context = partial(self._hold, planned)
        self.batcher.submit_answers(
            planned.prompt,
            samplings,
            [group.listener() for _ in samplings],
            keep_ratio=ask.keep_ratio if fresh else None,
            budget_tokens=ask.budget_tokens if fresh else None,
            add_special_tokens=ask.add_special_tokens,
            context=planned.context,
            scorer=ask.scorer if fresh else None,
            on_context=on_context,
        )

    def _hold(self, planned: Planned, context: Context) -> None:
        """Hold what an answer left; called on the batcher's thread."""
        base = planned.base
        if base is not None:
            root = base.name if base.name is not None else base.root
            self.store.add(Held(context, planned.budget, base.head, root=root), instead=base)
        else:
            dropped = len(context) - context.kept_tokens
            self.store.add(Held(context, planned.budget, planned.length if dropped else 0))

    def _budget(self, keep_ratio: float | None, budget_tokens: int | None, scorer: str | None) -> Budget:
        settings = self.session.settings
        if budget_tokens is not None:
            return Budget(0, budget_tokens, scorer)
        if keep_ratio is not None:
            return Budget(keep_ratio_to_per_10k(keep_ratio), 0, scorer)
        if settings is None:
            return Budget(FULL, 0, scorer)
        return Budget(0 if settings.budget_tokens else settings.keep_per_10k, settings.budget_tokens, scorer)

    def _fresh_tokens(self, length: int, budget: Budget) -> int:
        """Return how many tokens would stay of a prompt that is prefilled as a whole."""
        settings = self.session.settings
        if settings is None:
            return length
        if budget.budget_tokens:
            return settings.kept_tokens(length, None, budget.budget_tokens)
        return settings.kept_tokens(length, budget.keep_per_10k)

    def _max_new_tokens(self, ask: Ask, length: int) -> int:
        """Return the longest answer: what was asked for, which the batcher checks, or what there is room for."""
        if ask.max_tokens is not None:
            return ask.max_tokens
        room = self.session.limits.max_seq_len - length
        least = ask.sampling.get("min_tokens") or 1
        return max(1, least, min(room, self.limits.default_max_tokens))
