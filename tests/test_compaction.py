"""Compaction in host memory: which bytes are copied, and which memory is given back meanwhile."""

from __future__ import annotations

import mmap
import sys
import threading

import numpy as np
import pytest
from support import engines

from chunkkv import SamplingParams
from chunkkv.cache_layout import CacheLayout, CachePart, uniform_layout
from chunkkv.executors.host_cache import HostKVCache
from chunkkv.executors.huge_pages import HUGE_PAGE_BYTES
from chunkkv.executors.onnxruntime.compaction import compact
from chunkkv.executors.spent_memory import SpentMemory

HEADS, HEAD_DIM, LENGTH = 3, 8, 40
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes memory back")


def cache_of(layout: CacheLayout, capacity: int, dtype: type = np.uint32, seed: int = 0) -> HostKVCache:
    """Return one row of any bits, seen as float32 where `dtype` is uint32: payloads of NaN included."""
    random = np.random.default_rng(seed)
    shapes = [(1, len(part.kv_heads), capacity, HEAD_DIM) for part in layout.parts]
    kinds = []
    for _ in range(2):
        bits = [random.integers(0, np.iinfo(dtype).max, shape, dtype) for shape in shapes]
        kinds.append(tuple(array.view(np.float32) if dtype is np.uint32 else array for array in bits))
    return HostKVCache(kinds[0], kinds[1], layout)


def same_bits(first: np.ndarray, second: np.ndarray) -> bool:
    return first.tobytes() == second.tobytes()


@pytest.mark.parametrize("dtype", [np.uint32, np.int8])
@pytest.mark.parametrize("is_spent", [False, True])
def test_each_part_keeps_the_slots_of_the_part_that_decides(dtype: type, is_spent: bool) -> None:
    layout = uniform_layout(4, HEADS)
    full, out, before = (cache_of(layout, size, dtype, seed) for size, seed in ((LENGTH, 0), (20, 1), (20, 1)))
    kept = {0: np.array([0, 3, 4, 39], np.int32), 2: np.array([1, 5, 6], np.int64)}
    compact(full, kept, (0, 0, 2, 2), out, is_spent)
    for part, leader in enumerate((0, 0, 2, 2)):
        count = len(kept[leader])
        for kind in ("keys", "values"):
            made, source, old = (getattr(cache, kind)[part] for cache in (out, full, before))
            assert same_bits(made[:, :, :count], source[:, :, kept[leader]])
            assert same_bits(made[:, :, count:], old[:, :, count:])


def test_every_head_may_keep_slots_of_its_own() -> None:
    parts = (CachePart(0, "reading", (1,), 0), CachePart(0, "local", (0, 2), 1), CachePart(1, "local", (0, 1, 2), 1))
    layout = CacheLayout(parts, 2)
    full, out = cache_of(layout, LENGTH), cache_of(layout, 20, seed=1)
    kept = {0: np.array([[7, 8]]), 1: np.array([[0, 1, 2], [9, 10, 30]]), 2: np.array([4, 5, 6])}
    compact(full, kept, (0, 1, 2), out)
    assert same_bits(out.keys[0][:, :, :2], full.keys[0][:, :, [7, 8]])
    for head, slots in enumerate(kept[1]):
        assert same_bits(out.values[1][0, head, :3], full.values[1][0, head, slots])
    assert same_bits(out.keys[2][:, :, :3], full.keys[2][:, :, [4, 5, 6]])


@on_linux
def test_only_whole_huge_pages_that_lie_behind_are_given_back() -> None:
    """Memory that was given back reads as zeros."""
    memory = np.ones(6 * HUGE_PAGE_BYTES, np.uint8)
    first = -memory.ctypes.data % HUGE_PAGE_BYTES + HUGE_PAGE_BYTES // 2  # the middle of a huge page
    half = HUGE_PAGE_BYTES // 2
    pieces = [memory[first + number * half : first + (number + 1) * half] for number in range(6)]
    spent = SpentMemory()
    for number, zeros in enumerate([0, 0, 2, 2, 4, 4]):  # the first half of a page is not the first array's
        spent.add(pieces[number])
        assert [int(piece.max()) for piece in pieces[1:]] == [int(at >= zeros) for at in range(5)]
    assert pieces[0].min() == memory[:first].min() == memory[first + 6 * half :].min() == 1


