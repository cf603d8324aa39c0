"""A context: a compressed prompt, or a whole conversation, whose keys and values are held between calls."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np

from chunkkv.contexts.engine import Engine
from chunkkv.contexts.origin import Origin, continuation_ids, shared_tokens
from chunkkv.contexts.saved import SavedContext
from chunkkv.contexts.scorers import with_scorer
from chunkkv.errors import BackendUnavailableError, EngineRunError, RequestError
from chunkkv.executors.interface import KVCache, PrefillProgress, PrefillResult, no_progress
from chunkkv.requests import Prompt, Request, make_requests
from chunkkv.sampling import check_finite


@dataclass(frozen=True, eq=False)
class Context:
    """A prompt that was compressed once; `ChunkKVSession.compress` makes one, any number of questions may use it.

    It never changes: a question works on a copy of its keys and values, and what makes it longer returns another one.
    Several threads may use it at once.

    Parameters
    ----------
    token_ids : numpy.ndarray
        Every token that it stands for [L] int64, kept or not. The next token has position L.
    slots : tuple of int
        Cache slots that are filled, one number for each length class of the engine's cache layout.
    cache : KVCache
        One row that holds them.
    origin : Origin
        The text or the messages that it was made from.
    engine : Engine
        The session that made it.
    scorer : str, default "window"
        What chose the tokens that stay.
    created_at : float
        When it was made, in seconds since 1970.
    """

    token_ids: np.ndarray
    slots: tuple[int, ...]
    cache: KVCache = field(repr=False)
    origin: Origin = field(repr=False)
    engine: Engine = field(repr=False)
    scorer: str = "window"
    created_at: float = field(default_factory=time.time)

    def __len__(self) -> int:
        """How many tokens it stands for."""
        return len(self.token_ids)

    @property
    def kept_tokens(self) -> int:
        """How many of its tokens are in the cache, over all heads on average."""
        return self.nbytes // self.engine.executor.kv_bytes_per_token

    @property
    def nbytes(self) -> int:
        """Bytes that the keys and values of the kept tokens take."""
        return self.engine.executor.cache_bytes(self.slots)

    @property
    def age_s(self) -> float:
        """Seconds since it was made."""
        return max(time.time() - self.created_at, 0.0)

    def __repr__(self) -> str:
        return f"Context({len(self)} tokens, {self.kept_tokens} kept, {self.nbytes} bytes)"

    def extend(
        self,
        prompt: Prompt,
        *,
        keep_ratio: float | None = None,
        budget_tokens: int | None = None,
        scorer: str | None = None,
        on_prefill: PrefillProgress | None = None,
    ) -> Context:
        """Return a context that goes on with `prompt`; this one stays as it is.

        Raises RequestError for what the engine cannot take, BackendUnavailableError where it cannot compress a turn or
        run the scorer.

        Parameters
        ----------
        prompt : str, sequence of int or sequence of mappings
            The next turn: text, token ids or messages. Text behind messages is a message of the user.
        keep_ratio : float or None, default None
            Share of the turn's tokens that stay, in (0, 1]. None keeps the turn whole.
        budget_tokens : int or None, default None
            Tokens of the turn that stay, instead of a ratio.
        scorer : {"window", "reread"} or None, default None
            What chooses them: attention of the turn's last tokens, or of a second reading of the turn. None is what
            chose the tokens of this context, or "window" where a second reading finds no room.
        on_prefill : callable or None, default None
            Called as on_prefill(done, total) with the turn's tokens that are prefilled and all of them; both readings
            count.
        """
        engine, executor = self.engine, self.engine.executor
        ids = continuation_ids(self.origin, self.token_ids, prompt, engine.tokenizer, answers=False)
        request = _turn(engine, ids, keep_ratio, budget_tokens)
        length, kept = len(request.ids), request.kept_tokens
        check_positions(engine, len(self), length, 0)
        if kept < length and not executor.capabilities.compresses_turns:
            raise BackendUnavailableError(
                "this engine cannot compress a turn behind a context: keep it whole (keep_ratio 1.0), or build the "
                "checkpoint for backend onnxruntime"
            )
        request, _ = with_scorer(engine, request, scorer, default=self.scorer, before=self.token_ids)
        needed = tuple(count + more for count, more in zip(self.slots, request.class_lengths, strict=True))
        cache = executor.new_cache(1, executor.capacity_for(needed))
        continuer, tell = executor.continuer(), on_prefill or no_progress
        continuer.copy(self.cache, self.slots, cache)
        tell(0, request.read_tokens)
        result = continuer.extend(cache, self.slots, len(self), request, threading.Event(), tell)
        check_prefilled(result)
        added = result.kept_lengths or request.class_lengths
        slots = tuple(count + more for count, more in zip(self.slots, added, strict=True))
        ids = np.concatenate([self.token_ids, request.ids])
        return replace(self, token_ids=ids, slots=slots, cache=cache, origin=self.origin.followed_by(prompt))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a safetensors file, whole or not at all; raises RequestError without an engine directory."""
        if not self.engine.engine_sha256:
            raise RequestError("a context can be saved where the session was loaded from an engine directory")
        continuer = self.engine.executor.continuer()
        saved = SavedContext(
            self.engine.engine_sha256, self.token_ids, self.slots, self.origin, self.scorer, self.created_at
        )
        saved.write(path, continuer.host_layout(self.slots), continuer.to_host(self.cache, self.slots))

    @classmethod
    def load(cls, path: str | os.PathLike[str], session: Engine) -> Context:
        """Read a context that `save` wrote.

        Raises RequestError for a file that cannot be read, that is damaged, or whose context belongs to another engine.

        Parameters
        ----------
        path : path
            The file.
        session : ChunkKVSession
            A session on the engine that made the context.
        """
        check_continues(session)
        executor, limits = session.executor, session.limits
        continuer = executor.continuer()
        saved = SavedContext.read(path, session.engine_sha256, limits.max_seq_len, limits.vocab_size)
        if len(saved.slots) != (classes := executor.cache_layout.length_classes):
            raise RequestError(f"{path} has {len(saved.slots)} lengths; this engine has {classes} length classes")
        arrays = saved.arrays(path, continuer.host_layout(saved.slots))
        cache = executor.new_cache(1, executor.capacity_for(saved.slots))
        continuer.from_host(arrays, cache)
        return cls(saved.token_ids, saved.slots, cache, saved.origin, session, saved.scorer, saved.created_at)

    def check_engine(self, engine: Engine) -> None:
        """Raise RequestError unless the keys and values are those of `engine`."""
        same = self.engine is engine or (engine.engine_sha256 and engine.engine_sha256 == self.engine.engine_sha256)
        if not same:
            raise RequestError("the context was made by another engine; compress the prompt again with this one")


