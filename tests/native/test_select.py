"""select against the reference: ranking, ties, special values, the exact budget, and what garbage may do."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from chunkkv import reference
from chunkkv.native import BatchRows, Chunks, NativeLibrary
from chunkkv.settings import ChunkKVSettings
from native.memory import Memory

SMALL = ChunkKVSettings(window=4, chunk_size=3, sinks=2, min_tokens=9, keep_per_10k=4_000)
INT32 = np.iinfo(np.int32)


@dataclass
class Call:
    """One call of select: rows of `lengths`, chunks that cover [s, L-w), and one float32 score per chunk."""

    settings: ChunkKVSettings
    lengths: list[int]
    scores: list[NDArray[np.float32]]
    starts: list[NDArray[np.int64]]
    keep_per_10k: list[int] | None = None
    budget_tokens: list[int] | None = None
    padding: int = 3
    kept_extra: int = 2
    flags: list[NDArray[np.bool_]] = field(default_factory=list)

    def kept(self, row: int) -> int:
        ratio = None if self.keep_per_10k is None else self.keep_per_10k[row]
        budget = None if self.budget_tokens is None else self.budget_tokens[row]
        return self.settings.kept_tokens(self.lengths[row], ratio, budget)

    def expected(self, row: int) -> NDArray[np.int32]:
        """All tokens of a chunk get the chunk's score, so the reference's mean is that very float32 number."""
        length, end = self.lengths[row], max(self.lengths[row] - self.settings.window, 0)
        tokens = np.zeros(length, np.float32)
        sizes = reference.chunk_sizes(self.starts[row], end) if len(self.starts[row]) else []
        tokens[min(self.settings.sinks, end) : end] = np.repeat(self.scores[row], sizes)
        flags = self.flags[row] if self.flags else None
        return reference.select_tokens(tokens, length, self.kept(row), self.settings, flags)

    def run(self, library: NativeLibrary, memory: Memory, **changes: Any) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return kept_indices [B, max_kept] and kept_lengths [B]; scores behind a row's chunks are NaN."""
        batch, longest = len(self.lengths), max(self.lengths, default=0) + self.padding
        width = library.max_chunks(self.settings, longest) + 2
        scores = np.full((batch, width), np.nan, np.float32)
        table, counts = np.full((batch, width + 1), INT32.max, np.int32), np.zeros(batch, np.int32)
        for row, values in enumerate(self.scores):
            scores[row, : len(values)] = values
            counts[row] = len(values)
            table[row, : len(values)] = self.starts[row]
            table[row, len(values)] = max(self.lengths[row] - self.settings.window, 0)
        arrays = {"lengths": self.lengths, "keep_per_10k": self.keep_per_10k, "budget_tokens": self.budget_tokens}
        arrays |= {"scores": scores, "starts": table, "counts": counts} | changes
        placed = {
            name: None if value is None else memory.put(np.asarray(value, None if name == "scores" else np.int32))
            for name, value in arrays.items()
            if name != "max_kept"
        }
        wanted = max([library.kept_tokens(self.settings, longest), *map(self.kept, range(batch))]) + self.kept_extra
        kept = memory.empty((batch, changes.get("max_kept", wanted)), "int32")
        lengths = memory.empty((batch,), "int32")
        rows = BatchRows(placed["lengths"], longest, placed["keep_per_10k"], placed["budget_tokens"])
        delimiter = self.settings.boundaries == "delimiter"
        chunks = Chunks(placed["starts"], placed["counts"]) if delimiter else None
        library.select(self.settings, rows, placed["scores"], kept, lengths, chunks=chunks)
        return memory.get(kept), memory.get(lengths)

    def check(self, library: NativeLibrary, memory: Memory) -> None:
        indices, kept_lengths = self.run(library, memory)
        for row in range(len(self.lengths)):
            kept = self.kept(row)
            assert kept_lengths[row] == kept
            np.testing.assert_array_equal(indices[row, :kept], self.expected(row))
            assert (indices[row, kept:] == reference.PAD_INDEX).all()


