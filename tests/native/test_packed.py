"""Packed rows: the same bits as padded ones, nothing beside a row's own entries, and garbage in row_starts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import op_properties
from support.op_cases import KERNEL_CASES, OpCase, named

from chunkkv import reference
from chunkkv.native import BatchRows, Chunks, NativeLibrary, contiguous_kv, paged_kv
from chunkkv.settings import ChunkKVSettings
from native.devices import on_every_device
from native.memory import POISON, Memory
from native.native_op import NativeOp
from native.test_compact import Pool, check_bytes, choose, noise

INT32 = np.iinfo(np.int32)
LENGTHS = (61, 5, 0, 40, 33)
KEPT = (23, 5, 0, 40, 9)  # rows 1 to 3 are kept whole
WILD = np.array([INT32.min, -1, 0, 1, 40, 139, 140, 141, INT32.max], np.int32)


def ranked(op: NativeOp, tried: OpCase, chunks_alone: bool) -> tuple[list[bytes], list[bytes]]:
    """Return the bits of every row's chunk scores, and of its chunk starts (none where the grid is fixed)."""
    inputs = tried.inputs("float16")
    rows = op.rows(inputs.lengths, inputs.key.shape[2], inputs.keep_per_10k, inputs.budget_tokens)
    width = max(1, op.library.max_chunks(tried.settings, rows.max_length))
    chunks = None if inputs.is_delimiter is None else op.chunks(inputs.is_delimiter, rows, tried.settings)
    scores, _ = op.score(inputs.query, inputs.key, rows, tried.settings, chunks, with_tokens=not chunks_alone)
    table = op.padded(scores, rows, width, np.nan)
    counts = [op.library.max_chunks(tried.settings, length) for length in tried.lengths]
    starts: list[bytes] = []
    if chunks is not None:
        counts = op.memory.get(chunks.num_chunks).tolist()
        content = op.memory.get(chunks.chunk_starts).reshape(-1)
        for row, count in enumerate(counts):
            first = row * (width + 1) if rows.row_starts is None else op.memory.get(rows.row_starts)[row] + row
            own = content[first : first + count + 1]
            length = tried.lengths[row]
            expected = reference.chunk_starts(length, tried.settings, inputs.is_delimiter[row, :length])
            np.testing.assert_array_equal(own, [*expected, max(length - tried.settings.window, 0)])
            starts.append(own.tobytes())
    return [table[row, :count].tobytes() for row, count in enumerate(counts)], starts


@pytest.mark.parametrize("chunks_alone", [False, True])
@pytest.mark.parametrize("tried", KERNEL_CASES, ids=lambda tried: tried.name)
def test_case_table(library: NativeLibrary, memory: Memory, tried: OpCase, chunks_alone: bool) -> None:
    check_against_padded(library, memory, replace(tried, head_dim=max(tried.head_dim, 64)), chunks_alone)


def check_against_padded(library: NativeLibrary, memory: Memory, tried: OpCase, chunks_alone: bool) -> None:
    padded = NativeOp(library, memory, layout="paged", chunks_alone=chunks_alone)
    packed = replace(padded, packed_rows=True)
    if tried.settings.score != "given" and tried.settings.heads == "shared":
        assert ranked(packed, tried, chunks_alone) == ranked(padded, tried, chunks_alone)
    inputs = tried.inputs("float16")
    for given, wanted in zip(
        op_properties.run(packed.select, inputs, tried.settings),
        op_properties.run(padded.select, inputs, tried.settings),
        strict=True,
    ):
        assert given.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("tried", KERNEL_CASES, ids=lambda tried: tried.name)
def test_case_table_against_the_reference(library: NativeLibrary, memory: Memory, tried: OpCase) -> None:
    op = NativeOp(library, memory, layout="packed", packed_rows=True)
    assert op_properties.check_matches_reference(op.select, replace(tried, head_dim=max(tried.head_dim, 64))) == 0


