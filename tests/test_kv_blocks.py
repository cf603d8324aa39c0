"""The block manager under random ragged traffic: no block twice, none lost, every slot that is written is backed."""

from __future__ import annotations

import gc
import random
import threading
import weakref

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.messages import naming

from benchmarks.kv_pool_capacity import WAYS, count_sequences
from chunkkv.errors import CacheFullError
from chunkkv.executors.tensorrt_llm.kv_blocks import BlockManager

LAYERS = 3


class Traffic(RuleBasedStateMachine):
    """Prompts come, are prefilled, compacted, decoded and leave; `lengths` is what each sequence has written."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(0, 1)
        self.lengths: dict[int, int] = {}
        self.limits: dict[int, int] = {}

    @initialize(num_blocks=st.integers(1, 120), tokens_per_block=st.sampled_from([1, 4, 16]))
    def begin(self, num_blocks: int, tokens_per_block: int) -> None:
        self.manager = BlockManager(num_blocks, tokens_per_block)

    @rule(prompt=st.integers(1, 200), ratio=st.integers(1, 10), new=st.integers(0, 60), count=st.integers(1, 3))
    def arrive(self, prompt: int, ratio: int, new: int, count: int) -> None:
        """Add a batch, prefill its rows one after the other, compact each at once."""
        kept = max(1, prompt * ratio // 10)
        before = self.manager.free_blocks
        try:
            numbers = self.manager.add(kept + new, count)
        except CacheFullError:
            assert self.manager.free_blocks == before
            return
        for number in numbers:
            before = self.manager.free_blocks
            try:
                self.manager.grow(number, prompt)
            except CacheFullError:
                assert self.manager.free_blocks == before and not self.manager.blocks(number)
                self.manager.remove(number)
                continue
            assert len(self.manager.blocks(number)) * self.manager.tokens_per_block >= prompt
            freed = self.manager.truncate(number, kept)
            assert freed == self.manager.blocks_for(prompt) - self.manager.blocks_for(kept)
            self.lengths[number], self.limits[number] = kept, kept + new

    @precondition(lambda self: self.lengths)
    @rule(steps=st.integers(1, 40))
    def decode(self, steps: int) -> None:
        """Every sequence writes up to `steps` slots; within its reservation that never fails."""
        for _ in range(steps):
            for number, length in self.lengths.items():
                if length < self.limits[number]:
                    self.manager.grow(number, length + 1)
                    self.lengths[number] += 1

    @precondition(lambda self: self.lengths)
    @rule(choice=st.integers(0, 10**6), late=st.booleans())
    def leave(self, choice: int, late: bool) -> None:
        number = sorted(self.lengths)[choice % len(self.lengths)]
        if late:
            self.manager.discard([number])
        else:
            self.manager.remove(number)
        del self.lengths[number], self.limits[number]

    @invariant()
    def every_block_has_one_owner(self) -> None:
        free = self.manager.free_blocks
        owned = [block for number in self.lengths for block in self.manager.blocks(number)]
        assert len(set(owned)) == len(owned) and set(owned) <= set(range(self.manager.num_blocks))
        assert free + len(owned) == self.manager.num_blocks

    @invariant()
    def every_written_slot_is_backed(self) -> None:
        numbers = list(self.lengths)
        width = max((len(self.manager.blocks(number)) for number in numbers), default=1)
        table = self.manager.offsets(numbers, LAYERS, width)
        for row, number in enumerate(numbers):
            blocks, used = self.manager.blocks(number), self.manager.blocks_for(self.lengths[number])
            assert len(blocks) == used
            expected = np.array(blocks, np.int64) * LAYERS * 2
            assert np.array_equal(table[0, row, 0, :used], expected)
            assert np.array_equal(table[0, row, 1, :used], expected + 1)
            assert not table[0, row, :, used:].any()

    def teardown(self) -> None:
        for number in list(self.lengths):
            self.manager.remove(number)
        assert self.manager.free_blocks == self.manager.num_blocks


Traffic.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None, derandomize=True)
TestTraffic = Traffic.TestCase


def test_thousands_of_decode_steps_of_a_changing_batch() -> None:
    draw = random.Random(5)
    manager = BlockManager(300, 16)
    rows: dict[int, tuple[int, int]] = {}
    refused = finished = 0
    for _ in range(4000):
        if draw.random() < 0.3:
            prompt, new = draw.randint(1, 1500), draw.randint(1, 300)
            kept = draw.randint(1, prompt)
            try:
                (number,) = manager.add(kept + new)
            except CacheFullError:
                refused += 1
            else:
                try:
                    manager.grow(number, prompt)
                    manager.truncate(number, kept)
                    rows[number] = (kept, kept + new)
                except CacheFullError:
                    refused += 1
                    manager.remove(number)
        for number, (length, limit) in list(rows.items()):
            if length == limit:
                manager.remove(number)
                del rows[number]
                finished += 1
                continue
            manager.grow(number, length + 1)
            assert len(manager.blocks(number)) * 16 > length
            rows[number] = (length + 1, limit)
        owned = [block for number in rows for block in manager.blocks(number)]
        assert len(set(owned)) == len(owned) == 300 - manager.free_blocks
    assert refused > 100 and finished > 100
    for number in rows:
        manager.remove(number)
    assert manager.free_blocks == 300


def test_a_reservation_is_kept_for_its_owner() -> None:
    manager = BlockManager(10, 4)
    first, second = manager.add(16, 2)  # 4 blocks each
    manager.grow(first, 24)  # takes both blocks that nobody reserved
    with pytest.raises(CacheFullError, match=naming("prompt 20 1 blocks 4 0 10")):
        manager.grow(second, 20)
    with pytest.raises(CacheFullError, match="max_tokens_in_paged_kv_cache"):
        manager.add(1)
    assert manager.truncate(first, 5) == 4
    manager.grow(second, 20)  # into what the first gave back
    manager.grow(first, 16)
    manager.grow(second, 16)  # nothing to do
    assert manager.free_blocks == 1


def test_a_finalizer_may_come_while_the_lock_is_held() -> None:
    manager = BlockManager(4, 1)
    (number,) = manager.add(4)
    manager.grow(number, 4)

    class Owner:
        pass

    owner = Owner()
    weakref.finalize(owner, manager.discard, [number])
    with manager._lock:
        del owner
        gc.collect()
    assert manager.free_blocks == 4


def test_threads_share_the_pool() -> None:
    manager, errors = BlockManager(64, 4), []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for _ in range(300):
                slots = draw.randint(1, 40)
                (number,) = manager.add(slots)
                for length in range(1, slots + 1):
                    manager.grow(number, length)
                assert len(manager.blocks(number)) == manager.blocks_for(slots)
                manager.remove(number)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and manager.free_blocks == 64


def test_a_pool_takes_several_times_more_sequences_when_prompts_are_staged() -> None:
    counts = {way: count_sequences(way, 65536, 32, 8192, kept=1638, new=256) for way in WAYS}
    assert [counts[way].sequences for way in WAYS] == [7, 8, 30]
    assert counts[WAYS[1]].blocks_after_prefill < counts[WAYS[0]].blocks_after_prefill / 4
    assert all(count.blocks_at_end <= 65536 // 32 for count in counts.values())
