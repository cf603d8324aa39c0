"""score against the reference: every type, head size and layout, every way to cut the work, and garbage."""

from __future__ import annotations

import mmap
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import op_properties
from support.choice_properties import CHOICE_PROPERTIES
from support.op_cases import KERNEL_CASES, STORAGE_TYPES, OpCase, named

from chunkkv import reference
from chunkkv.errors import NativeArgumentError
from chunkkv.native import BatchRows, NativeLibrary, RawArray, contiguous_kv
from chunkkv.settings import ChunkKVSettings
from native.devices import LARGE, SMALL, device_of
from native.memory import Memory, numpy_dtype
from native.native_op import LAYOUTS, NativeOp, make_cache
from native.score_checks import TOLERANCE, bits_of_scores, largest_error

HEAD_SIZES = (64, 80, 96, 128, 256)
KEY_STORAGE = (None, "int8", "float8_e4m3fn")
INT32 = np.iinfo(np.int32)


def settings(window: int = 5, chunk_size: int = 7, sinks: int = 3, **others: object) -> ChunkKVSettings:
    values = {"window": window, "chunk_size": chunk_size, "sinks": sinks, "pooling": 1, **others}
    return ChunkKVSettings(min_tokens=window + chunk_size + sinks, keep_per_10k=3_000, **values)


def case(own: ChunkKVSettings, lengths: tuple[int, ...] = (150, 97), **others: object) -> OpCase:
    return OpCase("score", own, lengths, **{"head_dim": 64, "extra_padding": 2, **others})


@pytest.mark.parametrize("head_dim", HEAD_SIZES)
@pytest.mark.parametrize("key_storage", KEY_STORAGE)
@pytest.mark.parametrize("storage", STORAGE_TYPES)
def test_every_type_and_head_size(
    library: NativeLibrary, memory: Memory, storage: str, key_storage: str | None, head_dim: int
) -> None:
    for layout in LAYOUTS:
        op = NativeOp(library, memory, key_storage, layout)
        for chunks_alone in (False, True):
            assert largest_error(op, case(settings(), head_dim=head_dim), storage, chunks_alone) < TOLERANCE / 5


@pytest.mark.parametrize("storage", STORAGE_TYPES)
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (7, 1), (14, 2), (16, 1)])
@pytest.mark.parametrize("window", [1, 17, 33, 128])
def test_windows_and_groups(
    library: NativeLibrary, memory: Memory, window: int, heads: tuple[int, int], storage: str
) -> None:
    tried = case(settings(window), (window + 130, window + 20), heads=heads[0], kv_heads=heads[1])
    op = NativeOp(library, memory, layout="paged")
    for chunks_alone in (False, True):
        assert largest_error(op, tried, storage, chunks_alone) < TOLERANCE / 5


@pytest.mark.parametrize("pooling", [1, 3, 7, 63])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 5, 8, 9, 10, 63, 64, 65, 256])
def test_chunks_at_every_alignment(library: NativeLibrary, memory: Memory, chunk_size: int, pooling: int) -> None:
    op = NativeOp(library, memory)
    for sinks in (0, 5, 70):
        own = settings(4, chunk_size, sinks, pooling=pooling)
        tried = case(own, (330, 329, 260, sinks + 5, 64, 68), heads=2, kv_heads=1)
        tried = replace(tried, lengths=tuple(max(length, sinks + 5) for length in tried.lengths))
        assert largest_error(op, tried, "float16", chunks_alone=True) < TOLERANCE / 5


@pytest.mark.parametrize("length", [1, 2, 15, 16, 62, 63, 64, 65, 66, 127, 128, 129, 191, 192, 193])
def test_lengths_around_a_tile(library: NativeLibrary, memory: Memory, length: int) -> None:
    for window in (1, 2, 64, 65):
        tried = case(settings(window, 5, 0), (length + window, 200 + window), heads=2, kv_heads=1)
        for chunks_alone in (False, True):
            assert largest_error(NativeOp(library, memory), tried, "bfloat16", chunks_alone) < TOLERANCE / 5


@pytest.mark.parametrize("storage", STORAGE_TYPES)
@pytest.mark.parametrize("score", ["softmax", "logits"])
def test_delimiter_chunks(library: NativeLibrary, memory: Memory, score: str, storage: str) -> None:
    for pooling, rate in ((1, 0.3), (5, 0.0), (3, 1.0)):
        own = settings(6, 9, 2, boundaries="delimiter", score=score, pooling=pooling)
        tried = case(own, (201, 64, 70), delimiter_rate=rate, extra_padding=3)
        for layout in ("contiguous", "paged"):
            op = NativeOp(library, memory, layout=layout, whole_query=True)
            assert largest_error(op, tried, storage, chunks_alone=False) < TOLERANCE


