"""Which GPUs a plugin library has kernels for, as the file that the build puts beside libchunkkv says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

ARCHITECTURES_FILE = "libchunkkv.architectures"  # what CMAKE_CUDA_ARCHITECTURES was, as in "80-real;90a-real;120"
NO_KERNELS_ADVICE = "run make plugins, or with ARCHITECTURES for these GPUs, in the sources"
_ARCHITECTURE = re.compile(r"(\d+)(\d)([af]?)(-real|-virtual)?")


def architectures(library: Path) -> tuple[str, ...]:
    """Return the CUDA architectures of the libchunkkv beside a plugin library; empty where no file tells them."""
    try:
        names = (library.parent / ARCHITECTURES_FILE).read_text(encoding="utf-8").strip().split(";")
    except (OSError, UnicodeDecodeError):
        return ()
    # Words such as "native" and "all" name no architecture, so nothing is known then.
    return tuple(names) if all(_ARCHITECTURE.fullmatch(name) for name in names) else ()


def uncovered(library: Path, compute_capabilities: Sequence[str]) -> list[str]:
    """Return those of `compute_capabilities`, as in "8.9", whose GPUs cannot run the kernels beside `library`.

    None are returned where nothing is known of the library.
    """
    names = architectures(library)
    return [each for each in compute_capabilities if names and not any(_covers(name, each) for name in names)]


def no_kernels(library: Path, compute_capabilities: Sequence[str]) -> str:
    """Return a sentence on the GPUs whose kernels a plugin library lacks; empty where it lacks none."""
    if not (lacking := uncovered(library, compute_capabilities)):
        return ""
    names = ", ".join(architectures(library))
    return f"{library} was built for {names}, not for GPUs of compute capability {', '.join(lacking)}"


def described(library: Path) -> str:
    """Return the path of a plugin library with the architectures that it is for, for people."""
    return f"{library} (for {', '.join(architectures(library)) or 'GPUs that no file beside it names'})"


def _covers(architecture: str, compute_capability: str) -> bool:
    """Return whether code for an architecture runs on a GPU, by the rules of CUDA."""
    match = _ARCHITECTURE.fullmatch(architecture)
    assert match is not None  # `architectures` saw to that
    built = int(match[1]), int(match[2])
    major, minor = map(int, compute_capability.split("."))
    if match[3] == "a":  # for this GPU alone
        return built == (major, minor)
    if match[4] != "-virtual" and built[0] == major and built[1] <= minor:  # machine code, within one major version
        return True
    return match[4] != "-real" and match[3] == "" and built <= (major, minor)  # PTX, compiled on the GPU that runs it
