"""Builds the plugins for TensorRT for RTX with CMake, as a user does, and returns the folder that holds them.

Where nvcc is, they call the kernels for a GPU; elsewhere the emulated ones. Nothing runs here, and all that TensorRT
asks of a plugin while it builds (fields, shapes, types, formats, workspace, the stored fields) is the same code. So the
kernels are compiled quickly; tests/test_native_wheel.py compiles them as they are shipped. Where CHUNKKV_LIB names a
libchunkkv.so, the plugins beside it are tested instead.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "real-tensorrt"
GIVEN = os.environ.get("CHUNKKV_LIB")
TARGETS = ("chunkkv_tensorrt_rtx1", "chunkkv_rtx_name", "chunkkv_tensorrt10", "chunkkv_tensorrt11")
TARGETS += ("chunkkv_tensorrt_loader",)


def kernels() -> str:
    """Return which kernels the plugins call here."""
    if GIVEN:
        return f"those of {GIVEN}"
    return "kernels for a GPU" if _nvcc() else "emulated kernels"


def missing_tools() -> list[str]:
    """Return the programs that building the plugins needs and this machine lacks."""
    return [] if GIVEN else [tool for tool in ("cmake", "g++") if shutil.which(tool) is None]


def plugin_folder() -> Path:
    """Return the folder of the plugin library, built unless it is up to date."""
    if GIVEN:
        return Path(GIVEN).parent
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / ".lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests in several processes want it at once
        _run("cmake", "-S", str(ROOT), "-B", str(BUILD), f"-DCMAKE_CUDA_FLAGS={_quickly()}")
        _run("cmake", "--build", str(BUILD), "-j2", "--target", *TARGETS)
    return BUILD if _nvcc() else BUILD / "emulated"


def _nvcc() -> str | None:
    """Return the compiler of CUDA that CMake takes."""
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def _quickly() -> str:
    """Return the flag with which nvcc leaves out what makes kernels fast, where it knows one: no kernel runs here."""
    if (nvcc := _nvcc()) is None:
        return ""
    told = subprocess.run([nvcc, "--help"], capture_output=True, text=True, check=True).stdout
    return "--Ofast-compile=max" if "--Ofast-compile" in told else ""


def _run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
