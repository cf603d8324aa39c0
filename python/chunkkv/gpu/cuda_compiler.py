"""Finds nvcc, which builds the plugins and kernels from source; nothing else needs it."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_TOOLKIT = Path("/usr/local/cuda/bin/nvcc")  # where NVIDIA's installers put it
_IN_WHEELS = ("cu*/bin/nvcc", "cuda_nvcc/bin/nvcc")  # below the folder nvidia that NVIDIA's wheels share
_RELEASE = re.compile(r"release ([\d.]+)")
_TIMEOUT_S = 20


@dataclass(frozen=True)
class CudaCompiler:
    """An nvcc.

    Parameters
    ----------
    path : Path
        The program.
    release : str or None
        Release of CUDA that it belongs to, as in "13.0"; None where it does not start or does not tell.
    """

    path: Path
    release: str | None


def find_nvcc() -> CudaCompiler | None:
    """Return the nvcc on the PATH, else that of /usr/local/cuda, else that of NVIDIA's wheels; None without any."""
    on_path = shutil.which("nvcc")
    places = [Path(on_path)] if on_path else []
    places += [path for path in (_TOOLKIT, *_in_wheels()) if path.is_file()]
    return CudaCompiler(places[0], _release(places[0])) if places else None


def _in_wheels() -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec is not None else []
    return sorted(path for folder in folders for pattern in _IN_WHEELS for path in folder.glob(pattern))


def _release(path: Path) -> str | None:
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, check=False, timeout=_TIMEOUT_S, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = _RELEASE.search(done.stdout)
    return match[1] if match else None
