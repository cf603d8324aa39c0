"""Seats in caches of fixed sizes, each with rows that decode together: for engines whose rows have memory of their own.

A row has the slots of its cache, used or not. Answers of different lengths share a cache where a larger one is in use
already, because a step costs about as much for one row as for several.
"""

from __future__ import annotations

from collections.abc import Sequence

from chunkkv.batching.free_rows import FreeRows
from chunkkv.batching.seats import Needs, Seat
from chunkkv.cache_layout import Slots
from chunkkv.contexts import start_prefill
from chunkkv.errors import CacheFullError, RequestError
from chunkkv.executors.interface import Decoder, Executor, KVCache, PrefillRun
from chunkkv.requests import Request

SMALLEST_CAPACITY = 128


class CacheBucket:
    """A cache whose rows are given to answers one by one; the lowest free row is taken first, so steps stay small.

    Parameters
    ----------
    executor : Executor
        Makes the cache and its decoders.
    capacity : tuple of int
        Slots per row, one number for each length class.
    rows : int
        Rows of the cache.
    """

    def __init__(self, executor: Executor[KVCache], capacity: Slots, rows: int) -> None:
        self._executor, self.capacity, self.rows = executor, capacity, rows
        self.cache = executor.new_cache(rows, capacity)
        self._rows = FreeRows(rows)
        self._decoders: dict[int, Decoder] = {}

    @property
    def is_idle(self) -> bool:
        """Whether no row is taken."""
        return self._rows.is_idle

    @property
    def is_full(self) -> bool:
        """Whether every row is taken."""
        return self._rows.is_full

    def take(self) -> int:
        """Return a free row, now taken."""
        return self._rows.take()

    def free(self, row: int) -> None:
        """Give a row back."""
        self._rows.free(row)

    def decoder(self) -> Decoder:
        """Return a decoder over the first rows of the cache, enough for all taken ones.

        Most engines compute every row of a decoder, idle or not. Powers of two keep the idle ones below the taken ones
        and the decoders few: each holds buffers, and on a GPU a captured graph, of its own.
        """
        needed = self._rows.last_taken() + 1
        rows = min(1 << (needed - 1).bit_length(), self.rows)
        if rows not in self._decoders:
            self._decoders[rows] = self._executor.decoder(self.cache.rows(0, rows))
        return self._decoders[rows]

    def row_cache(self, row: int) -> KVCache:
        """Return a row as a cache of its own that shares the memory."""
        return self.cache.rows(row, 1)

    def compact(self) -> Sequence[tuple[int, int]]:
        """Return no moves: rows stay where they are."""
        return []

    def move(self, source: int, target: int, slots: Slots) -> None:
        """Refuse; compact() asks for no move."""
        raise NotImplementedError("rows of a bucket do not move")


class BucketSeat:
    """A row of a bucket, for the prefill and for the answer.

    Parameters
    ----------
    executor : Executor
        Prefills.
    batch : CacheBucket
        The bucket.
    """

    def __init__(self, executor: Executor[KVCache], batch: CacheBucket) -> None:
        self._executor, self.batch = executor, batch
        self.capacity, self.row, self._taken = batch.capacity, batch.take(), True

    def prefill(self, request: Request) -> PrefillRun:
        """Return the prefill of the request into its row."""
        executor = self._executor
        return start_prefill(executor, executor.prefiller(), [request], self.batch.cache.rows(self.row, 1))

    def settle(self, kept: Slots) -> None:
        """Do nothing: the answer decodes where its prompt was prefilled."""

    def copy_from(self, other: Seat, kept: Slots) -> None:
        """Fill the row with a copy of the first slots of another; the engine continues rows."""
        source, row = other.batch.row_cache(other.row), self.batch.row_cache(self.row)
        self._executor.continuer().copy(source, kept, row)

    def leave(self) -> None:
        """Give the row back."""
        if self._taken:
            self.batch.free(self.row)
        self._taken = False


