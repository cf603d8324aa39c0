"""layout.h and budget.h, compiled by themselves: every address against NumPy's strides, N(L) against Python's."""

from __future__ import annotations

import ctypes
import itertools
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chunkkv.native import NativeLibrary, RawArray, contiguous_kv, packed_kv, paged_kv
from chunkkv.native import structs as abi
from chunkkv.reference import chunk_starts
from chunkkv.settings import ChunkKVSettings
from native.build import ROOT, compiler

INT32 = np.iinfo(np.int32)
BASE = 1 << 40  # no memory: addresses are only computed


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    output = tmp_path_factory.mktemp("probe") / "probe.so"
    source = Path(__file__).parent / "layout_probe.cc"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(
        [compiler(), *flags, f"-I{ROOT / 'plugins' / 'include'}", str(source), "-o", str(output)], check=True
    )
    library = ctypes.CDLL(str(output))
    for name in ("address", "first_entry", "first_element"):
        getattr(library, f"probe_{name}").restype = ctypes.c_int64
    return library


def address(probe: ctypes.CDLL, layout: abi.Layout, base: int, *place: int) -> int:
    return int(probe.probe_address(ctypes.byref(layout), ctypes.c_int64(base), *place))


def host(values: Any) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.ascontiguousarray(values, dtype=np.int32)


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
def test_contiguous_addresses_follow_any_strides(probe: ctypes.CDLL, axes: tuple[int, ...]) -> None:
    array = np.zeros((3, 4, 5, 64), np.float16).transpose(*np.argsort(axes), 3)
    batch, heads, tokens, _ = array.shape
    raw = RawArray(BASE, "float16", array.shape, array.strides)
    cache = contiguous_kv(raw, raw)
    for row, head, token in itertools.product(range(batch), range(heads), range(tokens)):
        wanted = BASE + np.dot((row, head, token), array.strides[:3])
        assert address(probe, cache.layout, cache.key, 0, row, head, token) == wanted


def test_packed_addresses_count_from_the_start_of_the_row(probe: ctypes.CDLL) -> None:
    starts = host([0, 7, 9])
    qkv = np.zeros((20, 8, 64), np.float32)
    raw = RawArray(BASE + 3 * 256, "float32", (20, 2, 64), qkv.strides)
    cache = packed_kv(raw, raw, starts)
    for row, head, token in itertools.product(range(3), range(2), range(6)):
        wanted = raw.pointer + (int(starts[row]) + token) * qkv.strides[0] + head * qkv.strides[1]
        assert address(probe, cache.layout, cache.key, 0, row, head, token) == wanted