@pytest.mark.parametrize("contrast", [0.01, 6.0, 12.0])
@pytest.mark.parametrize("storage", STORAGE_TYPES)
def test_flat_and_peaked_attention(library: NativeLibrary, memory: Memory, storage: str, contrast: float) -> None:
    tried = case(settings(8, 10), (700,), contrast=contrast)
    for chunks_alone in (False, True):
        assert largest_error(NativeOp(library, memory), tried, storage, chunks_alone) < TOLERANCE


@pytest.mark.parametrize("page", [1, 8, 32, 128])
def test_page_sizes(library: NativeLibrary, memory: Memory, page: int) -> None:
    for chunks_alone in (False, True):
        op = NativeOp(library, memory, layout="paged", block=page)
        assert largest_error(op, case(settings(), (200, 33, 150)), "float16", chunks_alone) < TOLERANCE / 5


@pytest.mark.parametrize("multiprocessors", (SMALL, LARGE), indirect=True)
@pytest.mark.parametrize("chunks_alone", [False, True])
@pytest.mark.parametrize("tried", KERNEL_CASES, ids=lambda tried: tried.name)
def test_case_table(
    library: NativeLibrary, memory: Memory, tried: OpCase, chunks_alone: bool, multiprocessors: int
) -> None:
    for layout, whole_query in (("contiguous", False), ("paged", True)):
        op = NativeOp(library, memory, layout=layout, chunks_alone=chunks_alone, whole_query=whole_query)
        assert op_properties.check_matches_reference(op.select, replace(tried, head_dim=max(tried.head_dim, 64))) == 0


PROPERTY_CASES = (
    "plain",
    "ragged batch with padding",
    "pooling 3",
    "delimiter",
    "logits",
    "ratio per row",
    "largest head",
)


@pytest.mark.parametrize("name", PROPERTY_CASES)
@pytest.mark.parametrize("check", (*op_properties.PROPERTIES, *CHOICE_PROPERTIES), ids=lambda check: check.__name__)
def test_properties(library: NativeLibrary, memory: Memory, check: op_properties.Check, name: str) -> None:
    for chunks_alone in (False, True):
        op = NativeOp(library, memory, layout="paged" if chunks_alone else "contiguous", chunks_alone=chunks_alone)
        assert check(op.select, replace(named(name), head_dim=64)) == 0


@pytest.mark.parametrize("chunks_alone", [False, True])
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_the_batch_and_the_grid_change_no_bit(
    library: NativeLibrary, memory: Memory, storage: str, chunks_alone: bool
) -> None:
    """The blocks of a launch divide its tiles, so a row alone falls to other blocks than a row among 40."""
    tried = case(settings(4, 9), (2700, *range(100, 139), 640), heads=2, kv_heads=1)
    inputs, op = tried.inputs(storage), NativeOp(library, memory)
    together = bits_of_scores(op, inputs, tried, chunks_alone)
    if library.device == "emulated":
        for multiprocessors in (1, 7, LARGE):
            with device_of(library, multiprocessors):
                assert bits_of_scores(op, inputs, tried, chunks_alone) == together
    for row in (0, 5, 40):
        alone = replace(tried, lengths=tried.lengths[row : row + 1])
        assert bits_of_scores(op, inputs.take_rows([row]), alone, chunks_alone) == [together[row]]


@pytest.mark.parametrize("chunks_alone", [False, True])
def test_what_is_behind_a_row_changes_no_bit(library: NativeLibrary, memory: Memory, chunks_alone: bool) -> None:
    tried = case(settings(), (70, 150, 128), extra_padding=5)
    for layout in ("contiguous", "paged"):
        op, seen = NativeOp(library, memory, layout=layout), set()
        for content in (0.0, *op_properties.PADDING_CONTENTS):
            inputs = tried.inputs("float16")
            for row, length in enumerate(tried.lengths):
                with np.errstate(over="ignore"):
                    inputs.key[row, :, length:] = content
            seen.add(tuple(bits_of_scores(op, inputs, tried, chunks_alone)))
        assert len(seen) == 1


