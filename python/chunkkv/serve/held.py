"""What a server holds between requests: documents and conversations, bounded by bytes and age.

A held context serves every request that begins with its tokens. Its head, whose tokens were ranked against each other,
is used as a whole or not at all. Behind the head all tokens are kept, so the context may be cut at any of them: the
first slots of its row are a context, too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from chunkkv.contexts import Context
from chunkkv.contexts.origin import shared_tokens
from chunkkv.errors import CacheFullError

LEAST_TOKENS = 16  # fewer are prefilled faster than they are copied
MOST_HELD = 512  # a search looks at each


@dataclass(frozen=True)
class Budget:
    """What decides which tokens of a context stay: contexts of equal budgets are interchangeable.

    Parameters
    ----------
    keep_per_10k : int
        Keep ratio times 10,000.
    budget_tokens : int
        Tokens that stay instead; 0 for the ratio.
    scorer : str or None
        What chooses them, as the request says; None for the default.
    """

    keep_per_10k: int
    budget_tokens: int
    scorer: str | None


@dataclass(eq=False)
class Held:
    """A context in the store.

    Parameters
    ----------
    context : Context
        Its keys and values.
    budget : Budget
        How it was made.
    head : int
        How many of its first tokens were ranked against each other; 0 where it keeps everything.
    name : str or None, default None
        The id of one that was made by name; it stays until it is deleted.
    root : str or None, default None
        The id of the named context that it goes on from.
    """

    context: Context
    budget: Budget
    head: int
    name: str | None = None
    root: str | None = None
    used_at: float = field(default_factory=time.monotonic)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""
        return self.context.engine.executor.cache_bytes(self.context.cache.capacity)

    def prefix_of(self, ids: np.ndarray) -> Context | None:
        """Return the longest context with which `ids` begin and go on, cut from this one; None where there is none."""
        context = self.context
        length = min(shared_tokens(context.token_ids, ids), len(ids) - 1)
        if length < max(self.head, LEAST_TOKENS):
            return None
        if length == len(context):
            return context
        slots = tuple(count - (len(context) - length) for count in context.slots)
        return replace(context, token_ids=context.token_ids[:length], slots=slots)


class ContextStore:
    """Held contexts; what was not used for longest goes first. Safe to use from several threads.

    Parameters
    ----------
    most_bytes : int
        Bytes of all contexts together; 0 holds nothing.
    most_age_s : float
        Seconds after its last use for which an unnamed context is held.
    clock : callable, default time.monotonic
        Returns seconds.
    """

    def __init__(self, most_bytes: int, most_age_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.most_bytes, self._most_age_s, self._clock = most_bytes, most_age_s, clock
        self._held: list[Held] = []
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        with self._lock:
            return sum(held.nbytes for held in self._held)

    def __len__(self) -> int:
        return len(self._held)

    def named(self, name: str) -> Held | None:
        """Return the context of that name, now used."""
        with self._lock:
            held = next((held for held in self._held if held.name == name), None)
            if held is not None:
                held.used_at = self._clock()
            return held

    def all_named(self) -> list[Held]:
        """Return the named contexts, the oldest first."""
        with self._lock:
            return [held for held in self._held if held.name is not None]

    def find(self, ids: np.ndarray, budget: Budget, fresh: int, root: str | None = None) -> tuple[Held, Context] | None:
        """Return the held context that spares most of the prefill of `ids`, with the part of it to go on from.

        Parameters
        ----------
        ids : numpy.ndarray
            The whole prompt [L] int64.
        budget : Budget
            How the request is compressed.
        fresh : int
            How many tokens would stay of the whole prompt. What stands behind a head stays whole, so a context is
            passed over where that is more than a quarter of the prompt, unless no more than `fresh` tokens stay.
        root : str or None, default None
            Only the context of this name and what goes on from it; every length is allowed then.
        """
        best: tuple[Held, Context] | None = None
        with self._lock:
            self._drop_old()
            for held in self._held:
                if held.budget != budget or (root is not None and root not in (held.name, held.root)):
                    continue
                context = held.prefix_of(ids)
                if context is None or (best is not None and len(context) <= len(best[1])):
                    continue
                kept = context.kept_tokens + len(ids) - len(context)
                if root is not None or kept <= fresh or len(ids) - held.head <= len(ids) // 4:
                    best = held, context
            if best is not None:
                best[0].used_at = self._clock()
        return best

    def add(self, new: Held, instead: Held | None = None) -> None:
        """Hold a context, and let go what it makes superfluous or what there is no room for.

        Raises CacheFullError for a named one that has no room beside the other named ones; an unnamed one that has no
        room is not held.

        Parameters
        ----------
        new : Held
            The context.
        instead : Held or None, default None
            The unnamed one that it goes on from.
        """
        with self._lock:
            self._drop_old()
            if instead is not None and instead.name is None and _covers(new, instead) and instead in self._held:
                self._held.remove(instead)
            if new.name is None and any(held.budget == new.budget and _covers(held, new) for held in self._held):
                return
            fixed = sum(held.nbytes for held in self._held if held.name is not None)
            if fixed + new.nbytes > self.most_bytes:
                if new.name is None:
                    return
                raise CacheFullError(
                    f"the context takes {new.nbytes} bytes, and named contexts hold {fixed} of {self.most_bytes}: "
                    "delete one, keep fewer tokens, or give the server more context_bytes"
                )
            new.used_at = self._clock()
            self._held.append(new)
            self._make_room()

    def delete(self, name: str) -> bool:
        """Let a named context go, and what goes on from it; returns whether it was there."""
        with self._lock:
            before = len(self._held)
            self._held = [held for held in self._held if name not in (held.name, held.root)]
            return len(self._held) < before

    def _drop_old(self) -> None:
        oldest = self._clock() - self._most_age_s
        self._held = [held for held in self._held if held.name is not None or held.used_at >= oldest]

    def _make_room(self) -> None:
        size = sum(held.nbytes for held in self._held)
        unnamed = sorted((held for held in self._held if held.name is None), key=lambda held: held.used_at)
        count = len(self._held)
        for held in unnamed:
            if size <= self.most_bytes and count <= MOST_HELD:
                return
            self._held.remove(held)
            size, count = size - held.nbytes, count - 1


def _covers(longer: Held, shorter: Held) -> bool:
    """Return whether every prompt that can go on from `shorter` can go on from `longer` as well."""
    length = len(shorter.context)
    return (
        longer.head <= max(shorter.head, LEAST_TOKENS)
        and length <= len(longer.context)
        and (shorter.root is None or shorter.root in (longer.root, longer.name))
        and shared_tokens(longer.context.token_ids, shorter.context.token_ids) == length
    )
