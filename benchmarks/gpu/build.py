"""Builds libchunkkv for the GPU at hand with nvcc alone, one object per file."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "plugins"


def find_nvcc() -> str | None:
    """Return nvcc's path: on PATH, or in the toolkit's usual place."""
    usual = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(usual) if usual.is_file() else None)


def build_library(capability: tuple[int, int], folder: Path) -> Path:
    """Return the library for a compute capability such as (9, 0); raises SystemExit with nvcc's words."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit("nvcc was not found on PATH or in /usr/local/cuda/bin; install the CUDA toolkit")
    folder.mkdir(parents=True, exist_ok=True)
    number = f"{capability[0]}{capability[1]}"
    flags = [
        f"-arch=sm_{'90a' if number == '90' else number}",
        "-std=c++17",
        "-O3",
        "-Xcompiler=-fPIC,-fvisibility=hidden",
    ]
    flags += [f"-I{PLUGINS / part}" for part in ("", "include", "kernels")]

    def compile_one(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        _run([nvcc, *flags, "-c", str(source), "-o", str(target)])
        return str(target)

    sources = [*sorted((PLUGINS / "kernels").glob("*.cu")), PLUGINS / "api.cc"]
    with ThreadPoolExecutor(min(len(sources), os.cpu_count() or 2)) as jobs:
        objects = list(jobs.map(compile_one, sources))
    library, partial = folder / "libchunkkv.so", folder / "libchunkkv.so.partial"
    _run([nvcc, "-shared", f"-Xlinker=--version-script={PLUGINS / 'exports.map'}", *objects, "-o", str(partial)])
    partial.replace(library)
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
