"""The contract between a session and an engine: caches, a prefiller, a decoder, and what else the engine can do.

Every executor implements `Executor`. What an executor cannot do stands in its `capabilities`; callers look there and
never probe the object. The optional methods raise BackendUnavailableError where the capability is not declared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeVar

import numpy as np

from chunkkv.cache_layout import CacheLayout, Slots
from chunkkv.errors import BackendUnavailableError
from chunkkv.executors.inside import BlockwisePrefiller, CancelSignal, Choice, HeadScorer
from chunkkv.requests import Request


@dataclass(frozen=True)
class Capabilities:
    """What an executor can do beyond prefilling prompts and decoding token by token.

    Parameters
    ----------
    reports_choice : bool
        Prefill tells which tokens it kept (`PrefillResult.choice`).
    blockwise_prefill : bool
        `blockwise_prefiller()` works: a prompt's whole cache can be read before it is compressed.
    block_scoring : bool
        `score_block()` works: the logits after every token of a block come from one call.
    layer_lengths : bool
        `layer_lengths_decoder()` works: the layers of a row may hold different numbers of tokens.
    elastic_rows : bool, default False
        `new_elastic_cache()` works: a cache whose rows take memory only for the tokens in them, so that one cache
        serves answers of every length.
    pool_bytes : int or None, default None
        Size of the memory that all caches of the executor share, in bytes. None means that every cache has memory of
        its own.
    continues_rows : bool, default False
        `continuer()` works: a row that is filled already goes on with a text, in blocks.
    window_per_request : bool, default False
        `Request.window` is obeyed; elsewhere every request has the engine's window.
    compresses_turns : bool, default False
        `Continuer.extend` may keep fewer tokens of that text than it has.
    rereads : bool, default False
        Prompts are scored by a second reading where requests ask for it (`Request.reread`).
    head_lengths : bool, default False
        `head_scorer()` works: every KV head may hold a number of tokens of its own.
    """

    reports_choice: bool
    blockwise_prefill: bool
    block_scoring: bool
    layer_lengths: bool
    elastic_rows: bool = False
    pool_bytes: int | None = None
    continues_rows: bool = False
    window_per_request: bool = False
    compresses_turns: bool = False
    rereads: bool = False
    head_lengths: bool = False


@dataclass(frozen=True)
class PrefillResult:
    """What prefill made of one prompt.

    Parameters
    ----------
    logits : numpy.ndarray or None
        Logits [vocab] float32 after the last prompt token; None where prefill was cancelled.
    choice : Choice or None, default None
        None where every token stays, or where the engine does not report its choice.
    prefill_s : float, default 0.0
        Seconds of prefill.
    compress_s : float, default 0.0
        Seconds of compression; 0 where the engine compacts within prefill.
    scratch_cache_bytes : int, default 0
        Bytes of keys and values that were alive for this prompt beside its own rows of the cache.
    kept_lengths : tuple of int or None, default None
        Slots that the kept tokens fill, one number for each length class of the engine's cache layout. None where they
        are those of the request (`Request.class_lengths`), which every engine knows before but one whose lengths depend
        on scores.
    """

    logits: np.ndarray | None
    choice: Choice | None = None
    prefill_s: float = 0.0
    compress_s: float = 0.0
    scratch_cache_bytes: int = 0
    kept_lengths: Slots | None = None


class PrefillProgress(Protocol):
    """Is told how far the prefill of the prompts of a call has come."""

    def __call__(self, done: int, total: int) -> None:
        """Take the tokens that are prefilled and those of all prompts together; called before, between and after."""


def no_progress(done: int, total: int) -> None:
    """Tell nobody: the PrefillProgress of a caller that does not ask."""


class KVCache(Protocol):
    """Keys and values of some rows; rows are independent requests. Only the executor that made it can read it."""

    @property
    def capacity(self) -> Slots:
        """Slots per row, one number for each length class."""

    def rows(self: CacheT, first: int, count: int) -> CacheT:
        """Return `count` rows from `first` as a cache that shares this cache's memory."""