@pytest.mark.parametrize("heads", [(2, 1), (3, 3)])
@pytest.mark.parametrize("window", [5, 40])
def test_ragged_batches_on_every_grid(
    library: NativeLibrary, memory: Memory, window: int, heads: tuple[int, int]
) -> None:
    """Rows of no tiles, of one and of many, between which the stretch of a block may begin and end anywhere."""
    lengths = (window, 1500, 1, window + 1, 700, 0, window + 9, 2000, 33)
    tried = case(settings(window, 5), lengths, heads=heads[0], kv_heads=heads[1])
    for multiprocessors in (1, 2, 3, 11, LARGE) if library.device == "emulated" else (LARGE,):
        with device_of(library, multiprocessors) if library.device == "emulated" else nullcontext():
            op = NativeOp(library, memory, layout="paged", chunks_alone=True)
            assert op_properties.check_matches_reference(op.select, tried) == 0


@pytest.mark.parametrize("storage", STORAGE_TYPES)
def test_nan_in_fp8_is_nan(library: NativeLibrary, memory: Memory, storage: str) -> None:
    tried = case(settings(score="logits"), (90,))
    inputs = tried.inputs(storage)
    inputs.key[0, 1, [7, 50], 3] = np.nan
    op = NativeOp(library, memory, "float8_e4m3fn")
    rows = BatchRows(memory.put(inputs.lengths), inputs.key.shape[2])
    scores = memory.get(op.score(inputs.query, inputs.key, rows, tried.settings)[1])[0]
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(scores)), [7, 50])


def test_a_scale_is_for_8_bit_keys_alone(library: NativeLibrary, memory: Memory) -> None:
    tried = case(settings(score="logits"), (90,))
    inputs, op = tried.inputs("float16"), NativeOp(library, memory)
    rows = BatchRows(memory.put(inputs.lengths), inputs.key.shape[2])
    cache, query = make_cache(memory, inputs.key, "contiguous"), memory.put(inputs.query)
    given = {"chunk_scores": op.empty(rows, 20, "float32"), "key_scale": memory.put(np.float32([7.0]))}
    workspace = memory.empty((library.score_workspace(tried.settings, rows, query, cache, **given),), "uint8")
    library.score(tried.settings, rows, query, cache, workspace=workspace, **given)
    plain, _ = op.score(inputs.query, inputs.key, rows, tried.settings, with_tokens=False)
    count = library.max_chunks(tried.settings, 90)
    assert memory.get(given["chunk_scores"])[0, :count].tobytes() == memory.get(plain)[0, :count].tobytes()


def sparse(shape: tuple[int, ...], dtype: str) -> tuple[NDArray[Any], RawArray]:
    """Return zeros of which only touched pages take memory, and the same as the library sees it."""
    size = int(np.prod(shape, dtype=np.int64)) * numpy_dtype(dtype).itemsize
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's number: Python has the name since 3.13
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    array = np.frombuffer(mmap.mmap(-1, size, flags=private), dtype=numpy_dtype(dtype)).reshape(shape)
    return array, RawArray(array.ctypes.data, dtype, shape, on_device=False)


@pytest.mark.deep
def test_waves_of_rows_in_gigabytes_of_workspace(library: NativeLibrary, memory: Memory) -> None:
    """One row of this size fills the workspace, so every row is a wave of its own; its last entries are past 2^31."""
    if library.device == "cuda":
        pytest.skip("needs memory that is only touched in part")
    own, padded, heads, kv_heads = settings(128, 10), 1 << 22, 144, 9
    small = case(own, (300, 250), heads=heads, kv_heads=kv_heads).inputs("float16")
    keys, raw = sparse((2, kv_heads, padded, 64), "float16")
    keys[:, :, :302] = small.key
    cache, query = contiguous_kv(raw, raw), memory.put(small.query)
    scores = memory.empty((2, library.max_chunks(own, padded)), "float32")
    rows = BatchRows(memory.put(small.lengths), padded)
    size = library.score_workspace(own, rows, query, cache, chunk_scores=scores)
    first = memory.empty((1, scores.shape[1]), "float32")
    alone = BatchRows(memory.put(small.lengths[:1]), padded)
    assert size == library.score_workspace(own, alone, memory.put(small.query[:1]), cache, chunk_scores=first)
    last_group = 4 * padded  # scores of tokens lie last in the workspace, one float per token and group of query rows
    assert size - last_group > 4 * 2**31
    _, workspace = sparse((size,), "uint8")
    library.score(own, rows, query, cache, chunk_scores=scores, workspace=workspace)
    op = NativeOp(library, memory)
    wanted = memory.get(op.score(small.query, small.key, BatchRows(rows.lengths, 302), own, with_tokens=False)[0])
    for row, length in enumerate((300, 250)):
        count = library.max_chunks(own, length)
        assert memory.get(scores)[row, :count].tobytes() == wanted[row, :count].tobytes()


