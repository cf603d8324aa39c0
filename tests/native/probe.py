"""Every op once, on inputs small enough for sanitizers and sharp enough for planted bugs. Run in a process of its own:

    CHUNKKV_LIB=... python -m native.probe --order greedy --async-copies early compact select

Exit status 0: all right; 1: wrong results or a refusal; anything else: a crash or a sanitizer's report.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import traceback
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from chunkkv import reference
from chunkkv.native import NativeLibrary, contiguous_kv
from native import (
    test_boundaries,
    test_choices,
    test_compact,
    test_packed,
    test_prepare,
    test_rope,
    test_score,
    test_select,
)
from native.build import ROOT, runtime
from native.devices import LARGE, SMALL, device_of
from native.memory import Memory
from native.native_op import NativeOp
from native.score_checks import TOLERANCE, largest_error


class Outcome(NamedTuple):
    """How a probe ended, and the end of what it wrote."""

    status: int
    text: str


ORDERS = ("forward", "reverse", "random", "greedy")
ASYNC = ("late", "early")


def boundaries(library: NativeLibrary, memory: Memory) -> None:
    """Rows of one, several and no tiles; one whose only run goes on from tile to tile."""
    rng = np.random.default_rng(1)
    own = replace(test_boundaries.SETTINGS, chunk_size=7, min_tokens=14)
    ids = [test_boundaries.draw_ids(rng, n, rate) for n, rate in ((9_000, 0.2), (40, 0.2), (0, 0.2), (9_000, 0.0))]
    for packed_ids in (False, True):
        test_boundaries.check(library, memory, own, ids, packed_ids)


def score(library: NativeLibrary, memory: Memory) -> None:
    """More tiles per block than stages, chunks across tiles, rows that end inside a tile, a table that ends with L."""
    tried = test_score.case(test_score.settings(9, 10), (700, 611), heads=8, extra_padding=0)
    for chunks_alone in (True, False):
        op = NativeOp(library, memory, layout="paged")
        assert largest_error(op, tried, "float16", chunks_alone) < TOLERANCE
    pooled = test_score.case(test_score.settings(3, 6, 1, pooling=5), (300, 128))
    assert largest_error(NativeOp(library, memory), pooled, "float16", chunks_alone=True) < TOLERANCE


def bands(library: NativeLibrary, memory: Memory) -> None:
    """More query rows of a KV head than a block holds; a last row that ends the tensor inside a tile."""
    tried = test_score.case(test_score.settings(16, 10), (75, 130), heads=16, kv_heads=1)
    assert largest_error(NativeOp(library, memory), tried, "float16", chunks_alone=False) < TOLERANCE


def ragged(library: NativeLibrary, memory: Memory) -> None:
    """Stretches of tiles that begin and end in rows of no tiles, of one and of many."""
    lengths = (5, 1500, 1, 6, 700, 0, 14, 2000, 33)
    tried = test_score.case(test_score.settings(5, 5), lengths, heads=2, kv_heads=1)
    for multiprocessors in (1, 2, 3, 11, LARGE) if library.device == "emulated" else (LARGE,):
        with device_of(library, multiprocessors) if library.device == "emulated" else nullcontext():
            op = NativeOp(library, memory, layout="paged", chunks_alone=True)
            assert largest_error(op, tried, "float16", chunks_alone=True) < TOLERANCE


def spread(library: NativeLibrary, memory: Memory) -> None:
    """Later tokens that are far above those of the first tile, and so many heads that a piece has several tiles."""
    rising = test_score.case(test_score.settings(8, 10), (300,), heads=256, kv_heads=256)
    inputs = rising.inputs("float16")
    inputs.query[..., 0], inputs.key[..., 0] = 30.0, np.linspace(-60, 60, inputs.key.shape[2])
    op = NativeOp(library, memory)
    scores = op.select(inputs.query, inputs.key, inputs.lengths, rising.settings)[2]
    wanted = reference.select_batch(inputs.query, inputs.key, inputs.lengths, rising.settings).token_scores
    assert np.isfinite(scores).all()
    # A float32 logit of this size is known to 1e-5, and so is its exponential.
    np.testing.assert_allclose(scores[0], wanted[0], rtol=1e-4, atol=1e-4 * wanted[0].max())


def choices(library: NativeLibrary, memory: Memory) -> None:
    """Windows of requests, reductions, norms, choices per head, classes."""
    for name in ("largest of both", "value norms", "each head by its largest"):
        given = test_choices.arrays(replace(test_choices.OWN, **test_choices.VARIANTS[name]))
        test_choices.check(NativeOp(library, memory, layout="paged"), given)
    test_choices.test_class_lengths_are_pythons(library)
    for in_place in (True, False):
        test_choices.test_compaction_per_head_and_of_some_heads(library, memory, in_place)


def quantized(library: NativeLibrary, memory: Memory) -> None:
    """8-bit keys, NaN among them, and a scale that is for them alone."""
    test_score.test_nan_in_fp8_is_nan(library, memory, "float16")
    test_score.test_a_scale_is_for_8_bit_keys_alone(library, memory)


def score_types(library: NativeLibrary, memory: Memory) -> None:
    """The other ways to multiply and to stage."""
    tried = test_score.case(test_score.settings(), (300, 211))
    for storage, key_storage, dim in (("float32", None, 64), ("bfloat16", "int8", 80), ("float32", None, 256)):
        op = NativeOp(library, memory, key_storage, layout="packed")
        assert largest_error(op, replace(tried, head_dim=dim), storage, chunks_alone=True) < TOLERANCE


def select(library: NativeLibrary, memory: Memory) -> None:
    """More chunks than threads; many equal scores."""
    own = replace(test_select.SMALL, chunk_size=1)
    test_select.make(own, [1500, 40], "random").check(library, memory)
    test_select.make(test_select.SMALL, [3700, 9], "few values").check(library, memory)


def select_special(library: NativeLibrary, memory: Memory) -> None:
    """Zeros of both signs, NaN, infinities."""
    for seed in range(4):
        test_select.make(test_select.SMALL, test_select.LENGTHS, "special values", seed).check(library, memory)


def compact(library: NativeLibrary, memory: Memory) -> None:
    """In place over several tiles, across pages; and out of place."""
    pool = test_compact.Pool.make(np.random.default_rng(1), 1, 2, 16, 64, "float16", (1300, 61))
    test_compact.compact_paged(library, memory, pool, (1300, 61), (1100, 23))
    key = np.random.default_rng(2).normal(size=(1, 2, 1300, 64)).astype(np.float16)
    indices, counts = test_compact.choose(np.random.default_rng(3), (1300,), (700,))
    given, target = memory.put(key), memory.empty((1, 2, 700, 64), "float16")
    value, value_target = memory.put(key + 1), memory.empty((1, 2, 700, 64), "float16")
    rows = test_compact.place_rows(memory, (1300,), 1300)
    outputs = [contiguous_kv(target, value_target)]
    listed = memory.put(indices[:, :700])
    library.compact(rows, listed, memory.put(counts), [contiguous_kv(given, value)], outputs)
    test_compact.check_bytes(memory.get(target)[0], reference.compact(key[0], indices[0, :700]))
    test_compact.check_bytes(memory.get(value_target)[0], reference.compact(key[0] + 1, indices[0, :700]))


def compact_large(library: NativeLibrary, memory: Memory) -> None:
    """Slices of a row, and pages outside the pool."""
    for row_bytes in (66, 160):
        test_compact.test_slices_that_do_not_fill_the_row(library, memory, row_bytes)
    test_compact.test_what_would_go_outside_the_pool_is_not_written(library, memory)


def compact_layers(library: NativeLibrary, memory: Memory) -> None:
    """More layers than one launch takes."""
    test_compact.test_in_place_in_more_layers_than_one_launch_takes(library, memory)


def select_cut(library: NativeLibrary, memory: Memory) -> None:
    """Lists that are cut where their array ends."""
    for max_kept in range(9, 30):
        test_select.test_nothing_is_written_behind_a_list_that_is_cut(library, memory, max_kept)


def rope(library: NativeLibrary, memory: Memory) -> None:
    """Both styles, in place."""
    for style in ("neox", "gptj"):
        test_rope.check(library, memory, "float16", 64, 64, style, in_place=True)


def packed(library: NativeLibrary, memory: Memory) -> None:
    """Packed rows give the bits of padded ones, in every op."""
    for pooling in (1, 3):
        own = test_score.settings(5, 4, 2, boundaries="delimiter", pooling=pooling)
        test_packed.check_against_padded(library, memory, test_score.case(own, (150, 30, 97)), chunks_alone=False)
    test_packed.check_against_padded(
        library, memory, test_score.case(test_score.settings(), (150, 97)), chunks_alone=True
    )
    test_packed.test_select_leaves_the_next_row_alone(library, memory)
    test_packed.test_compact_in_place(library, memory)


def whole(library: NativeLibrary, memory: Memory) -> None:
    """In place, rows that are kept whole are not touched."""
    test_packed.test_rows_that_are_kept_whole_are_not_touched_in_place(library, memory, True)


def prepare(library: NativeLibrary, memory: Memory) -> None:
    """More rows than a tile of the scan, with and without tokens."""
    test_prepare.Batch.draw(1, 1100, 700, longest=3, trailing=2).check(library, memory)
    test_prepare.Batch.draw(2, 3, 2).check(library, memory)


def garbage_score(library: NativeLibrary, memory: Memory) -> None:
    """Here and below nothing leaves the buffers; AddressSanitizer and the guard bytes watch."""
    for chunks_alone in (True, False):
        test_score.test_garbage_stays_inside(library, memory, "float16", chunks_alone)


def garbage_compact(library: NativeLibrary, memory: Memory) -> None:
    """Block tables, lists and lengths of any value."""
    test_compact.test_garbage_is_memory_safe(library, memory, 1)


def garbage_packed(library: NativeLibrary, memory: Memory) -> None:
    """Row starts of any value, in every op."""
    for boundaries_kind in ("fixed", "delimiter"):
        for seed in range(3):
            test_packed.test_garbage_stays_inside(library, memory, boundaries_kind, seed)


def garbage_prepare(library: NativeLibrary, memory: Memory) -> None:
    """A batch of any content."""
    test_prepare.test_garbage_stays_inside(library, memory, 1)


GARBAGE = (garbage_score, garbage_compact, garbage_packed, garbage_prepare)
OF_SCORE = (score, bands, score_types, quantized, ragged, spread, choices)
OF_OTHERS = (
    boundaries,
    select,
    select_special,
    select_cut,
    compact,
    compact_large,
    compact_layers,
    rope,
    whole,
    prepare,
)
CHECKS = {check.__name__: check for check in (*OF_SCORE, *OF_OTHERS, packed, *GARBAGE)}


def run(
    library: Path,
    *checks: str,
    order: str = "forward",
    copies: str = "late",
    preload: str = "",
    multiprocessors: int = SMALL,
) -> Outcome:
    """Run checks in a process of their own; `preload` names a sanitizer's runtime, such as libtsan.so."""
    environment = {**os.environ, "CHUNKKV_LIB": str(library), "OPENBLAS_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / folder) for folder in ("python", "tests"))
    if preload:
        environment["LD_PRELOAD"] = runtime(preload)
        environment |= {"TSAN_OPTIONS": "exitcode=66 halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-m", "native.probe", "--order", order, "--async-copies", copies]
    command += ["--multiprocessors", str(multiprocessors), *checks]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return Outcome(done.returncode, done.stderr[-4000:])


def main() -> int:
    """Run the named checks in one order of threads."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--order", choices=ORDERS, default="forward")
    parser.add_argument("--async-copies", choices=ASYNC, default="late")
    parser.add_argument("--multiprocessors", type=int, default=SMALL)
    parser.add_argument("checks", nargs="*", default=list(CHECKS))
    args = parser.parse_args()
    path = os.environ["CHUNKKV_LIB"]
    library = NativeLibrary(path)
    if library.device == "emulated":
        configure = ctypes.CDLL(path).chunkkv_emulator_configure
        configure(ORDERS.index(args.order), ctypes.c_uint(1), ASYNC.index(args.async_copies))
        ctypes.CDLL(path).chunkkv_emulator_multiprocessors(args.multiprocessors)
    for name in args.checks:
        memory = Memory(library.device)
        try:
            CHECKS[name](library, memory)
            memory.release()
        except Exception:
            print(f"{name}: {traceback.format_exc()[-1500:]}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