class ElasticKVCache(Protocol):
    """A cache whose rows take memory only for the tokens in them, whatever its capacity."""

    def rows(self, first: int, count: int) -> KVCache:
        """Return `count` rows from `first` as a cache for a prefiller or a decoder; it shares this cache's memory."""

    def bytes_of(self, slots: Sequence[int]) -> int:
        """Return the bytes of memory that a row with so many filled slots takes, one number for each length class."""

    def release(self, row: int) -> None:
        """Give the memory of a row back; its slots are meaningless then."""

    def take_row(self, source: Any, source_row: int, row: int, slots: Sequence[int]) -> None:
        """Move the first `slots` slots of a row of `source` to `row`, and release the row there.

        `source` is an elastic cache of the same executor, or this one. `slots` has one number for each length class.
        """

    def slot_0(self, row: int) -> Sequence[np.ndarray]:
        """Return a copy of the slot that steps of other rows may overwrite while `row` is idle."""

    def restore_slot_0(self, row: int, held: Sequence[np.ndarray]) -> None:
        """Write back what slot_0() returned for this row."""


CacheT = TypeVar("CacheT", bound=KVCache)
CacheT_contra = TypeVar("CacheT_contra", bound=KVCache, contravariant=True)


class PrefillRun(Protocol):
    """A prefill in work, which goes on by one piece per step; dropping it gives it up."""

    @property
    def tokens_left(self) -> int:
        """Prompt tokens that no step has run yet; at 0 one more step may have to compress."""

    def step(self) -> list[PrefillResult] | None:
        """Run the next piece: a block where the engine prefills in blocks, else everything.

        Returns None before the last piece, after it one result per prompt. Must not be called again then.
        """


class Prefiller(Protocol[CacheT_contra]):
    """Runs prompts and leaves their kept tokens in the first slots of a cache; lives as long as one call needs it."""

    @property
    def max_rows(self) -> int:
        """Prompts that one run takes."""

    def start(
        self, requests: Sequence[Request], out: CacheT_contra, progress: PrefillProgress = no_progress
    ) -> PrefillRun:
        """Return the prefill of at most `max_rows` prompts into `out`, a cache of as many rows, before its first step.

        Slots behind the kept tokens are meaningless afterwards, and those of a prefill that was given up are, too.
        `progress` is told where a prompt runs in several blocks. A prefiller has one run in work at a time.
        """

    def run(
        self,
        requests: Sequence[Request],
        out: CacheT_contra,
        cancel: CancelSignal,
        progress: PrefillProgress = no_progress,
    ) -> list[PrefillResult]:
        """Prefill as start() says, in one go.

        Where `cancel` is set before a step, the prompts' logits are None and their rows are meaningless.
        """
        run = self.start(requests, out, progress)
        while not cancel.is_set():
            if (results := run.step()) is not None:
                return results
        return [PrefillResult(None) for _ in requests]


class Decoder(Protocol):
    """Appends one token at a time to rows of one cache."""

    def step(
        self, rows: Sequence[int], tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int] | np.ndarray
    ) -> np.ndarray:
        """Append one token to each row in `rows` and return its logits [len(rows),vocab] float32, a new array.

        Rows that are not named are idle. An executor may overwrite slot 0 of an idle row and nothing else, so a row
        takes part in every step from its prefill to its last token.

        Parameters
        ----------
        rows : sequence of int
            Different rows of the cache, at least one, each with a prefilled prompt.
        tokens : sequence of int
            Per row the token id to append.
        positions : sequence of int
            Per row the logical position of that token: how many tokens of prompt and answer come before it.
        slots : sequence of int, or numpy.ndarray
            Per row the cache slot to write, which is the number of slots filled so far; compression makes it smaller
            than the position. An engine of several length classes takes [length_classes,len(rows)], a decoder from
            `layer_lengths_decoder` [layers,len(rows)].

        Raises
        ------
        EngineRunError
            A slot lies beyond the cache, or the engine fails.
        """


