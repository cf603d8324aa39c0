"""Where the answers of a batcher lie: a pool of KV caches by capacity, each with rows that decode together."""

from __future__ import annotations

import heapq
from typing import NamedTuple

from chunkkv.cache_layout import Slots
from chunkkv.errors import RequestError
from chunkkv.executors.interface import Decoder, Executor, KVCache
from chunkkv.session import ChunkKVSession

SMALLEST_CAPACITY = 128


class CacheRow(NamedTuple):
    """One row of a bucket, taken by one answer."""

    bucket: CacheBucket
    row: int


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
        self._free = list(range(rows))  # a heap
        self._taken: set[int] = set()
        self._decoders: dict[int, Decoder] = {}

    @property
    def is_idle(self) -> bool:
        """Whether no row is taken."""
        return not self._taken

    @property
    def is_full(self) -> bool:
        """Whether every row is taken."""
        return not self._free

    def take(self) -> int:
        """Return a free row, now taken."""
        row = heapq.heappop(self._free)
        self._taken.add(row)
        return row

    def free(self, row: int) -> None:
        """Give a row back."""
        self._taken.remove(row)
        heapq.heappush(self._free, row)

    def decoder(self) -> Decoder:
        """Return a decoder over the first rows of the cache, enough for all taken ones.

        Most engines compute every row of a decoder, idle or not. Powers of two keep the idle ones below the taken ones
        and the decoders few: each holds buffers, and on a GPU a captured graph, of its own.
        """
        needed = max(self._taken) + 1
        rows = min(1 << (needed - 1).bit_length(), self.rows)
        if rows not in self._decoders:
            self._decoders[rows] = self._executor.decoder(self.cache.rows(0, rows))
        return self._decoders[rows]


class CachePool:
    """The buckets of one batcher, by capacity: made when first needed, dropped when idle and their room is needed.

    Parameters
    ----------
    executor : Executor
        Makes the caches.
    slots : int
        Most rows of a bucket.
    max_tokens : int
        Most slots of a row.
    kv_bytes : int or None
        Most bytes of all caches together; None allocates as needed.
    """

    def __init__(self, executor: Executor[KVCache], slots: int, max_tokens: int, kv_bytes: int | None) -> None:
        self._executor, self._slots, self._max_tokens, self._kv_bytes = executor, slots, max_tokens, kv_bytes
        self._buckets: dict[Slots, CacheBucket] = {}

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all caches."""
        # copied, because load() asks from other threads
        return sum(self._bytes(bucket.capacity, bucket.rows) for bucket in list(self._buckets.values()))

    def could_hold(self, slots: Slots) -> bool:
        """Return whether an empty pool has room for an answer of `slots` slots, one number for each length class."""
        return self._kv_bytes is None or self._bytes(self._capacity(slots), 1) <= self._kv_bytes

    def take_row(self, slots: Slots) -> CacheRow | None:
        """Return a row for an answer that needs `slots` slots of cache, None where it has to wait for one."""
        capacity = self._capacity(slots)
        bucket = self._buckets.get(capacity)
        if bucket is None:
            bucket = self._make(capacity)
        if bucket is None or bucket.is_full:
            larger = (self._buckets[size] for size in sorted(self._buckets) if _is_larger(size, capacity))
            bucket = next((other for other in larger if not other.is_full), None)
        return None if bucket is None else CacheRow(bucket, bucket.take())

    def busy(self) -> list[CacheBucket]:
        """Return the buckets with answers."""
        return [bucket for bucket in self._buckets.values() if not bucket.is_idle]

    def discard(self, bucket: CacheBucket) -> None:
        """Forget a bucket whose cache cannot be trusted; its rows may still be given back to it."""
        self._buckets.pop(bucket.capacity, None)

    def _make(self, capacity: Slots) -> CacheBucket | None:
        rows = self._slots
        if self._kv_bytes is not None:
            for size in [size for size, bucket in self._buckets.items() if bucket.is_idle]:
                if self._kv_bytes - self.allocated_bytes >= self._bytes(capacity, rows):
                    break
                del self._buckets[size]
            rows = min(rows, (self._kv_bytes - self.allocated_bytes) // self._bytes(capacity, 1))
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


def _is_larger(size: Slots, needed: Slots) -> bool:
    """Return whether a row of `size` slots has room for one of `needed` slots, and is another."""
    return size != needed and all(have >= want for have, want in zip(size, needed, strict=True))


def cache_bytes(session: ChunkKVSession, kv_bytes: int | None) -> int | None:
    """Return the bytes that a batcher's caches may take, at most `kv_bytes`; None is as many as needed.

    An engine with a pool prefills whole prompts into it, so room for the longest one stays out of reach of the caches,
    but never more than half of the pool.
    """
    executor = session.executor
    pool = executor.capabilities.pool_bytes
    if pool is None:
        return kv_bytes
    longest = executor.cache_bytes(executor.capacity_for(session.limits.max_input_len))
    room = max(pool - longest, pool // 2)
    return room if kv_bytes is None else min(room, kv_bytes)