def longest_prefix(contexts: Iterable[Context], token_ids: Sequence[int] | np.ndarray) -> Context | None:
    """Return the context with the most tokens with which `token_ids` begin, None where there is none.

    At least one token is left over: an answer needs the logits behind it.
    """
    fitting = [
        context
        for context in contexts
        if len(context) < len(token_ids) and shared_tokens(context.token_ids, token_ids) == len(context)
    ]
    return max(fitting, key=len, default=None)


def check_continues(engine: Engine) -> None:
    """Raise BackendUnavailableError for an engine that cannot go on with a filled row."""
    if not engine.executor.capabilities.continues_rows:
        raise BackendUnavailableError(
            "this engine cannot continue a context: build the checkpoint for backend onnxruntime, or for tensorrt with "
            "a version that builds block engines"
        )


def check_positions(engine: Engine, held: int, length: int, max_new_tokens: int) -> None:
    """Raise RequestError where context, text and answer have more positions than the engine."""
    total, most = held + length + max_new_tokens, engine.limits.max_seq_len
    if total > most:
        raise RequestError(
            f"the context has {held} tokens, the text behind it {length}, and max_new_tokens is {max_new_tokens}, "
            f"together {total}; this engine takes at most {most}: shorten the text or the answer, or build with a "
            "larger --max_seq_len"
        )


def _turn(engine: Engine, ids: list[int] | np.ndarray, keep_ratio: float | None, budget_tokens: int | None) -> Request:
    """Return the checked request of a turn, which is kept whole unless something else was said."""
    if keep_ratio is None and budget_tokens is None:
        keep_ratio = 1.0
    if len(ids) == 0:
        raise RequestError("the turn adds no token to the context; give at least one word")
    return make_requests([cast(Prompt, ids)], None, engine.limits, engine.settings, keep_ratio, budget_tokens, 0)[0]


def check_prefilled(prefilled: PrefillResult) -> None:
    """Raise EngineRunError where a prefill was cut off, or its logits are infinite or NaN."""
    if prefilled.logits is None:
        raise EngineRunError("the prefill of the context was cut off; compress the prompt again")
    check_finite(prefilled.logits)