def special(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    values = [np.nan, -np.nan, 0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-45, 1.0, -1.0, 3e38, -3e38]
    return rng.choice(np.array(values, np.float32), count)


CONTENTS = {
    "random": lambda rng, n: rng.random(n, np.float32) / n,
    "negative": lambda rng, n: rng.normal(size=n).astype(np.float32),
    "all equal": lambda rng, n: np.full(n, 0.25, np.float32),
    "few values": lambda rng, n: rng.integers(0, 3, n).astype(np.float32) / 8,
    "special values": special,
    "all NaN": lambda rng, n: np.full(n, np.nan, np.float32),
    "one bit apart": lambda rng, n: (np.float32(0.5).view(np.uint32) + rng.permutation(n).astype(np.uint32)).view("f4"),
}


def make(settings: ChunkKVSettings, lengths: list[int], content: str, seed: int = 0, **others: Any) -> Call:
    rng = np.random.default_rng(seed)
    flags = [rng.random(length) < 0.3 for length in lengths] if settings.boundaries == "delimiter" else []
    starts = [
        reference.chunk_starts(length, settings, flags[row] if flags else None) for row, length in enumerate(lengths)
    ]
    scores = [CONTENTS[content](rng, len(values)) for values in starts]
    return Call(settings, lengths, scores, starts, flags=flags, **others)


LENGTHS = [50, 9, 10, 1, 0, 3, 11, 49, 48]


@pytest.mark.parametrize("boundaries", ["fixed", "delimiter"])
@pytest.mark.parametrize("content", CONTENTS)
def test_kept_tokens_are_those_of_the_reference(
    library: NativeLibrary, memory: Memory, content: str, boundaries: str
) -> None:
    make(replace(SMALL, boundaries=boundaries), LENGTHS, content).check(library, memory)


@pytest.mark.parametrize("budget", range(9, 53))
def test_every_budget_is_filled_exactly(library: NativeLibrary, memory: Memory, budget: int) -> None:
    make(replace(SMALL, budget_tokens=budget), [52, 50], "few values", seed=budget).check(library, memory)


@pytest.mark.parametrize("boundaries", ["fixed", "delimiter"])
def test_random_settings(library: NativeLibrary, memory: Memory, boundaries: str) -> None:
    rng = np.random.default_rng(5)
    for seed in range(25):
        window, chunk, sinks = (int(rng.integers(*bounds)) for bounds in ((1, 9), (1, 20), (0, 6)))
        least = window + chunk + sinks
        settings = ChunkKVSettings(
            window=window,
            chunk_size=chunk,
            sinks=sinks,
            min_tokens=least + int(rng.integers(0, 5)),
            keep_per_10k=int(rng.integers(1, 10_001)),
            boundaries=boundaries,
        )
        lengths = [int(length) for length in rng.integers(0, 150, 4)]
        make(settings, lengths, str(rng.choice(list(CONTENTS))), seed).check(library, memory)


def test_rows_have_their_own_ratio_and_budget(library: NativeLibrary, memory: Memory) -> None:
    lengths, ratios, budgets = [50, 50, 50, 50], [1_000, 5_000, 10_000, 3], [0, 0, 21, 0]
    settings = replace(SMALL, budget_tokens=17)
    make(settings, lengths, "random").check(library, memory)
    make(settings, lengths, "random", keep_per_10k=ratios).check(library, memory)
    make(settings, lengths, "random", budget_tokens=budgets).check(library, memory)
    make(settings, lengths, "random", keep_per_10k=ratios, budget_tokens=budgets).check(library, memory)


@pytest.mark.parametrize("content", ["random", "few values", "special values"])
@pytest.mark.parametrize("boundaries", ["fixed", "delimiter"])
def test_more_chunks_than_threads(library: NativeLibrary, memory: Memory, content: str, boundaries: str) -> None:
    settings = ChunkKVSettings(window=2, chunk_size=1, sinks=1, min_tokens=4, boundaries=boundaries)
    make(settings, [5000, 1027, 2052], content).check(library, memory)


@pytest.mark.parametrize("boundaries", ["fixed", "delimiter"])
def test_the_largest_settings(library: NativeLibrary, memory: Memory, boundaries: str) -> None:
    settings = ChunkKVSettings(window=128, chunk_size=256, sinks=300, min_tokens=700, boundaries=boundaries)
    make(settings, [3000, 700, 701, 428, 685], "few values").check(library, memory)


def test_a_million_tokens(library: NativeLibrary, memory: Memory) -> None:
    settings = ChunkKVSettings(keep_per_10k=9_900, chunk_size=256, min_tokens=300)
    make(settings, [1_000_000], "random", padding=0).check(library, memory)


def test_rows_do_not_depend_on_each_other_and_runs_repeat(library: NativeLibrary, memory: Memory) -> None:
    call = make(SMALL, [50, 31, 44], "random")
    indices, _ = call.run(library, memory)
    again, _ = call.run(library, memory)
    assert indices.tobytes() == again.tobytes()
    order = [2, 0, 1]
    lists = {name: [getattr(call, name)[row] for row in order] for name in ("lengths", "scores", "starts")}
    permuted, _ = replace(call, **lists).run(library, memory)
    np.testing.assert_array_equal(permuted, indices[order])


def test_an_empty_batch_is_fine(library: NativeLibrary, memory: Memory) -> None:
    indices, lengths = Call(SMALL, [], [], []).run(library, memory)
    assert indices.shape[0] == lengths.shape[0] == 0


def test_a_list_longer_than_max_kept_is_cut_there(library: NativeLibrary, memory: Memory) -> None:
    call = make(SMALL, [50, 20], "random", keep_per_10k=[8_000, 4_000])
    indices, lengths = call.run(library, memory, max_kept=21)
    assert list(lengths) == [21, 9]
    np.testing.assert_array_equal(indices[0], call.expected(0)[:21])
    np.testing.assert_array_equal(indices[1, :9], call.expected(1))


@pytest.mark.parametrize("max_kept", range(9, 30))
def test_nothing_is_written_behind_a_list_that_is_cut(library: NativeLibrary, memory: Memory, max_kept: int) -> None:
    """The cut list is the last of its array, where guard bytes follow."""
    call = make(SMALL, [20, 50], "random", keep_per_10k=[4_000, 8_000])
    indices, lengths = call.run(library, memory, max_kept=max_kept)
    assert lengths[1] == max_kept
    np.testing.assert_array_equal(indices[1], call.expected(1)[:max_kept])


def test_more_chunks_than_shared_memory_holds(library: NativeLibrary, memory: Memory) -> None:
    """14,336 chunks are staged; one more is read from memory. Both have eight blocks to a row."""
    settings = ChunkKVSettings(window=2, chunk_size=1, sinks=1, min_tokens=4)
    for chunks in (14_336, 14_337, 40_001):
        make(settings, [chunks + 3], "few values", padding=0).check(library, memory)


@pytest.mark.parametrize("seed", range(6))
def test_garbage_stays_inside_its_row(library: NativeLibrary, memory: Memory, seed: int) -> None:
    """Row 1 is sound; the others hold garbage. The memory fixture sees every write outside."""
    rng = np.random.default_rng(seed)
    call = make(replace(SMALL, boundaries="delimiter"), [50, 47, 50], "random", keep_per_10k=[4_000] * 3)

    def spoil(values: Any) -> NDArray[np.int32]:
        spoiled = np.array(values, np.int32)
        noise = rng.choice([INT32.min, -1, 0, 1, 7, 40, 10**6, INT32.max], spoiled.shape)
        sound = np.zeros(spoiled.shape, bool)
        sound[1] = True
        return np.where(sound, spoiled, noise).astype(np.int32)

    width = library.max_chunks(call.settings, 53) + 2
    table = np.zeros((3, width + 1), np.int32)
    table[1, : len(call.starts[1])] = call.starts[1]
    table[1, len(call.starts[1])] = 43
    changes = {
        "starts": spoil(table),
        "counts": spoil([len(values) for values in call.starts]),
        "lengths": spoil(call.lengths),
        "keep_per_10k": spoil(call.keep_per_10k),
        "budget_tokens": spoil([0, 0, 0]),
        "max_kept": 53,
    }
    indices, lengths = call.run(library, memory, **changes)
    assert (lengths >= 0).all() and (lengths <= 53).all()
    np.testing.assert_array_equal(indices[1, : lengths[1]], call.expected(1))