@pytest.mark.parametrize("name", ["ragged batch with padding", "delimiter", "pooling 3"])
@pytest.mark.parametrize("check", op_properties.PROPERTIES, ids=lambda check: check.__name__)
def test_properties(library: NativeLibrary, memory: Memory, check: op_properties.Check, name: str) -> None:
    op = NativeOp(library, memory, layout="packed", packed_rows=True)
    assert check(op.select, replace(named(name), head_dim=64)) == 0


def packed_rows(memory: Memory, lengths: Any, *, trailing: int = 3, starts: Any = None) -> BatchRows:
    own = np.cumsum([0, *lengths[:-1]]) if starts is None else starts
    return BatchRows(
        memory.put(np.array(lengths, np.int32)),
        max(*lengths, 1),
        row_starts=memory.put(np.array(own, np.int32)),
        num_tokens=int(np.clip(lengths, 0, None).sum()) + trailing if starts is None else 140,
    )


def packed_list(indices: NDArray[np.int32], lengths: Any, trailing: int) -> NDArray[np.int32]:
    """Return kept_indices [B, max_kept] as [T]; what belongs to nobody holds a far position."""
    packed = np.full(sum(lengths) + trailing, INT32.max, np.int32)
    for row, start in enumerate(np.cumsum([0, *lengths[:-1]])):
        own = min(indices.shape[1], lengths[row])
        packed[start : start + own] = indices[row, :own]
    return packed


@on_every_device
def test_compact_in_place(library: NativeLibrary, memory: Memory) -> None:
    indices, counts = choose(np.random.default_rng(1), LENGTHS, KEPT)
    pool = Pool.make(np.random.default_rng(2), 3, 2, 16, 64, "float16", LENGTHS)
    data, table = memory.put(pool.data), memory.put(pool.offsets)
    rows, listed = packed_rows(memory, LENGTHS), memory.put(packed_list(indices, LENGTHS, 3))
    library.compact(rows, listed, memory.put(counts), [paged_kv(data, table, layer) for layer in range(3)])
    for layer in range(3):
        for kv in (0, 1):
            for row, count in enumerate(KEPT):
                pool.store(layer, kv, row, reference.compact(pool.tokens(layer, kv, row), indices[row, :count]))
    check_bytes(memory.get(data), pool.data)


@on_every_device
def test_compact_out_of_place(library: NativeLibrary, memory: Memory) -> None:
    """Slots behind a row's N keep what they held."""
    rng = np.random.default_rng(6)
    indices, counts = choose(rng, LENGTHS, KEPT)
    key, value = (noise(rng, (len(LENGTHS), 2, max(LENGTHS), 80), "bfloat16") for _ in range(2))
    given = [memory.put(key), memory.put(value)]
    out = [memory.empty((len(LENGTHS), 2, max(LENGTHS), 80), "bfloat16") for _ in given]
    rows, listed = packed_rows(memory, LENGTHS), memory.put(packed_list(indices, LENGTHS, 3))
    library.compact(rows, listed, memory.put(counts), [contiguous_kv(*given)], [contiguous_kv(*out)])
    for source, target in zip((key, value), out, strict=True):
        wanted = np.full((*target.shape[:3], 160), POISON, np.uint8).view(source.dtype)
        for row, count in enumerate(KEPT):
            wanted[row, :, :count] = reference.compact(source[row], indices[row, :count])
        check_bytes(memory.get(target), wanted)


@on_every_device
@pytest.mark.parametrize("packed", [False, True])
def test_rows_that_are_kept_whole_are_not_touched_in_place(
    library: NativeLibrary, memory: Memory, packed: bool
) -> None:
    """N == L needs no list at all; a list that names every slot itself moves nothing either."""
    pool = Pool.make(np.random.default_rng(3), 2, 2, 8, 64, "int8", LENGTHS)
    data, table = memory.put(pool.data), memory.put(pool.offsets)
    caches = [paged_kv(data, table, layer) for layer in range(2)]
    rows = packed_rows(memory, LENGTHS) if packed else BatchRows(memory.put(np.array(LENGTHS, np.int32)), max(LENGTHS))
    wild = np.random.default_rng(4).choice(WILD, (len(LENGTHS), max(LENGTHS)))
    itself = np.tile(np.arange(max(LENGTHS), dtype=np.int32), (len(LENGTHS), 1))
    for indices, kept in ((wild, LENGTHS), (itself, KEPT)):
        listed = memory.put(packed_list(indices, LENGTHS, 3) if packed else indices)
        library.compact(rows, listed, memory.put(np.array(kept, np.int32)), caches)
        check_bytes(memory.get(data), pool.data)


