"""What a batcher asks of the memory that answers decode in: seats, the rows they take, and pools that hand them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from chunkkv.cache_layout import Slots
from chunkkv.executors.interface import Decoder, KVCache, PrefillRun
from chunkkv.requests import Request


@dataclass(frozen=True)
class Needs:
    """What a request needs of a cache.

    Parameters
    ----------
    kept : tuple of int
        Slots that the prompt fills, one number for each length class.
    row : tuple of int
        Slots that prompt and answer fill in the end.
    whole_tokens : int, default 0
        Tokens of a prompt that is in memory as a whole until it is compressed; 0 for one that keeps everything.
    """

    kept: Slots
    row: Slots
    whole_tokens: int = 0

    @classmethod
    def of(cls, request: Request, new_tokens: int) -> Needs:
        """Return what `request` needs with an answer of at most `new_tokens` tokens."""
        compresses = request.kept_tokens < len(request.ids)
        return cls(request.class_lengths, request.slots(new_tokens), len(request.ids) if compresses else 0)


class Batch(Protocol):
    """Rows of one cache, which decode together."""

    def row_cache(self, row: int) -> KVCache:
        """Return a row as a cache of its own that shares the memory."""

    def decoder(self) -> Decoder:
        """Return a decoder over the rows that are taken."""

    def compact(self) -> Sequence[tuple[int, int]]:
        """Return rows that should move, (from, to), so that steps compute fewer idle rows."""

    def move(self, source: int, target: int, slots: Slots) -> None:
        """Move the first slots of a taken row to a free one."""


class Seat(Protocol):
    """The place of one request: memory for its prefill, then a row of a batch for its answer."""

    @property
    def batch(self) -> Batch:
        """Where the answer decodes."""

    @property
    def row(self) -> int:
        """Its row there; settled after the prefill."""

    @row.setter
    def row(self, row: int) -> None: ...

    @property
    def capacity(self) -> Slots:
        """Slots that are set aside for the request."""

    def prefill(self, request: Request) -> PrefillRun:
        """Return the prefill of the request into this seat."""

    def settle(self, kept: Slots) -> None:
        """Take the row in which the answer decodes; the prefill is over and has filled `kept` slots."""

    def copy_from(self, other: Seat, kept: Slots) -> None:
        """Take a row as settle() does, with a copy of the `kept` first slots of a seat that decodes; no prefill."""

    def leave(self) -> None:
        """Give everything back."""


class Pool(Protocol):
    """Hands out seats within a bound of memory."""

    @property
    def prefills_in_pieces(self) -> bool:
        """Whether others may decode between the blocks of a prompt."""

    @property
    def allocated_bytes(self) -> int:
        """Bytes of KV cache that are set aside for requests."""

    @property
    def bound(self) -> int | None:
        """Most bytes that all KV caches together may take; None allocates as needed."""

    def could_hold(self, needs: Needs) -> bool:
        """Return whether an empty pool has room."""

    def fits(self, needs: Needs) -> bool:
        """Return whether there is room now."""

    def take(self, needs: Needs) -> Seat:
        """Return a seat for what fits; raises CacheFullError where the engine finds no memory all the same."""

    def busy(self) -> Sequence[Batch]:
        """Return the batches in which answers decode."""

    def discard(self, batch: Batch) -> None:
        """Forget a batch whose cache cannot be trusted; its seats may still leave."""
