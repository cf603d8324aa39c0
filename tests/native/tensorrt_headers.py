"""Where the headers of the plugin interface come from: the project's own declarations, or NVIDIA's where present."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from native.build import ROOT

OWN = ROOT / "plugins" / "tensorrt" / "abi"
SYSTEM = ("/usr/include/x86_64-linux-gnu", "/usr/include", "/usr/local/tensorrt/include", "/opt/tensorrt/include")


class Headers(NamedTuple):
    """A set of headers, and what a compiler needs to use them."""

    name: str
    major: int
    flags: tuple[str, ...]


def own_headers(major: int) -> Headers:
    """Return the project's declarations with the layout of TensorRT `major`."""
    return Headers(f"own{major}", major, (f"-I{OWN}", f"-DNV_TENSORRT_MAJOR={major}"))


def real_headers() -> list[Headers]:
    """Return NVIDIA's headers of TENSORRT_INCLUDE_DIR (folders, separated by ':') or of the system; may be empty."""
    given = os.environ.get("TENSORRT_INCLUDE_DIR")
    folders = given.split(os.pathsep) if given else [f for f in SYSTEM if Path(f, "NvInferRuntime.h").is_file()][:1]
    return [_read(Path(folder)) for folder in folders]


def _read(folder: Path) -> Headers:
    text = (folder / "NvInferVersion.h").read_text(encoding="utf-8")
    found = dict(re.findall(r"#define (?:NV_TENSORRT|TRT)_(MAJOR|MINOR|PATCH)(?:_ENTERPRISE)? (\d+)", text))
    cuda = _cuda_include()
    includes = [f"-isystem{folder}"] + ([f"-isystem{cuda}"] if cuda else [])
    return Headers(".".join(found[part] for part in ("MAJOR", "MINOR", "PATCH")), int(found["MAJOR"]), tuple(includes))


def _cuda_include() -> Path | None:
    nvcc = shutil.which("nvcc")
    places = [Path(nvcc).resolve().parents[1] / "include"] if nvcc else []
    places.append(Path("/usr/local/cuda/include"))
    return next((place for place in places if (place / "cuda_runtime_api.h").is_file()), None)
