"""compact against the reference: bytes unchanged in every type and layout, nothing beside slots 0..N-1 touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.messages import naming

from chunkkv import reference
from chunkkv.errors import NativeArgumentError
from chunkkv.native import BatchRows, KVView, NativeLibrary, RawArray, contiguous_kv, packed_kv, paged_kv
from native.devices import on_both_devices
from native.memory import Memory, numpy_dtype

pytestmark = list(on_both_devices)  # a large one cuts the rows of few heads into slices

DTYPES = ["float32", "float16", "bfloat16", "int8", "float8_e4m3fn"]
HEAD_SIZES = [64, 80, 96, 128, 256]
LENGTHS, KEPT = (61, 5, 40, 0), (23, 5, 40, 0)  # a ragged batch; rows 1 and 2 are kept whole
FREE_BLOCKS = 5


def noise(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Random bytes: NaN patterns and all."""
    item = numpy_dtype(dtype).itemsize
    data = rng.integers(0, 256, (*shape, item), dtype=np.uint8)
    return data.view(numpy_dtype(dtype))[..., 0]


def choose(rng: np.random.Generator, lengths: Any, kept: Any) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return kept_indices [B, max N + 1] and kept_lengths [B]: random ascending positions, 0 and 1 among them."""
    indices = np.full((len(lengths), max(kept) + 1), reference.PAD_INDEX, np.int32)
    for row, (length, count) in enumerate(zip(lengths, kept, strict=True)):
        behind = 2 + rng.permutation(max(length - 2, 0))[: max(count - 2, 0)]
        indices[row, :count] = np.sort(np.concatenate([np.arange(min(count, 2)), behind]))
    return indices, np.array(kept, np.int32)


@dataclass
class Pool:
    """TensorRT-LLM's pool [blocks, layers, 2, Hkv, tokens_per_block, D] with shuffled pages, in NumPy."""

    data: NDArray[Any]
    offsets: NDArray[np.int32]

    @classmethod
    def make(
        cls, rng: np.random.Generator, layers: int, heads: int, page: int, dim: int, dtype: str, lengths: Any
    ) -> Pool:
        per_row = -(-max(lengths) // page)
        blocks = len(lengths) * per_row + FREE_BLOCKS
        data = noise(rng, (blocks, layers, 2, heads, page, dim), dtype)
        blocks_of_rows = rng.permutation(blocks)[: len(lengths) * per_row].reshape(len(lengths), per_row)
        offsets = np.stack([blocks_of_rows * layers * 2, blocks_of_rows * layers * 2 + 1], axis=1)
        return cls(data, offsets.astype(np.int32))

    def tokens(self, layer: int, kv: int, row: int) -> NDArray[Any]:
        """Return a view-free copy [Hkv, tokens, D] of what the row's pages hold."""
        blocks = self.offsets[row, 0] // (self.data.shape[1] * 2)
        return np.concatenate(list(self.data[blocks, layer, kv]), axis=1)

    def store(self, layer: int, kv: int, row: int, rows: NDArray[Any]) -> None:
        """Write [Hkv, N, D] to slots 0..N-1."""
        blocks, page = self.offsets[row, 0] // (self.data.shape[1] * 2), self.data.shape[4]
        for slot in range(rows.shape[1]):
            self.data[blocks[slot // page], layer, kv, :, slot % page] = rows[:, slot]


def check_bytes(got: NDArray[Any], wanted: NDArray[Any]) -> None:
    np.testing.assert_array_equal(got.view(np.uint8), wanted.view(np.uint8))


def place_rows(memory: Memory, lengths: Any, padded: int) -> BatchRows:
    return BatchRows(memory.put(np.array(lengths, np.int32)), padded)


def compact_paged(library: NativeLibrary, memory: Memory, pool: Pool, lengths: Any, kept: Any, seed: int = 0) -> None:
    """Compact all layers of a pool in place; everything but the slots 0..N-1 must stay as it was."""
    indices, counts = choose(np.random.default_rng(seed), lengths, kept)
    data, table = memory.put(pool.data), memory.put(pool.offsets)
    layers = range(pool.data.shape[1])
    caches = [paged_kv(data, table, layer) for layer in layers]
    library.compact(place_rows(memory, lengths, max(lengths)), memory.put(indices), memory.put(counts), caches)
    for layer in layers:
        for kv in (0, 1):
            for row, count in enumerate(kept):
                pool.store(layer, kv, row, reference.compact(pool.tokens(layer, kv, row), indices[row, :count]))
    check_bytes(memory.get(data), pool.data)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", HEAD_SIZES)
def test_in_place_in_a_paged_pool(library: NativeLibrary, memory: Memory, dim: int, dtype: str) -> None:
    pool = Pool.make(np.random.default_rng(dim), 2, 3, 16, dim, dtype, LENGTHS)
    compact_paged(library, memory, pool, LENGTHS, KEPT)


@pytest.mark.parametrize("page", [1, 2, 8, 32, 64, 128])
def test_every_page_size(library: NativeLibrary, memory: Memory, page: int) -> None:
    pool = Pool.make(np.random.default_rng(page), 1, 2, page, 64, "float16", LENGTHS)
    compact_paged(library, memory, pool, LENGTHS, KEPT)


@pytest.mark.parametrize("kept", [1300, 1100, 513, 512, 511, 40])
def test_in_place_over_several_tiles(library: NativeLibrary, memory: Memory, kept: int) -> None:
    """A tile of a 64-byte slice is 512 slots; most slots move by a few tokens, across page and tile borders."""
    pool = Pool.make(np.random.default_rng(kept), 1, 1, 32, 64, "float16", (1300,))
    compact_paged(library, memory, pool, (1300,), (kept,))


def test_in_place_in_more_layers_than_one_launch_takes(library: NativeLibrary, memory: Memory) -> None:
    pool = Pool.make(np.random.default_rng(1), 70, 5, 8, 64, "int8", (300,))
    compact_paged(library, memory, pool, (300,), (270,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", HEAD_SIZES)
def test_contiguous_out_of_place_and_in_place(library: NativeLibrary, memory: Memory, dim: int, dtype: str) -> None:
    rng = np.random.default_rng(dim)
    indices, counts = choose(rng, LENGTHS, KEPT)
    shape, out_shape = (len(LENGTHS), 2, max(LENGTHS) + 2, dim), (len(LENGTHS), 2, max(KEPT) + 1, dim)
    values = [noise(rng, shape, dtype) for _ in range(4)]
    arrays = [memory.put(array) for array in values]
    outputs = [memory.empty(out_shape, dtype) for _ in values]
    rows, kept = place_rows(memory, LENGTHS, shape[2]), (memory.put(indices), memory.put(counts))
    layers = [contiguous_kv(*arrays[:2]), contiguous_kv(*arrays[2:])]
    library.compact(rows, *kept, layers, [contiguous_kv(*outputs[:2]), contiguous_kv(*outputs[2:])])
    library.compact(rows, *kept, layers)
    for source, array, output in zip(values, arrays, outputs, strict=True):
        poison = np.full(out_shape, 0, numpy_dtype(dtype))
        poison.view(np.uint8)[:] = 0xFF
        for row, count in enumerate(KEPT):
            poison[row, :, :count] = source[row, :, :count] = reference.compact(source[row], indices[row, :count])
        check_bytes(memory.get(output), poison)
        check_bytes(memory.get(array), source)


@pytest.mark.parametrize("misalign", [1, 2, 4, 8])
def test_memory_that_is_not_16_byte_aligned(library: NativeLibrary, memory: Memory, misalign: int) -> None:
    rng = np.random.default_rng(misalign)
    indices, counts = choose(rng, LENGTHS, KEPT)
    values = noise(rng, (len(LENGTHS), 2, max(LENGTHS), 64), "int8")
    keys, output = memory.put(values, misalign), memory.empty((len(LENGTHS), 2, max(KEPT) + 1, 64), "int8", misalign)
    rows, kept = place_rows(memory, LENGTHS, max(LENGTHS)), (memory.put(indices), memory.put(counts))
    other, other_output = memory.put(values), memory.empty(output.shape, "int8")
    library.compact(rows, *kept, [contiguous_kv(keys, other)], [contiguous_kv(output, other_output)])
    library.compact(rows, *kept, [contiguous_kv(keys, other)])
    for row, count in enumerate(KEPT):
        wanted = reference.compact(values[row], indices[row, :count])
        for array in (keys, other, output, other_output):
            check_bytes(memory.get(array)[row, :, :count].copy(), wanted)


def test_from_packed_qkv_into_a_paged_pool(library: NativeLibrary, memory: Memory) -> None:
    """K and V are views of QKV [T, (Hq + 2 Hkv) D]; rows lie back to back."""
    rng = np.random.default_rng(3)
    heads, kv_heads, dim = 4, 2, 64
    indices, counts = choose(rng, LENGTHS, KEPT)
    qkv = noise(rng, (sum(LENGTHS), heads + 2 * kv_heads, dim), "bfloat16")
    raw = memory.put(qkv)
    starts = np.cumsum([0, *LENGTHS[:-1]]).astype(np.int32)
    shape, strides = (sum(LENGTHS), kv_heads, dim), raw.strides
    views = [
        RawArray(raw.pointer + first * dim * 2, raw.dtype, shape, strides, raw.on_device)
        for first in (heads, heads + kv_heads)
    ]
    pool = Pool.make(rng, 3, kv_heads, 16, dim, "bfloat16", LENGTHS)
    data = memory.put(pool.data)
    library.compact(
        place_rows(memory, LENGTHS, max(LENGTHS)),
        memory.put(indices),
        memory.put(counts),
        [packed_kv(*views, memory.put(starts))],
        [paged_kv(data, memory.put(pool.offsets), layer=1)],
    )
    for row, count in enumerate(KEPT):
        tokens = qkv[starts[row] : starts[row] + LENGTHS[row]].swapaxes(0, 1)
        for kv, first in enumerate((heads, heads + kv_heads)):
            pool.store(1, kv, row, reference.compact(tokens[first : first + kv_heads], indices[row, :count]))
    check_bytes(memory.get(data), pool.data)


def test_token_major_strides(library: NativeLibrary, memory: Memory) -> None:
    """[B, S, Hkv, D], as torch users keep it."""
    rng = np.random.default_rng(4)
    indices, counts = choose(rng, LENGTHS, KEPT)
    values = noise(rng, (len(LENGTHS), max(LENGTHS), 3, 96), "float32")
    raw = memory.put(values)
    batch, tokens, heads, dim = raw.shape
    assert raw.strides is not None
    strides = (raw.strides[0], raw.strides[2], raw.strides[1], raw.strides[3])
    view = RawArray(raw.pointer, raw.dtype, (batch, heads, tokens, dim), strides, raw.on_device)
    output = memory.empty((batch, heads, max(KEPT) + 1, dim), raw.dtype)
    cache, out = contiguous_kv(view, view), contiguous_kv(output, output)
    library.compact(place_rows(memory, LENGTHS, tokens), memory.put(indices), memory.put(counts), [cache], [out])
    for row, count in enumerate(KEPT):
        wanted = reference.compact(values[row].swapaxes(0, 1), indices[row, :count])
        check_bytes(memory.get(output)[row, :, :count].copy(), wanted)


@pytest.mark.parametrize("seed", range(4))
def test_garbage_is_memory_safe(library: NativeLibrary, memory: Memory, seed: int) -> None:
    """Indices, lengths and page tables of any value: nothing outside the pool is touched (guard bytes, ASan)."""
    rng = np.random.default_rng(seed)
    wild = np.array([-(2**31), -1, 0, 3, 60, 10**6, 2**31 - 1], np.int32)
    pool = Pool.make(rng, 2, 2, 16, 64, "float16", LENGTHS)
    data, table = memory.put(pool.data), memory.put(rng.choice(wild, pool.offsets.shape))
    rows = place_rows(memory, rng.choice(wild, len(LENGTHS)), max(LENGTHS))
    kept = memory.put(rng.choice(wild, (len(LENGTHS), 60))), memory.put(rng.choice(wild, len(LENGTHS)))
    caches = [paged_kv(data, table, layer) for layer in (0, 1)]
    library.compact(rows, *kept, caches)
    output = memory.empty((len(LENGTHS), 2, 60, 64), "float16")
    library.compact(rows, *kept, caches, [contiguous_kv(output, output)] * 2)
    packed = RawArray(data.pointer, "float16", (100, 2, 64), on_device=data.on_device)
    starts = memory.put(rng.choice(wild, len(LENGTHS)))
    library.compact(rows, *kept, [packed_kv(packed, packed, starts)], [contiguous_kv(output, output)])


def test_a_table_shorter_than_the_padded_length_is_refused(library: NativeLibrary, memory: Memory) -> None:
    pool = Pool.make(np.random.default_rng(0), 1, 1, 16, 64, "float16", (20,))
    cache: KVView = paged_kv(memory.put(pool.data), memory.put(pool.offsets), 0)
    kept = memory.put(np.zeros((1, 3), np.int32)), memory.put(np.zeros(1, np.int32))
    with pytest.raises(NativeArgumentError, match="max_blocks"):
        library.compact(place_rows(memory, (20,), 33), *kept, [cache])


@pytest.mark.parametrize("slots", [1, 30, 2_000])
def test_every_slot_is_written_without_kept_lengths(library: NativeLibrary, memory: Memory, slots: int) -> None:
    """Slots behind N repeat the row's first token, and there may be more slots than tokens."""
    rng = np.random.default_rng(slots)
    key, value = (noise(rng, (3, 2, 40, 64), "float16") for _ in range(2))
    indices = np.full((3, slots), reference.PAD_INDEX, np.int32)
    for row, kept in enumerate((min(slots, 40), min(slots, 9), 0)):
        indices[row, :kept] = np.sort(rng.choice(40, kept, replace=False))
    out = [memory.empty((3, 2, slots, 64), "float16") for _ in range(2)]
    rows, caches = place_rows(memory, (40, 9, 1), 40), [contiguous_kv(memory.put(key), memory.put(value))]
    library.compact(rows, memory.put(indices), None, caches, [contiguous_kv(*out)])
    check_bytes(memory.get(out[0]), reference.compact_batch(key, indices))
    check_bytes(memory.get(out[1]), reference.compact_batch(value, indices))
    with pytest.raises(NativeArgumentError, match=naming("kept_lengths NULL")):
        library.compact(rows, memory.put(indices), None, caches)


@pytest.mark.parametrize("row_bytes", [66, 100, 160, 192, 260])
def test_slices_that_do_not_fill_the_row(library: NativeLibrary, memory: Memory, row_bytes: int) -> None:
    """One head of one layer: the last slice is narrower than the others, and must not reach the next token."""
    pool = Pool.make(np.random.default_rng(row_bytes), 1, 1, 16, row_bytes, "int8", (90,))
    compact_paged(library, memory, pool, (90,), (40,), seed=row_bytes)


def test_what_would_go_outside_the_pool_is_not_written(library: NativeLibrary, memory: Memory) -> None:
    """Pages of a slot that lie outside, on the host's side or behind the end: no other block may get its tokens."""
    pool = Pool.make(np.random.default_rng(3), 1, 2, 16, 64, "float16", (64,))
    indices, counts = choose(np.random.default_rng(4), (64,), (40,))
    for outside in (-(2**31), -1, pool.data.shape[0] * 2, 2**31 - 1):
        offsets = pool.offsets.copy()
        offsets[0, :, 1] = outside  # slots 16 to 31
        data, table = memory.put(pool.data), memory.put(offsets)
        library.compact(
            place_rows(memory, (64,), 64), memory.put(indices), memory.put(counts), [paged_kv(data, table, 0)]
        )
        moved, own = memory.get(data), set((pool.offsets[0, 0, [0, 2, 3]] // 2).tolist())
        for block in range(pool.data.shape[0]):
            if block not in own:
                check_bytes(moved[block], pool.data[block])