def test_select_leaves_the_next_row_alone(library: NativeLibrary, memory: Memory) -> None:
    """A row has L entries: N positions, then -1; with max_length far above L as well."""
    settings = ChunkKVSettings(window=4, chunk_size=3, sinks=2, min_tokens=9, keep_per_10k=4_000)
    rows = replace(packed_rows(memory, LENGTHS), max_length=500)
    scores = np.random.default_rng(5).random(rows.num_tokens, np.float32)
    untouched = 7  # poison reads as -1, which select writes
    kept = memory.put(np.full(rows.num_tokens, untouched, np.int32))
    counts = memory.empty((len(LENGTHS),), "int32")
    library.select(settings, rows, memory.put(scores), kept, counts)
    content, start = memory.get(kept), 0
    assert memory.get(counts).tolist() == [settings.kept_tokens(length) for length in LENGTHS]
    for length in LENGTHS:
        own, count = content[start : start + length], settings.kept_tokens(length)
        starts = reference.chunk_starts(length, settings)
        sizes = reference.chunk_sizes(starts, max(length - settings.window, 0)) if len(starts) else []
        tokens = np.zeros(length, np.float32)
        tokens[settings.sinks : settings.sinks + sum(sizes)] = np.repeat(scores[start : start + len(starts)], sizes)
        np.testing.assert_array_equal(own[:count], reference.select_tokens(tokens, length, count, settings))
        assert (own[count:] == reference.PAD_INDEX).all()
        start += length
    assert content[start:].tolist() == [untouched] * 3


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("boundaries", ["fixed", "delimiter"])
def test_garbage_stays_inside(library: NativeLibrary, memory: Memory, boundaries: str, seed: int) -> None:
    """Starts, lengths, tables, scores and lists of any value: guards and AddressSanitizer watch T = 140 entries."""
    rng = np.random.default_rng(seed)
    own = ChunkKVSettings(window=6, chunk_size=5, sinks=2, min_tokens=13, boundaries=boundaries, pooling=3)
    op = NativeOp(library, memory, layout="paged")
    inputs = OpCase("packed garbage", own, (90,) * 6, head_dim=64).inputs("float16")
    rows = replace(
        packed_rows(memory, [90] * 6, starts=rng.choice(WILD, 6)),
        lengths=memory.put(rng.choice(WILD, 6)),
        keep_per_10k=memory.put(rng.choice(WILD, 6)),
    )
    scores = memory.empty((140,), "float32")
    kept, counts = memory.empty((140,), "int32"), memory.empty((6,), "int32")
    chunks = None
    if boundaries == "delimiter":
        chunks = Chunks(memory.empty((146,), "int32"), memory.empty((6,), "int32"))
        library.boundaries(own, rows, memory.put(rng.integers(0, 2, 140, np.int32)), None, 0, chunks)
        assert (memory.get(chunks.num_chunks) >= 0).all() and (memory.get(chunks.num_chunks) <= 90).all()
        memory.write(chunks.chunk_starts, rng.choice(WILD, 146))
        memory.write(chunks.num_chunks, rng.choice(WILD, 6))
    for chunks_alone in (True, False):
        op.score(inputs.query, inputs.key, rows, own, chunks, with_tokens=not chunks_alone)
    memory.write(scores, rng.choice(WILD, 140).view(np.float32))
    library.select(own, rows, scores, kept, counts, chunks=chunks)
    assert (memory.get(counts) >= 0).all() and (memory.get(counts) <= 90).all()
    pool = Pool.make(rng, 2, 2, 16, 64, "float16", (90,) * 6)
    data, table = memory.put(pool.data), memory.put(pool.offsets)
    caches = [paged_kv(data, table, layer) for layer in range(2)]
    library.compact(rows, memory.put(rng.choice(WILD, 140)), memory.put(rng.choice(WILD, 6)), caches)
