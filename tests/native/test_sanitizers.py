"""The op tests again, in child processes, on a library built with AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from native.build import ROOT, Mutation, compiler, emulated_library

pytestmark = pytest.mark.deep

HERE = Path(__file__).parent
# Where a choice is made, it covers every type, layout and page size, several tiles, devices of 1 to 132
# multiprocessors, and garbage.
SELECTED = {
    "test_select.py": "garbage or reference or cut or threads or million",
    "test_boundaries.py": None,
    "test_compact.py": None,
    "test_rope.py": None,
    "test_prepare.py": None,
    "test_device_memory.py": None,
    "test_packed.py": "garbage or whole or compact or select or pooling or delimiter",
    "test_score.py": "garbage or every_type or page or every_grid",
}


def run_sanitized(library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest with the sanitizers' runtime in front: Python itself is not built with them."""
    names = ("libasan.so", "libubsan.so")
    runtimes = [
        subprocess.run(
            [compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in names
    ]
    environment = os.environ | {
        "CHUNKKV_LIB": str(library),
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter frees little when it ends
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("file", SELECTED)
def test_no_access_outside_and_no_undefined_behaviour(file: str) -> None:
    chosen = SELECTED[file]
    done = run_sanitized(emulated_library("asan"), str(HERE / file), *(["-k", chosen] if chosen else []))
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout


BUGS = {
    "token bitmap read past its end": (
        "test_boundaries.py",
        "vocabulary",
        Mutation("kernels/chunks.cuh", "id < vocab_size &&", "id < vocab_size + 4096 &&"),
        "AddressSanitizer",
    ),
    "positions not clamped": (
        "test_rope.py",
        "clamped",
        Mutation("kernels/rope.cu", "const int64_t position = given < 0", "const int64_t position = given < -last"),
        "AddressSanitizer",
    ),
    "shift by the width of the word": (
        "test_select.py",
        "cut",
        Mutation("kernels/select.cu", "pass == 0 ? 21 :", "pass == 0 ? 32 :"),
        "runtime error: shift exponent 32 is too large",
    ),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_reported(bug: str) -> None:
    file, chosen, mutation, report = BUGS[bug]
    done = run_sanitized(emulated_library("asan", (mutation,)), "-s", str(HERE / file), "-k", chosen)
    assert done.returncode != 0
    assert report in done.stdout + done.stderr, (done.stdout + done.stderr)[-3000:]
