"""Seats on one cache for answers of every length, admitted by the tokens that they need.

The cache has as many slots per row as the longest answer may need, and a row takes memory only for the tokens in it
(ElasticKVCache). A prompt is prefilled into a cache of its own, and what it keeps then moves to the lowest free row, so
that no row lies idle meanwhile. A question behind a context is short and what it copies is long, so it is prefilled in
the row itself.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from chunkkv.batching.free_rows import FreeRows
from chunkkv.batching.seats import Needs, Seat
from chunkkv.cache_layout import Slots
from chunkkv.contexts import ContinuedRequest, start_prefill
from chunkkv.errors import CacheFullError
from chunkkv.executors.interface import Decoder, ElasticKVCache, Executor, KVCache, PrefillResult, PrefillRun
from chunkkv.requests import Request

_FEW_ROWS = 2  # so few idle rows cost less than to move one
_NO_ROW = -1


class ElasticBatch:
    """The rows of one elastic cache; the lowest free row is taken first, so that steps stay small.

    Parameters
    ----------
    executor : Executor
        Makes the cache and its decoders.
    rows : int
        Most rows.
    capacity : int
        Slots per row.
    """

    def __init__(self, executor: Executor[KVCache], rows: int, capacity: int) -> None:
        self._executor = executor
        self.cache, self.rows = _largest_cache(executor, rows, capacity)
        self._rows = FreeRows(self.rows)
        self._filling: set[int] = set()
        self._decoder: tuple[int, Decoder] | None = None

    @property
    def is_idle(self) -> bool:
        """Whether no row decodes."""
        return self._rows.taken == len(self._filling)

    def take(self, filling: bool = False) -> int:
        """Return a free row, now taken; `filling` for one that does not decode yet."""
        row = self._rows.take()
        if filling:
            self._filling.add(row)
        return row

    def begin(self, row: int) -> None:
        """Let a row that was filled decode."""
        self._filling.remove(row)

    def free(self, row: int) -> None:
        """Give a row and its memory back."""
        self._filling.discard(row)
        self._rows.free(row)
        self.cache.release(row)
        if self.is_idle:
            self._decoder = None  # its buffers are as large as the batch was

    def decoder(self) -> Decoder:
        """Return a decoder over the first rows of the cache, enough for all that decode.

        It computes every one of its rows, idle or not, and holds buffers for each, so only the last one is kept.
        """
        rows = self._computed_rows(self._rows.last_taken(but=self._filling) + 1)
        if self._decoder is None or self._decoder[0] != rows:
            self._decoder = None  # frees its buffers first
            self._decoder = rows, self._executor.decoder(self.cache.rows(0, rows))
        return self._decoder[1]

    def row_cache(self, row: int) -> KVCache:
        """Return a row as a cache of its own that shares the memory."""
        return self.cache.rows(row, 1)

    def compact(self) -> Sequence[tuple[int, int]]:
        """Return the last row and the first free one where a step computes as many idle rows as decoding ones."""
        last, decoding = self._rows.last_taken(but=self._filling), self._rows.taken - len(self._filling)
        computed = self._computed_rows(last + 1)
        wasteful = computed >= 2 * decoding and computed > _FEW_ROWS
        return [(last, free)] if wasteful and (free := self._rows.lowest_free) < last else []

    def move(self, source: int, target: int, slots: Slots) -> None:
        """Move the first slots of a taken row to the lowest free one, as compact() says."""
        taken = self._rows.take()
        assert taken == target
        self.cache.take_row(self.cache, source, target, slots)
        self._rows.free(source)

    def _computed_rows(self, needed: int) -> int:
        """Return the rows of a decoder: few different numbers, and at most an eighth more than needed above 8."""
        unit = max(1, (1 << (needed - 1).bit_length()) // 8)
        rows = -(-needed // unit) * unit if needed > 8 else 1 << (needed - 1).bit_length()
        return min(rows, self.rows)


class FillingRow:
    """A prefill in a row of a batch. Between its steps others decode, and overwrite slot 0 of idle rows.

    Parameters
    ----------
    run : PrefillRun
        The prefill.
    cache : ElasticKVCache
        The batch's cache.
    row : int
        The row.
    """

    def __init__(self, run: PrefillRun, cache: ElasticKVCache, row: int) -> None:
        self._run, self._cache, self._row = run, cache, row
        self._slot_0: Sequence[np.ndarray] | None = None

    @property
    def tokens_left(self) -> int:
        """See PrefillRun."""
        return self._run.tokens_left

    def step(self) -> list[PrefillResult] | None:
        """Run the next piece; see PrefillRun."""
        if self._slot_0 is not None:
            self._cache.restore_slot_0(self._row, self._slot_0)
        results = self._run.step()
        self._slot_0 = self._cache.slot_0(self._row)
        return results


class ElasticSeat:
    """A request's memory: while it is prefilled a cache of its own, then a row of the batch; behind a context the row.

    Parameters
    ----------
    pool : ElasticPool
        Counts the bytes.
    needs : Needs
        What the request needs.
    """

    def __init__(self, pool: ElasticPool, needs: Needs) -> None:
        self._pool, self._needs, self.batch = pool, needs, pool.batch
        self.capacity, self.row = needs.row, _NO_ROW
        self.bytes = pool.prefill_bytes(needs)
        self._staging: ElasticKVCache | None = None

    def prefill(self, request: Request) -> PrefillRun:
        """Return the prefill of the request; see the module's text."""
        executor = self._pool.executor
        if isinstance(request, ContinuedRequest):
            self.row = self.batch.take(filling=True)
            run = start_prefill(executor, executor.prefiller(), [request], self.batch.row_cache(self.row))
            return FillingRow(run, self.batch.cache, self.row)
        self._staging = executor.new_elastic_cache(1, self._needs.kept)
        return start_prefill(executor, executor.prefiller(), [request], self._staging.rows(0, 1))

    def settle(self, kept: Slots) -> None:
        """Have what the prompt keeps in a row of the batch; memory that only the prefill needed is free again."""
        if self._staging is not None:
            self._move(self._staging, 0, kept)
            self._staging = None
        elif self.batch is self._pool.batch:
            self.batch.begin(self.row)
        else:  # a step has failed meanwhile, which costs an idle row nothing but its slot 0
            left, row = self.batch, self.row
            self._move(left.cache, row, kept)
            left.free(row)
        self._pool.resize(self, self._pool.row_bytes(self._needs))

    def copy_from(self, other: Seat, kept: Slots) -> None:
        """Take a row with a copy of the first slots of another seat's."""
        self.batch = self._pool.batch
        self.row = self.batch.take()
        source = other.batch.row_cache(other.row)
        self._pool.executor.continuer().copy(source, kept, self.batch.row_cache(self.row))

    def leave(self) -> None:
        """Give the row and its memory back."""
        if self.row != _NO_ROW:
            self.batch.free(self.row)
        self.row, self._staging = _NO_ROW, None
        self._pool.resize(self, 0)

    def _move(self, source: ElasticKVCache, row: int, kept: Slots) -> None:
        """Take a row of the current batch, and move the first slots of a row of `source` there."""
        self.batch = self._pool.batch  # another one than at the start, if a step has failed since
        self.row = self.batch.take()
        self.batch.cache.take_row(source, row, self.row, kept)


