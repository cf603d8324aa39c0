"""Who owns which block of a paged KV cache: reserved for a sequence, taken as it grows, given back after prefill.

A sequence may grow up to what was reserved for it whatever others do; beyond that, as a prompt does before it is
compacted, it takes blocks that nobody has reserved. So decoding never runs out of blocks, only prefill may.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from chunkkv.errors import CacheFullError


@dataclass
class _Sequence:
    reserved: int
    blocks: list[int] = field(default_factory=list)


class BlockManager:
    """The blocks of one pool, shared by the sequences of all callers; thread-safe.

    Invariants: a block is free or owned by one sequence; the free blocks suffice for every reservation.

    Parameters
    ----------
    num_blocks : int
        Blocks of the pool.
    tokens_per_block : int
        Slots of a block.
    """

    def __init__(self, num_blocks: int, tokens_per_block: int) -> None:
        self.num_blocks, self.tokens_per_block = num_blocks, tokens_per_block
        self._free = deque(range(num_blocks))
        self._sequences: dict[int, _Sequence] = {}
        self._next = 0
        self._lock = threading.Lock()
        self._discarded: deque[int] = deque()  # sequences to remove at the next call; see discard()

    @property
    def free_blocks(self) -> int:
        """Blocks that no sequence owns; some may be reserved."""
        with self._lock:
            self._drain()
            return len(self._free)

    def blocks_for(self, slots: int) -> int:
        """Return the blocks that hold `slots` slots."""
        return -(-slots // self.tokens_per_block)

    def add(self, slots: int, count: int = 1) -> tuple[int, ...]:
        """Reserve `slots` slots for each of `count` new sequences and return their numbers.

        Raises CacheFullError, with nothing changed, where that many are not free.
        """
        with self._lock:
            self._drain()
            reserved = self.blocks_for(slots)
            self._check(reserved * count, f"{count} sequences of {slots} slots" if count > 1 else f"{slots} slots")
            numbers = tuple(range(self._next, self._next + count))
            self._next += count
            self._sequences.update({number: _Sequence(reserved) for number in numbers})
            return numbers

    def grow(self, sequence: int, slots: int) -> None:
        """Back the first `slots` slots of a sequence with blocks.

        Raises CacheFullError, with nothing changed, where the sequence asks for more than was reserved for it and
        nothing unreserved is free.
        """
        with self._lock:
            self._drain()
            own = self._sequences[sequence]
            missing = self.blocks_for(slots) - len(own.blocks)
            if missing <= 0:
                return
            promised = max(0, own.reserved - len(own.blocks))
            self._check(missing - promised, f"a prompt of {slots} tokens")
            own.blocks.extend(self._free.popleft() for _ in range(missing))

    def truncate(self, sequence: int, slots: int) -> int:
        """Give back the blocks behind the first `slots` slots and return how many they were."""
        with self._lock:
            own, kept = self._sequences[sequence], self.blocks_for(slots)
            returned = own.blocks[kept:]
            del own.blocks[kept:]
            self._free.extend(returned)
            return len(returned)

    def remove(self, sequence: int) -> None:
        """Give back every block and the reservation of a sequence."""
        with self._lock:
            self._remove(sequence)

    def discard(self, sequences: Iterable[int]) -> None:
        """Remove sequences at the next call; takes no lock, so that a finalizer may call it at any moment."""
        self._discarded.extend(sequences)

    def blocks(self, sequence: int) -> tuple[int, ...]:
        """Return the blocks of a sequence in the order of its slots."""
        with self._lock:
            return tuple(self._sequences[sequence].blocks)

    def offsets(self, sequences: Sequence[int], layers: int, width: int) -> np.ndarray:
        """Return the table [1,B,2,width] int32 of the sequences' blocks in one pool of `layers` layers.

        K of a block is at block * layers * 2, V one further; entries behind a sequence's last block are 0.
        """
        table = np.zeros((1, len(sequences), 2, width), np.int32)
        with self._lock:
            for row, sequence in enumerate(sequences):
                keys = np.array(self._sequences[sequence].blocks, np.int32) * (layers * 2)
                table[0, row, :, : len(keys)] = keys, keys + 1
        return table

    def _check(self, needed: int, purpose: str) -> None:
        """Raise CacheFullError unless `needed` blocks are free that are not reserved."""
        promised = sum(max(0, each.reserved - len(each.blocks)) for each in self._sequences.values())
        available = len(self._free) - promised
        if needed > available:
            raise CacheFullError(
                f"the KV cache has no room for {purpose}: {needed} blocks of {self.tokens_per_block} tokens are "
                f"needed, {available} of {self.num_blocks} are neither in use nor reserved: try fewer or shorter "
                "prompts at once or fewer new tokens, keep less of each prompt, or raise max_tokens_in_paged_kv_cache"
            )

    def _remove(self, sequence: int) -> None:
        self._free.extend(self._sequences.pop(sequence).blocks)

    def _drain(self) -> None:
        while self._discarded:
            self._remove(self._discarded.popleft())