@pytest.mark.parametrize("page", [1, 16, 128])
@pytest.mark.parametrize("layer", [0, 2])
def test_paged_addresses_are_those_of_the_pool(probe: ctypes.CDLL, layer: int, page: int) -> None:
    shape, rng = (11, 3, 2, 4, page, 80), np.random.default_rng(page)
    strides = np.zeros(shape, np.int8).strides
    blocks = rng.permutation(11)[:10].reshape(2, 5)
    offsets = host(np.stack([blocks * 6, blocks * 6 + 1], axis=1))
    cache = paged_kv(RawArray(BASE, "int8", shape), offsets, layer)
    for row, head, kv in itertools.product(range(2), range(4), range(2)):
        for token in range(5 * page):
            place = (blocks[row, token // page], layer, kv, head, token % page)
            base = cache.value if kv else cache.key
            assert address(probe, cache.layout, base, kv, row, head, token) == BASE + np.dot(place, strides[:5])


def test_addresses_do_not_wrap_at_32_bits(probe: ctypes.CDLL) -> None:
    shape = (40, 8, 1_000_000, 256)
    raw = RawArray(BASE, "float32", shape)
    layout = contiguous_kv(raw, raw).layout
    assert address(probe, layout, BASE, 0, 39, 7, 999_999) == BASE + (40 * 8 * 1_000_000 - 1) * 1024
    offsets = host(np.full((1, 2, 8192), 2 * 32 * 99_999))
    pool = paged_kv(RawArray(BASE, "float32", (100_000, 32, 2, 8, 128, 256)), offsets, 31)
    last = ((99_999 * 32 + 31) * 2 * 8 + 7) * 128 + 127
    assert address(probe, pool.layout, pool.key, 0, 0, 7, 8192 * 128 - 1) == BASE + last * 1024


def test_entries_do_not_wrap_at_32_bits(probe: ctypes.CDLL) -> None:
    starts = host([0, INT32.max - 1])
    packed = abi.Rows(row_starts=starts.ctypes.data, num_tokens=INT32.max, batch=2, max_length=2**22)
    padded = abi.Rows(batch=65_535, max_length=2**22)
    assert probe.probe_first_entry(ctypes.byref(packed), 1, 2**22, 2**22) == INT32.max - 1
    assert probe.probe_first_entry(ctypes.byref(padded), 65_534, 2**22, 2**22) == 65_534 * 2**22
    last = INT32.max - 1
    assert probe.probe_first_element(ctypes.c_int64(last), 131_070, 7, 256) == (last * 131_070 + 7) * 256


def inside(shape: tuple[int, ...], item: int) -> Callable[[int, int], bool]:
    size = int(np.prod(shape)) * item
    return lambda start, length: start >= BASE and start + length <= BASE + size


@pytest.mark.parametrize("token", [0, 79, 80, 10**6, INT32.max])
def test_garbage_never_leaves_the_tensor(probe: ctypes.CDLL, token: int) -> None:
    wild = [INT32.min, -1, 1, 5, 65, 66, 67, INT32.max]
    shape = (11, 3, 2, 4, 16, 64)
    for value, layer, kv, head in itertools.product(wild, range(3), range(2), range(4)):
        cache = paged_kv(RawArray(BASE, "float16", shape), host(np.full((1, 2, 5), value)), layer)
        assert inside(shape, 2)(address(probe, cache.layout, cache.key, kv, 0, head, token), 128)
    packed = RawArray(BASE, "float16", (30, 4, 64))
    for value, head in itertools.product(wild, range(4)):
        layout = packed_kv(packed, packed, host([value])).layout
        assert inside(packed.shape, 2)(address(probe, layout, BASE, 0, 0, head, token), 128)
    strided = RawArray(BASE, "float16", (2, 4, 30, 64))
    layout = contiguous_kv(strided, strided).layout
    for row, head in itertools.product(range(2), range(4)):
        assert inside(strided.shape, 2)(address(probe, layout, BASE, 0, row, head, token), 128)


BUDGETS = [
    ChunkKVSettings(keep_per_10k=keep, budget_tokens=budget, min_tokens=minimum)
    for keep in (1, 3_333, 5_000, 9_999, 10_000)
    for budget in (0, 200, 2**31 - 1)
    for minimum in (46, 64, 200)
]
LENGTHS = [0, 1, 45, 46, 47, 63, 64, 65, 200, 214_748, 214_749, 429_497, 1_000_000, 2**22]


@pytest.mark.parametrize("settings", BUDGETS)
def test_kept_tokens_and_chunk_counts_are_those_of_python(library: NativeLibrary, settings: ChunkKVSettings) -> None:
    for length in (*LENGTHS, *np.random.default_rng(0).integers(0, 2**22, 50).tolist()):
        assert library.kept_tokens(settings, length) == settings.kept_tokens(length)
        assert library.max_chunks(settings, length) == len(chunk_starts(length, settings))


def test_rows_override_the_settings_as_in_python(probe: ctypes.CDLL) -> None:
    settings = ChunkKVSettings(keep_per_10k=2_000, budget_tokens=300)
    plain = abi.Settings(keep_per_10k=2_000, budget_tokens=300, min_tokens=settings.min_tokens)
    for ratio, budget, length in itertools.product((None, 1, 7_000), (None, 0, 100), LENGTHS):
        arrays = [host([0, value or 0]) for value in (ratio, budget)]
        given = [
            None if value is None else array.ctypes.data for value, array in zip((ratio, budget), arrays, strict=True)
        ]
        lengths = host([0, length])
        rows = abi.Rows(lengths.ctypes.data, *given, batch=2, max_length=2**22)
        kept = probe.probe_row_kept(ctypes.byref(rows), ctypes.byref(plain), 1)
        assert kept == settings.kept_tokens(length, ratio, budget)