class ElasticPool:
    """Seats of exact size on one cache.

    Parameters
    ----------
    executor : Executor
        Makes the caches; it has capability `elastic_rows`.
    slots : int
        Most requests that are prefilled or decode at once.
    max_tokens : int
        Most slots of a row.
    bound : int or None
        Most bytes of all rows and prefills together; None allocates as needed.
    """

    prefills_in_pieces = True

    def __init__(self, executor: Executor[KVCache], slots: int, max_tokens: int, bound: int | None) -> None:
        self.executor, self.bound = executor, bound
        self._slots, self._max_tokens = slots, max_tokens
        self.batch = ElasticBatch(executor, slots, max_tokens)
        self._lock = threading.Lock()  # load() asks from other threads
        self._seats = 0
        self._reserved = 0

    @property
    def allocated_bytes(self) -> int:
        """Bytes that are set aside for requests."""
        return self._reserved

    def row_bytes(self, needs: Needs) -> int:
        """Return the bytes of a row at the end of the answer."""
        return self.batch.cache.bytes_of(needs.row)

    def prefill_bytes(self, needs: Needs) -> int:
        """Return the most bytes that a request holds from its prefill to its end.

        A prompt that is compressed is in memory as a whole beside what it keeps.
        """
        cache = self.batch.cache
        if not needs.whole_tokens:
            return self.row_bytes(needs)
        whole = cache.bytes_of(self.executor.cache_layout.slots(needs.whole_tokens))
        return max(self.row_bytes(needs), whole + cache.bytes_of(needs.kept))

    def could_hold(self, needs: Needs) -> bool:
        """Return whether an empty pool has room."""
        return self.bound is None or self.prefill_bytes(needs) <= self.bound

    def fits(self, needs: Needs) -> bool:
        """Return whether there is room now."""
        room = self.bound is None or self._reserved + self.prefill_bytes(needs) <= self.bound
        return room and self._seats < self.batch.rows

    def take(self, needs: Needs) -> ElasticSeat:
        """Return a seat for what fits."""
        seat = ElasticSeat(self, needs)
        with self._lock:
            self._seats += 1
            self._reserved += seat.bytes
        return seat

    def resize(self, seat: ElasticSeat, size: int) -> None:
        """Set the bytes that are set aside for a seat; at 0 it has left."""
        with self._lock:
            self._reserved += size - seat.bytes
            if size == 0 and seat.bytes > 0:
                self._seats -= 1
            seat.bytes = size

    def busy(self) -> Sequence[ElasticBatch]:
        """Return the batch where answers decode in it."""
        return [] if self.batch.is_idle else [self.batch]

    def discard(self, batch: object) -> None:
        """Go on with a new cache; seats on the old one may still leave."""
        self.batch = ElasticBatch(self.executor, self._slots, self._max_tokens)


def _largest_cache(executor: Executor[KVCache], rows: int, capacity: int) -> tuple[ElasticKVCache, int]:
    """Return a cache of `rows` rows, or of as many as the system gives address space for, and their number."""
    while True:
        try:
            return executor.new_elastic_cache(rows, capacity), rows
        except CacheFullError:
            if rows == 1:
                raise
            rows = rows // 2