class Continuer(Protocol[CacheT_contra]):
    """Goes on with rows whose first slots are filled; every cache here has one row. Lives as long as a call needs it.

    `slots` are always the numbers of slots that are filled, one for each length class of the engine's cache layout.
    """

    @property
    def block(self) -> int:
        """The most tokens that one call of `append` takes."""

    def copy(self, source: CacheT_contra, slots: Sequence[int], out: CacheT_contra) -> None:
        """Copy the filled slots of `source` to the first slots of `out`; `source` stays as it is."""

    def append(self, cache: CacheT_contra, ids: np.ndarray, slots: Sequence[int], position: int) -> np.ndarray:
        """Append the tokens ids [S] int64 to `cache` and return the logits [vocab] float32 after the last of them.

        Parameters
        ----------
        cache : KVCache
            The row, with at least S free slots in every length class.
        ids : numpy.ndarray
            1 to `block` token ids.
        slots : sequence of int
            Slots that are filled.
        position : int
            Logical position of the first token.
        """

    def extend(
        self,
        cache: CacheT_contra,
        slots: Sequence[int],
        position: int,
        request: Request,
        cancel: CancelSignal,
        progress: PrefillProgress = no_progress,
    ) -> PrefillResult:
        """Append all tokens of `request`, of which as many stay as a prompt of its own would keep.

        The text is compressed by its own keys and queries, which have seen the row, or by a second reading of it where
        the request asks for one. `cache` needs room for `request.class_lengths` more slots only; the result says in
        `kept_lengths` how many of them are filled. Keeping less than all needs capability `compresses_turns`.
        """

    def to_host(self, cache: CacheT_contra, slots: Sequence[int]) -> dict[str, np.ndarray]:
        """Return the filled slots of each part, [H,N,D] in the engine's type: key.0, value.0, key.1 and so on."""

    def from_host(self, arrays: Mapping[str, np.ndarray], cache: CacheT_contra) -> None:
        """Write arrays as `to_host` returns them to the first slots of `cache`."""

    def host_layout(self, slots: Sequence[int]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Return type and shape of the arrays that `to_host` returns for so many filled slots, in its order."""


class Executor(Protocol[CacheT]):
    """The graphs of one engine directory, ready to run; thread-safe, each call on caches of its own."""

    @property
    def capabilities(self) -> Capabilities:
        """What this executor can do beyond prefill and decode."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token takes that is cached in all heads of all layers."""

    @property
    def cache_layout(self) -> CacheLayout:
        """Which heads of which layer hold equally many tokens."""

    def capacity_for(self, tokens: int | Sequence[int]) -> Slots:
        """Return the slots that a cache for `tokens` tokens has; raises RequestError where the engine has none.

        `tokens` and the result are one number for each length class; a single number of tokens holds for all classes.
        """

    def new_cache(self, rows: int, capacity: int | Sequence[int]) -> CacheT:
        """Return an empty cache; `capacity` comes from capacity_for. Raises CacheFullError where a pool is full."""

    def cache_bytes(self, slots: Sequence[int]) -> int:
        """Return the bytes of a row of `slots` slots, one number for each length class."""
        heads = self.cache_layout.heads
        head_bytes = self.kv_bytes_per_token // sum(heads)
        return head_bytes * sum(count * filled for count, filled in zip(heads, slots, strict=True))

    def new_elastic_cache(self, rows: int, capacity: int | Sequence[int]) -> ElasticKVCache:
        """Return an empty cache of at least `capacity` slots per row; needs capability `elastic_rows`.

        prefiller() and decoder() take it like any other cache.
        """
        _refuse("give rows memory as they grow")

    def prefiller(self) -> Prefiller[CacheT]:
        """Return what prefills the prompts of one call."""

    def decoder(self, cache: CacheT) -> Decoder:
        """Return what appends tokens to the rows of `cache`; it keeps the cache alive."""

    def blockwise_prefiller(self) -> BlockwisePrefiller:
        """Return prefill and compression as two calls; needs capability `blockwise_prefill`."""
        _refuse("hand out a prompt's whole cache")

    def score_block(self, cache: CacheT, ids: np.ndarray, slot: int | Sequence[int], position: int) -> np.ndarray:
        """Append the tokens ids [S] int64 to a cache of one row and return the logits [S,vocab] after each of them.

        The first one is written to `slot`, one number for each length class or one for all of them, and stands at
        logical `position`. Needs capability `block_scoring`.
        """
        _refuse("score a block of tokens at once")

    def layer_lengths_decoder(self, cache: CacheT) -> Decoder:
        """Return a decoder whose steps take slots [layers,rows]; needs capability `layer_lengths`."""
        _refuse("decode over layers of different lengths")

    def head_scorer(self) -> HeadScorer:
        """Return what scores blocks behind kept tokens of any number per head; needs capability `head_lengths`."""
        _refuse("hold another number of tokens in every head")

    def continuer(self) -> Continuer[CacheT]:
        """Return what goes on with filled rows; needs capability `continues_rows`."""
        _refuse("continue a context")


def _refuse(ability: str) -> NoReturn:
    raise BackendUnavailableError(f"this engine cannot {ability}: build the checkpoint for backend onnxruntime")
