"""Every op once, on inputs small enough for sanitizers and sharp enough for planted bugs. Run in a process of its own:

    CHUNKKV_LIB=... python -m native.probe --order greedy --async-copies early compact select

Exit status 0: all right; 1: wrong results or a refusal; anything else: a crash or a sanitizer's report.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import traceback
from dataclasses import replace

import numpy as np

from chunkkv.native import NativeLibrary
from native import test_boundaries, test_compact, test_rope, test_score, test_select
from native.memory import Memory
from native.native_op import NativeOp
from native.score_checks import TOLERANCE, largest_error

ORDERS = ("forward", "reverse", "random", "greedy")
ASYNC = ("late", "early")


def boundaries(library: NativeLibrary, memory: Memory) -> None:
    """Rows of one, several and no tiles."""
    rng = np.random.default_rng(1)
    own = replace(test_boundaries.SETTINGS, chunk_size=7, min_tokens=14)
    test_boundaries.check(library, memory, own, [test_boundaries.draw_ids(rng, n, 0.2) for n in (9_000, 40, 0)])


def score(library: NativeLibrary, memory: Memory) -> None:
    """More tiles per block than stages, chunks across tiles, rows that end inside a tile, a table that ends with L."""
    tried = test_score.case(test_score.settings(9, 10), (700, 611), heads=8, extra_padding=0)
    for storage, key_storage in (("float16", None), ("float32", None), ("bfloat16", "int8")):
        for one_pass in (True, False):
            op = NativeOp(library, memory, key_storage, layout="paged")
            assert largest_error(op, tried, storage, one_pass) < TOLERANCE
    pooled = test_score.case(test_score.settings(3, 6, 1, pooling=5), (300, 128))
    assert largest_error(NativeOp(library, memory), pooled, "float16", one_pass=True) < TOLERANCE


def select(library: NativeLibrary, memory: Memory) -> None:
    """More chunks than threads; many equal scores."""
    own = replace(test_select.SMALL, chunk_size=1)
    test_select.make(own, [1500, 40], "random").check(library, memory)
    test_select.make(test_select.SMALL, [3700, 9], "few values").check(library, memory)


def compact(library: NativeLibrary, memory: Memory) -> None:
    """In place over several tiles, across pages; and out of place."""
    pool = test_compact.Pool.make(np.random.default_rng(1), 1, 2, 16, 64, "float16", (1300, 61))
    test_compact.compact_paged(library, memory, pool, (1300, 61), (1100, 23))
    test_compact.test_contiguous_out_of_place_and_in_place(library, memory, 80, "bfloat16")


def rope(library: NativeLibrary, memory: Memory) -> None:
    """Both styles, in place."""
    for style in ("neox", "gptj"):
        test_rope.check(library, memory, "float16", 64, 64, style, in_place=True)


CHECKS = {check.__name__: check for check in (boundaries, score, select, compact, rope)}


def main() -> int:
    """Run the named checks in one order of threads."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--order", choices=ORDERS, default="forward")
    parser.add_argument("--async-copies", choices=ASYNC, default="late")
    parser.add_argument("checks", nargs="*", default=list(CHECKS))
    args = parser.parse_args()
    path = os.environ["CHUNKKV_LIB"]
    library = NativeLibrary(path)
    configure = ctypes.CDLL(path).chunkkv_emulator_configure
    configure(ORDERS.index(args.order), ctypes.c_uint(1), ASYNC.index(args.async_copies))
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