class BucketPool:
    """The buckets of one batcher, by capacity: made when first needed, dropped when idle and their room is needed.

    Parameters
    ----------
    executor : Executor
        Makes the caches.
    slots : int
        Most rows of a bucket.
    max_tokens : int
        Most slots of a row.
    bound : int or None
        Most bytes of all caches together; None allocates as needed.
    """

    prefills_in_pieces = False  # an idle row is written to by steps of the others

    def __init__(self, executor: Executor[KVCache], slots: int, max_tokens: int, bound: int | None) -> None:
        self._executor, self._slots, self._max_tokens, self.bound = executor, slots, max_tokens, bound
        self._buckets: dict[Slots, CacheBucket] = {}

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all caches."""
        # copied, because load() asks from other threads
        return sum(self._bytes(bucket.capacity, bucket.rows) for bucket in list(self._buckets.values()))

    def could_hold(self, needs: Needs) -> bool:
        """Return whether an empty pool has room."""
        return self.bound is None or self._bytes(self._capacity(needs.row), 1) <= self.bound

    def fits(self, needs: Needs) -> bool:
        """Return whether there is room now."""
        return self._bucket(self._capacity(needs.row)) is not None

    def take(self, needs: Needs) -> BucketSeat:
        """Return a seat for what fits; raises CacheFullError where the engine's own pool is full."""
        bucket = self._bucket(self._capacity(needs.row))
        if bucket is None:
            raise CacheFullError(f"no cache has {max(needs.row)} free slots; ask again later")
        return BucketSeat(self._executor, bucket)

    def _bucket(self, capacity: Slots) -> CacheBucket | None:
        """Return a bucket with a free row: a busy one where there is one, because its step costs little more then."""
        fitting = [self._buckets[size] for size in sorted(self._buckets) if _holds(size, capacity)]
        free = [bucket for bucket in fitting if not bucket.is_full]
        busy = [bucket for bucket in free if not bucket.is_idle]
        if not busy and capacity not in self._buckets and (made := self._make(capacity)) is not None:
            return made
        return next(iter(busy or free), None)

    def busy(self) -> Sequence[CacheBucket]:
        """Return the buckets with answers."""
        return [bucket for bucket in self._buckets.values() if not bucket.is_idle]

    def discard(self, batch: object) -> None:
        """Forget a bucket whose cache cannot be trusted; its seats may still leave."""
        self._buckets = {size: bucket for size, bucket in self._buckets.items() if bucket is not batch}

    def _make(self, capacity: Slots) -> CacheBucket | None:
        rows = self._slots
        if self.bound is not None:
            for size in [size for size, bucket in self._buckets.items() if bucket.is_idle]:
                if self.bound - self.allocated_bytes >= self._bytes(capacity, rows):
                    break
                del self._buckets[size]
            rows = min(rows, (self.bound - self.allocated_bytes) // self._bytes(capacity, 1))
        if rows < 1:
            return None
        self._buckets[capacity] = CacheBucket(self._executor, capacity, rows)
        return self._buckets[capacity]

    def _capacity(self, slots: Slots) -> Slots:
        """Return the slots of the bucket for `slots`: powers of two, so that few buckets serve every length."""
        rounded = (max(SMALLEST_CAPACITY, 1 << (count - 1).bit_length()) for count in slots)
        try:
            return self._executor.capacity_for(
                tuple(min(most, max(self._max_tokens, count)) for most, count in zip(rounded, slots, strict=True))
            )
        except RequestError:  # the engine has no cache that large, but maybe one that is large enough
            return self._executor.capacity_for(slots)

    def _bytes(self, capacity: Slots, rows: int) -> int:
        return rows * self._executor.cache_bytes(capacity)


def _holds(size: Slots, needed: Slots) -> bool:
    """Return whether a row of `size` slots has room for one of `needed` slots."""
    return all(have >= want for have, want in zip(size, needed, strict=True))