@on_linux
def test_arrays_apart_from_each_other_leave_what_lies_between() -> None:
    memory = np.ones(8 * HUGE_PAGE_BYTES, np.uint8)
    first = -memory.ctypes.data % HUGE_PAGE_BYTES
    pieces = [memory[first + number * HUGE_PAGE_BYTES :][:HUGE_PAGE_BYTES] for number in range(5)]
    spent = SpentMemory()
    for number in (0, 2, 1):
        spent.add(pieces[number])
    assert [int(piece.max()) for piece in pieces] == [0, 0, 0, 1, 1]
    spent.add(pieces[4][: HUGE_PAGE_BYTES // 4])  # no whole page, and another array lies before it
    assert [int(piece.min()) for piece in pieces] == [0, 0, 0, 1, 1]


def cache_in(memory: np.ndarray, parts: int, slots: int) -> HostKVCache:
    """Return one row of int8 whose arrays follow each other in memory, keys first."""
    size = HEADS * slots * HEAD_DIM
    arrays = [memory[n * size :][:size].reshape(1, HEADS, slots, HEAD_DIM) for n in range(2 * parts)]
    return HostKVCache(tuple(arrays[:parts]), tuple(arrays[parts:]), uniform_layout(parts, HEADS))


@on_linux
@pytest.mark.parametrize("is_new", [True, False])
def test_new_memory_takes_nothing_before_enough_was_given_back(is_new: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays of 1 MB each. What is kept of the first ones is stored late, or at once where memory is there already."""
    parts, slots, kept = 6, (1 << 20) // (HEADS * HEAD_DIM), np.arange(3, 20_000, 7)
    contents = np.random.default_rng(0).integers(1, 127, 2 * parts << 20, np.int8)
    full, before = (cache_in(memory, parts, slots) for memory in (contents.copy(), contents))
    out = cache_in(np.frombuffer(mmap.mmap(-1, 2 * parts << 20), np.int8), parts, len(kept))
    if not is_new:
        for array in (*out.keys, *out.values):
            array[...] = 0
    moments: list[tuple[bool, bool]] = []
    add = SpentMemory.add

    def watched(self: SpentMemory, array: np.ndarray) -> None:
        moments.append((self.given_back >= 2 * HUGE_PAGE_BYTES, bool(out.keys[0].any())))
        add(self, array)

    monkeypatch.setattr(SpentMemory, "add", watched)
    compact(full, dict.fromkeys(range(parts), kept), range(parts), out, is_spent=True)
    assert {enough for enough, _ in moments} == {False, True}
    assert [stored for _, stored in moments] == [enough or not is_new for enough, _ in moments]
    for made, source in zip((*out.keys, *out.values), (*before.keys, *before.values), strict=True):
        assert same_bits(made, source[:, :, kept])


def test_prefill_gives_its_cache_back_and_compression_by_itself_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation compresses one cache with several budgets. Memory of caches as small as here is never given back."""
    spent: list[np.ndarray] = []
    monkeypatch.setattr(SpentMemory, "add", lambda self, array: spent.append(array))
    session = engines.session("llama3")
    prompt = np.random.default_rng(0).integers(3, 384, 70)
    (request,) = session.requests([prompt.tolist()], SamplingParams(max_new_tokens=1), 0.5)
    prefiller = session.executor.blockwise_prefiller()
    full, out = prefiller.new_cache(1, 70), prefiller.new_cache(1, 70)
    _, queries = prefiller.fill(prompt, full, threading.Event())
    choice = prefiller.compress(full, queries, prompt, request.keep_per_10k, request.budget_tokens, out)
    assert not spent

    prefilled_out = prefiller.new_cache(1, 70)
    (prefilled,) = session.executor.prefiller().run([request], prefilled_out, threading.Event())
    assert len(spent) == 2 * len(full.keys)
    assert prefilled.kept_lengths == choice.kept_lengths == (35,)
    for one, other in zip((*out.keys, *out.values), (*prefilled_out.keys, *prefilled_out.values), strict=True):
        assert same_bits(one[:, :, :35], other[:, :, :35])
