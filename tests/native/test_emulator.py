"""The emulator itself: what it computes, what it refuses, and that its orders really differ."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from native.build import probe_library

FORWARD, REVERSE, RANDOM, GREEDY = range(4)


class Probe:
    """The kernels of emulator_probe.cu."""

    def __init__(self, path: Path) -> None:
        self.lib = ctypes.CDLL(str(path))
        self.lib.probe_failure.restype = ctypes.c_char_p

    def run(self, name: str, given: Any = None, out: Any = None, *, threads: int = 32, **sizes: int) -> str:
        """Run one kernel; return "", or what the emulator says."""
        pointers = [None if array is None else ctypes.c_void_p(array.ctypes.data) for array in (given, out)]
        shape = (sizes.get("blocks", 1), threads, sizes.get("shared_bytes", 0))
        status = self.lib.probe_run(name.encode(), *shape, *pointers, sizes.get("count", 0))
        assert status in (0, 1)
        return self.lib.probe_failure().decode() if status else ""

    def configure(self, order: int, seed: int = 0, early: bool = False) -> None:
        self.lib.chunkkv_emulator_configure(order, ctypes.c_uint(seed), int(early))


@pytest.fixture(scope="module", params=[(), ("-DEMULATOR_UCONTEXT",)], ids=["own switch", "ucontext"])
def probe(request: pytest.FixtureRequest) -> Iterator[Probe]:
    probe = Probe(probe_library(Path(__file__).with_name("emulator_probe.cu"), request.param))
    yield probe
    probe.configure(FORWARD)


def test_every_conversion(probe: Probe) -> None:
    rng = np.random.default_rng(0)
    ties = (np.arange(2**16, dtype=np.uint32) << 16) + rng.choice(np.uint32([0, 0x7FFF, 0x8000, 0x8001, 0xFFFF]), 2**16)
    near_half = np.arange(0x33000000, 0x47900000, 0x1001, dtype=np.uint32)  # subnormal to overflowing float16
    words = np.concatenate([np.arange(2**16, dtype=np.uint32), ties, near_half, near_half | 0x80000000])
    got = np.full((len(words), 13), 7, dtype=np.float32)
    assert probe.run("convert", words, got, count=len(words)) == ""
    low = words.astype(np.uint16)
    byte = words.astype(np.uint8)
    four = words.view(np.uint8).reshape(-1, 4)
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = [
            low.view(np.float16).astype(np.float32),
            byte.view(ml_dtypes.float8_e4m3fn).astype(np.float32),
            byte.view(np.int8).astype(np.float32),
            words.view(np.float32).astype(np.float16).astype(np.float32),
            words.view(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32),
            *four.T.copy().view(ml_dtypes.float8_e4m3fn).astype(np.float32),
            *four.T.copy().view(np.int8).astype(np.float32),
        ]
    for column, values in enumerate(wanted):
        np.testing.assert_array_equal(got[:, column], values)


def test_warp_collectives(probe: Probe) -> None:
    own = np.random.default_rng(1).integers(0, 1000, 32).astype(np.int32)
    got, lanes = np.zeros((32, 6), dtype=np.int32), np.arange(32)
    assert probe.run("warp", own, got) == ""
    up, down = np.where(lanes < 2, lanes, lanes - 2), np.where(lanes > 29, lanes, lanes + 2)
    votes = np.uint32((own % 2).astype(np.uint64) @ (np.uint64(1) << lanes.astype(np.uint64))).astype(np.int32)
    wanted = [np.full(32, own[5]), own[lanes ^ 3], own[up], own[down], np.full(32, votes), own[lanes ^ 1]]
    np.testing.assert_array_equal(got, np.stack(wanted, axis=1))


def test_matrix_product(probe: Probe) -> None:
    rng = np.random.default_rng(2)
    a, b, c = (rng.normal(size=shape) for shape in ((16, 16), (8, 16), (16, 8)))
    got = c.astype(np.float32)
    assert probe.run("product", np.concatenate([a, b]).astype(np.float16), got) == ""
    wanted = c.astype(np.float32) + a.astype(np.float16).astype(np.float64) @ b.astype(np.float16).astype(np.float64).T
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("early", [False, True])
def test_async_copies_land_early_or_late(probe: Probe, early: bool) -> None:
    given, got = np.arange(1, 5, dtype=np.uint32), np.zeros(8, dtype=np.uint32)
    probe.configure(FORWARD, early=early)
    pointer = np.empty(8, dtype=np.uint32)
    aligned = pointer[(-pointer.ctypes.data % 16) // 4 :][:4]
    aligned[:] = given
    assert probe.run("async copy", aligned, got, threads=1, count=8) == ""
    assert got[:4].tolist() == [1, 2, 0, 0], "bytes behind the count are zero"
    assert got[4:].tolist() == ([1, 2, 3, 4] if early else [0xFFFFFFFF] * 4)


def test_orders_differ_and_can_be_repeated(probe: Probe) -> None:
    def arrivals(order: int, seed: int = 0) -> list[int]:
        out = np.zeros(129, dtype=np.int32)
        probe.configure(order, seed)
        assert probe.run("order", out, out, threads=64) == ""
        assert out[128:].view(np.float32)[0] == 32.0, "float atomics add"
        return out[:128].tolist()

    seen = [arrivals(FORWARD), arrivals(REVERSE), arrivals(RANDOM, 1), arrivals(RANDOM, 2), arrivals(GREEDY)]
    assert all(sorted(one) == sorted([*range(64), *range(64)]) for one in seen)
    assert len({tuple(one) for one in seen}) == 5
    assert arrivals(RANDOM, 1) == seen[2]


def test_shared_memory_starts_as_nan(probe: Probe) -> None:
    got: NDArray[np.float32] = np.zeros(2, dtype=np.float32)
    assert probe.run("poison", None, got, threads=1, shared_bytes=64, count=64) == ""
    assert np.isnan(got).all()


@pytest.mark.parametrize(
    ("name", "threads", "text"),
    [
        ("one barrier each", 64, "different barriers"),
        ("a warp waits for a thread that has exited", 32, "deadlock: 31 threads wait; thread 0 for a collective"),
        ("two collectives", 32, "different collectives"),
        ("not in its mask", 32, "lane 16 calls a collective"),
        ("from outside its mask", 32, "not in its mask"),
        ("misaligned matrix", 32, "ldmatrix: address"),
        ("misaligned copy", 32, "cp.async: address"),
        ("warp", 1025, "threads per block is 1025"),
    ],
)
def test_what_is_refused(probe: Probe, name: str, threads: int, text: str) -> None:
    given, out = np.zeros(64, dtype=np.uint32), np.zeros(64, dtype=np.uint32)
    for order in (FORWARD, REVERSE, RANDOM, GREEDY):
        probe.configure(order, seed=3)
        said = probe.run(name, given, out, threads=threads)
        assert text in said if order == FORWARD else said
    probe.configure(FORWARD)
    assert probe.run("a barrier does not wait for threads that have exited", given, out, threads=64) == ""
    assert out[::2].all() and not out[1::2].any()