@pytest.mark.deep
def test_a_million_tokens(library: NativeLibrary, memory: Memory) -> None:
    length, own = 1_000_037, settings(1, 10, 4)
    tried = case(own, (length,), heads=1, kv_heads=1, extra_padding=0, contrast=1.0)
    inputs = tried.inputs("float16")
    rows = BatchRows(memory.put(inputs.lengths), length)
    given = memory.get(NativeOp(library, memory).score(inputs.query, inputs.key, rows, own, with_tokens=False)[0])[0]
    logits = inputs.key[0, 0].astype(np.float32) @ inputs.query[0, 0, 0].astype(np.float32) / 8.0
    weights = np.exp(logits.astype(np.float64) - logits.max())
    starts = np.arange(4, length - 1, 10)
    wanted = reference.chunk_scores(weights / weights.sum(), starts, length - 1)
    np.testing.assert_allclose(given, wanted, rtol=TOLERANCE)


@pytest.mark.parametrize("chunks_alone", [False, True])
@pytest.mark.parametrize("storage", STORAGE_TYPES)
def test_garbage_stays_inside(library: NativeLibrary, memory: Memory, storage: str, chunks_alone: bool) -> None:
    """Lengths, block tables, chunk tables and contents may be anything: no access leaves the buffers."""
    rng = np.random.default_rng(7)
    for boundaries in ("fixed", "delimiter"):
        own = settings(6, 5, 2, boundaries=boundaries)
        tried = case(own, (90,) * 6)
        inputs = tried.inputs(storage)
        inputs.key.view(np.uint8)[:] = rng.integers(0, 256, inputs.key.view(np.uint8).shape)
        op = NativeOp(library, memory, layout="paged")
        lengths = np.array([INT32.min, -1, 0, 5, 93, INT32.max], dtype=np.int32)
        rows = BatchRows(memory.put(lengths), inputs.key.shape[2])
        chunks = None
        if boundaries == "delimiter":
            chunks = op.chunks(np.zeros(inputs.key.shape[::2], dtype=np.bool_), rows, own)
            memory.write(chunks.chunk_starts, rng.integers(INT32.min, INT32.max, chunks.chunk_starts.shape, np.int32))
            memory.write(chunks.num_chunks, np.array([-5, 7, INT32.max, 0, 90, 9999], dtype=np.int32))
        op.score(inputs.query, inputs.key, rows, own, chunks, with_tokens=not chunks_alone, wild_table=rng)


def test_arguments_are_checked(library: NativeLibrary, memory: Memory) -> None:
    tried = case(settings(), (40,))
    inputs, op = tried.inputs("float16"), NativeOp(library, memory)
    rows = BatchRows(memory.put(inputs.lengths), inputs.key.shape[2])
    cache, query = make_cache(memory, inputs.key, "contiguous"), memory.put(inputs.query)
    scores = memory.empty((1, 10), "float32")
    size = library.score_workspace(tried.settings, rows, query, cache, chunk_scores=scores)
    with pytest.raises(NativeArgumentError, match="workspace"):
        short = memory.empty((size - 256,), "uint8")
        library.score(tried.settings, rows, query, cache, chunk_scores=scores, workspace=short)
    with pytest.raises(NativeArgumentError, match="max_chunks"):
        library.score_workspace(tried.settings, rows, query, cache, chunk_scores=memory.empty((1, 2), "float32"))
    with pytest.raises(NativeArgumentError, match="16"):
        shifted = memory.put(inputs.query, misalign=2)
        workspace = memory.empty((size,), "uint8")
        library.score(tried.settings, rows, shifted, cache, chunk_scores=scores, workspace=workspace)
    for dtype, head_dim in (("int8", 64), ("float32", 72)):
        assert "there are kernels for" in (library.why_unsupported("score", dtype, dtype, head_dim) or "")
    assert op.library.why_unsupported("score", "float16", "int8", 128, 16) is None
