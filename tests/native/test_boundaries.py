"""boundaries against the reference: delimiter chunks from token ids, ragged, packed, over several tiles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from chunkkv import reference
from chunkkv.errors import NativeArgumentError
from chunkkv.native import BatchRows, Chunks, NativeLibrary
from chunkkv.settings import ChunkKVSettings
from native.memory import Memory

VOCABULARY = 1000
DELIMITERS = np.array([0, 31, 32, 500, 999])
SETTINGS = ChunkKVSettings(window=4, chunk_size=5, sinks=3, min_tokens=12, boundaries="delimiter")


def bitmap() -> NDArray[np.uint32]:
    words = np.zeros((VOCABULARY + 31) // 32, np.uint32)
    np.bitwise_or.at(words, DELIMITERS // 32, np.uint32(1) << (DELIMITERS % 32).astype(np.uint32))
    return words


def draw_ids(rng: np.random.Generator, length: int, rate: float) -> NDArray[np.int32]:
    plain = rng.integers(1, 31, length)
    return np.where(rng.random(length) < rate, rng.choice(DELIMITERS, length), plain).astype(np.int32)


def run(
    library: NativeLibrary,
    memory: Memory,
    settings: ChunkKVSettings,
    ids: list[NDArray[np.int32]],
    *,
    packed: bool = False,
    **changes: Any,
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return a table of chunk starts, one row per prompt, and the counts; -1 stands behind a packed row's part."""
    lengths = [len(row) for row in ids]
    padded = max(lengths, default=0) + 2
    width = library.max_chunks(settings, padded) + 1
    placed = memory.put(np.array(changes.get("lengths", lengths), np.int32))
    if packed:
        tokens, starts = np.concatenate(ids), np.cumsum([0, *lengths[:-1]]).astype(np.int32)
        rows = BatchRows(
            placed, padded, row_starts=memory.put(changes.get("row_starts", starts)), num_tokens=len(tokens)
        )
        table = memory.empty((len(tokens) + len(ids),), "int32")
    else:
        tokens = np.zeros((len(ids), padded), np.int32)  # 0 is a delimiter: padding must not matter
        for row, values in enumerate(ids):
            tokens[row, : len(values)] = values
        rows, table = BatchRows(placed, padded), memory.empty((len(ids), width + 1), "int32")
    counts = memory.empty((len(ids),), "int32")
    library.boundaries(settings, rows, memory.put(tokens), memory.put(bitmap()), VOCABULARY, Chunks(table, counts))
    found = memory.get(table)
    if packed:
        parts, found = found, np.full((len(ids), width + 1), -1, np.int32)
        for row, length in enumerate(lengths):  # one entry more than tokens for every row
            own = min(length, width) + 1
            found[row, :own] = parts[starts[row] + row : starts[row] + row + own]
    return found, memory.get(counts)


def check(library: NativeLibrary, memory: Memory, settings: ChunkKVSettings, ids: Any, packed: bool = False) -> None:
    table, counts = run(library, memory, settings, ids, packed=packed)
    for row, values in enumerate(ids):
        starts = reference.chunk_starts(len(values), settings, np.isin(values, DELIMITERS))
        assert counts[row] == len(starts)
        np.testing.assert_array_equal(table[row, : counts[row]], starts)
        assert table[row, counts[row]] == max(len(values) - settings.window, 0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("chunk_size", [1, 2, 5, 16])
def test_starts_are_those_of_the_reference(
    library: NativeLibrary, memory: Memory, chunk_size: int, rate: float, packed: bool
) -> None:
    rng = np.random.default_rng(chunk_size)
    settings = replace(SETTINGS, chunk_size=chunk_size, min_tokens=40)
    ids = [draw_ids(rng, length, rate) for length in (60, 7, 8, 3, 1, 29, 0)]
    check(library, memory, settings, ids, packed)


@pytest.mark.parametrize("rate", [0.0, 0.002, 0.3])
def test_runs_go_on_from_tile_to_tile(library: NativeLibrary, memory: Memory, rate: float) -> None:
    """A tile is 8192 positions; without delimiters the grid of c = 7 must cross it unbroken."""
    rng = np.random.default_rng(1)
    settings = replace(SETTINGS, chunk_size=7, min_tokens=14)
    check(library, memory, settings, [draw_ids(rng, length, rate) for length in (20_000, 8_199, 8_200)])


def test_ids_outside_the_vocabulary_delimit_nothing(library: NativeLibrary, memory: Memory) -> None:
    ids = np.array([5, -1, 1000, 2**31 - 1, -(2**31), 1031, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], np.int32)
    check(library, memory, SETTINGS, [ids])


def test_flags_instead_of_ids(library: NativeLibrary, memory: Memory) -> None:
    flags = np.random.default_rng(4).integers(-1, 2, (2, 50)).astype(np.int32)
    width = library.max_chunks(SETTINGS, 50)
    table, counts = memory.empty((2, width + 1), "int32"), memory.empty((2,), "int32")
    rows = BatchRows(memory.put(np.array([50, 31], np.int32)), 50)
    library.boundaries(SETTINGS, rows, memory.put(flags), None, 0, Chunks(table, counts))
    for row, length in enumerate((50, 31)):
        wanted = reference.chunk_starts(length, SETTINGS, flags[row] != 0)
        np.testing.assert_array_equal(memory.get(table)[row, : memory.get(counts)[row]], wanted)


def test_garbage_lengths_and_row_starts_stay_inside(library: NativeLibrary, memory: Memory) -> None:
    rng = np.random.default_rng(2)
    ids = [draw_ids(rng, 40, 0.2) for _ in range(4)]
    garbage = np.array([-(2**31), 2**31 - 1, 150, -5], np.int32)
    for packed in (False, True):
        changes = {"row_starts": garbage} if packed else {}
        _, counts = run(library, memory, SETTINGS, ids, packed=packed, lengths=garbage[::-1], **changes)
        assert (counts >= 0).all() and (counts <= 42).all()


def test_fixed_boundaries_are_refused(library: NativeLibrary, memory: Memory) -> None:
    with pytest.raises(NativeArgumentError, match="fixed"):
        run(library, memory, replace(SETTINGS, boundaries="fixed"), [np.zeros(20, np.int32)])
