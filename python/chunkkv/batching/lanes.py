"""Where the answers of a batcher lie: lanes, each a cache whose rows decode together."""

from __future__ import annotations

import heapq
from typing import NamedTuple

from chunkkv.errors import RequestError
from chunkkv.executors.interface import Decoder, Executor
from chunkkv.session import ChunkKVSession

SMALLEST_CAPACITY = 128


class Seat(NamedTuple):
    """One row of a lane."""

    lane: Lane
    row: int


class Lane:
    """A cache of `rows` rows of `capacity` slots; the lowest free row is taken first, so that steps stay small."""

    def __init__(self, executor: Executor, capacity: int, rows: int) -> None:
        self._executor, self.capacity, self.rows = executor, capacity, rows
        self.cache = executor.new_cache(rows, capacity)
        self._free = list(range(rows))
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
        """Return the step of the taken rows, over the next power of two of them.

        Rows without an answer ride along: they write their slot 0, which the next prefill overwrites.
        """
        wanted = max(self._taken) + 1
        rows = min(1 << (wanted - 1).bit_length(), self.rows)
        if rows not in self._decoders:
            self._decoders[rows] = self._executor.decoder(self.cache.rows(0, rows))
        decoder = self._decoders[rows]
        decoder.input_ids[:] = decoder.position_ids[:] = 0
        decoder.cache_lengths[:] = 0
        return decoder


class Lanes:
    """The lanes of one batcher, by capacity: made when first needed, dropped when idle and the room is needed.

    At most `slots` rows per lane, `max_tokens` slots per row, and `kv_bytes` (None = any) for all caches together.
    """

    def __init__(self, executor: Executor, slots: int, max_tokens: int, kv_bytes: int | None) -> None:
        self._executor, self._slots, self._max_tokens, self._kv_bytes = executor, slots, max_tokens, kv_bytes
        self._lanes: dict[int, Lane] = {}

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all caches."""
        return sum(self._bytes(lane.capacity, lane.rows) for lane in list(self._lanes.values()))

    def could_hold(self, tokens: int) -> bool:
        """Return whether an empty batcher has room for an answer of `tokens` tokens."""
        return self._kv_bytes is None or self._bytes(self._capacity(tokens), 1) <= self._kv_bytes

    def seat(self, tokens: int) -> Seat | None:
        """Return a seat for an answer that needs `tokens` tokens of cache, None where it has to wait for one."""
        capacity = self._capacity(tokens)
        lane = self._lanes.get(capacity)
        if lane is None:
            lane = self._make(capacity)
        if lane is None or lane.is_full:
            larger = (self._lanes[size] for size in sorted(self._lanes) if size > capacity)
            lane = next((other for other in larger if not other.is_full), None)
        return None if lane is None else Seat(lane, lane.take())

    def busy(self) -> list[Lane]:
        """Return the lanes with answers."""
        return [lane for lane in self._lanes.values() if not lane.is_idle]

    def discard(self, lane: Lane) -> None:
        """Forget a lane whose cache cannot be trusted; its seats may still be given back to it."""
        self._lanes.pop(lane.capacity, None)

    def _make(self, capacity: int) -> Lane | None:
        rows = self._slots
        if self._kv_bytes is not None:
            for size in [size for size, lane in self._lanes.items() if lane.is_idle]:
                if self._kv_bytes - self.allocated_bytes >= self._bytes(capacity, rows):
                    break
                del self._lanes[size]
            rows = min(rows, (self._kv_bytes - self.allocated_bytes) // self._bytes(capacity, 1))
        if rows < 1:
            return None
        self._lanes[capacity] = Lane(self._executor, capacity, rows)
        return self._lanes[capacity]

    def _capacity(self, tokens: int) -> int:
        """Return the slots of the lane for `tokens`: powers of two, so that few lanes serve every length."""
        rounded = max(SMALLEST_CAPACITY, 1 << (tokens - 1).bit_length())
        try:
            return self._executor.capacity_for(min(rounded, max(self._max_tokens, tokens)))
        except RequestError:
            return self._executor.capacity_for(tokens)

    def _bytes(self, capacity: int, rows: int) -> int:
        return capacity * rows * self._executor.kv_bytes_per_token


def room_for(session: ChunkKVSession, kv_bytes: int | None) -> int | None:
    """Return the bytes that lanes may take: of an engine with a pool, what is left beside its longest prompt."""
    executor = session.executor
    pool = getattr(executor, "kv_pool_bytes", None)
    if pool is None:
        return kv_bytes
    longest = executor.capacity_for(session.limits.max_input_len) * executor.kv_bytes_per_token
    room = max(pool - longest, pool // 2)
    return room if kv_bytes is None else min(room, kv_bytes)
