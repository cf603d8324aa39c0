"""Builds the emulated libchunkkv: the kernels of plugins/, compiled by g++ against the emulator, behind the same C ABI.

Objects and libraries are cached in build/native by the content of everything that goes into them, so a second call
costs nothing and a change is never missed. A mutation is a text that must occur once in a file, and what replaces it.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "native"
JOBS = 2
SOURCES = (".cu", ".cuh", ".cc", ".h")

COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off"]
COMMON += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
FLAVOURS = {
    "plain": ["-O2"],
    "quick": ["-O1"],  # for what is compiled often and runs briefly
    "asan": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-O1", "-g1", "-fsanitize=thread"],
}
# The scheduler tells ThreadSanitizer about its fibers by hand and must not be instrumented itself.
UNINSTRUMENTED = {"tsan": ["-O1", "-g1", "-fno-tree-loop-distribute-patterns", "-DEMULATOR_TSAN"]}


class Mutation(NamedTuple):
    """A planted bug: `old` occurs exactly once in `file`, a path below plugins/."""

    file: str
    old: str
    new: str


class BuildError(Exception):
    """A compiler failed, or a mutation does not match the source."""


@functools.cache
def compiler() -> str:
    """Return the C++ compiler's path; raises BuildError where there is none."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        raise BuildError("g++ was not found; install it, or set CXX to a C++17 compiler")
    return found


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([compiler(), "--version"], check=True, capture_output=True, text=True).stdout


def runtime(name: str) -> str:
    """Return the path of one of the compiler's own libraries, such as libasan.so."""
    return subprocess.run(
        [compiler(), f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()


@functools.cache
def nvtx_include() -> Path | None:
    """Return the folder of the CUDA toolkit's headers if nvtx3 is among them, or None."""
    if (nvcc := shutil.which("nvcc")) is None:
        return None
    told = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=False)
    found = re.search(r"^#\$ INCLUDES=\"-I(.+?)\"", told.stderr, re.MULTILINE)
    folder = Path(found[1]).resolve() if found else None
    return folder if folder and (folder / "nvtx3" / "nvtx3.hpp").is_file() else None


def nvtx_flags() -> list[str]:
    """Return what lets a source see nvtx3, behind every other folder, so that the emulator's headers stay first."""
    return ["-idirafter", str(nvtx_include())] if nvtx_include() else []


def nvtx_recorder() -> Path:
    """Return the NVTX injection library of nvtx_recorder.cc; raises BuildError without nvtx3 headers."""
    if nvtx_include() is None:
        raise BuildError("no nvtx3 headers were found; install the CUDA toolkit, with nvcc on PATH")
    source = Path(__file__).with_name("nvtx_recorder.cc")
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-fvisibility=hidden"]
    key = repr((_compiler_version(), flags, source.read_bytes()))
    target = BUILD / "nvtx" / hashlib.sha256(key.encode()).hexdigest()[:20] / "libnvtx_recorder.so"
    return _make(target, [compiler(), *flags, *nvtx_flags(), str(source), "-lpthread"])


@functools.cache
def emulated_library(flavour: str = "plain", mutations: tuple[Mutation, ...] = ()) -> Path:
    """Return the library of a flavour of FLAVOURS, built unless it exists; raises BuildError where it cannot be."""
    return _link(flavour, list(_objects(flavour, source_tree(mutations)).values()))


@functools.cache
def mutant_library(flavour: str, base: tuple[Mutation, ...], bug: Mutation, units: tuple[str, ...]) -> Path:
    """Return the library of the `base` mutations in which the sources named in `units` are compiled with the bug too.

    A bug in a header is in every source, but a check that runs one op need not wait for the others. The units are
    linked first, so that a function of the header that was not inlined is theirs.
    """
    of_base, of_bug = _objects(flavour, source_tree(base)), _objects(flavour, source_tree((*base, bug)), units)
    if list(of_bug.values()) == [of_base[name] for name in of_bug]:
        raise BuildError(f"the bug changes none of {', '.join(units)}: {bug.old!r}")
    return _link(flavour, list((of_bug | {name: of_base[name] for name in of_base.keys() - of_bug.keys()}).values()))


@functools.cache
def _objects(flavour: str, tree: Path, units: tuple[str, ...] = ()) -> dict[str, Path]:
    """Return the objects of the sources named in `units`, or of all, by the names of the sources."""
    emulator = tree / "plugins" / "emulator" / "simt.cc"
    sources = [*sorted((tree / "plugins" / "kernels").glob("*.cu")), tree / "plugins" / "api.cc", emulator]
    if unknown := set(units) - {source.stem for source in sources}:
        raise BuildError(f"no source is called {', '.join(unknown)}")
    flags = [*COMMON, *FLAVOURS[flavour]]
    scheduler = [*COMMON, *UNINSTRUMENTED.get(flavour, FLAVOURS[flavour])]
    more = {"api": [*flags, *nvtx_flags()], emulator.stem: scheduler}
    chosen = [source for source in sources if not units or source.stem in units]
    with ThreadPoolExecutor(JOBS) as pool:
        made = pool.map(lambda source: _compile(source, more.get(source.stem, flags), tree), chosen)
        return dict(zip([source.stem for source in chosen], made, strict=True))


def probe_library(source: Path, flags: tuple[str, ...] = ()) -> Path:
    """Return a library of one file of kernels and the emulator: for tests of the emulator itself."""
    every = [*COMMON, *FLAVOURS["plain"], *flags]
    objects = [_compile(path, every, ROOT) for path in (source, ROOT / "plugins" / "emulator" / "simt.cc")]
    target = BUILD / "probe" / ("-".join(path.stem for path in objects) + ".so")
    return _make(target, [compiler(), "-shared", *map(str, objects), "-lpthread"])


@functools.cache
def source_tree(mutations: tuple[Mutation, ...]) -> Path:
    """Return the folder that holds plugins/: the checkout, or a copy with the planted bugs."""
    if not mutations:
        return ROOT
    key = hashlib.sha256(repr(mutations).encode())
    for path in sorted(path for path in (ROOT / "plugins").rglob("*.*") if path.suffix in SOURCES):
        key.update(str(path).encode() + path.read_bytes())
    tree = BUILD / "mutants" / key.hexdigest()[:16]
    with _locked(tree):
        if tree.exists():  # another process may be compiling from it
            return tree
        partial = tree.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(ROOT / "plugins", partial / "plugins", ignore=shutil.ignore_patterns("__pycache__"))
        for mutation in mutations:
            path = partial / "plugins" / mutation.file
            text = path.read_text(encoding="utf-8")
            if text.count(mutation.old) != 1:
                raise BuildError(f"{mutation.file} holds {text.count(mutation.old)} times, not once: {mutation.old!r}")
            path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        partial.rename(tree)
    return tree


def _compile(source: Path, flags: list[str], tree: Path) -> Path:
    """Return the object of a source, cached by its preprocessed text: a bug in one header leaves most objects alone."""
    folders = (tree / "plugins", *(tree / "plugins" / name for name in ("include", "kernels", "emulator")))
    own = [*flags, f"-ffile-prefix-map={tree}=.", *(f"-I{folder}" for folder in folders), "-x", "c++"]
    expand = [compiler(), *own, "-E", "-P", str(source)]
    done = subprocess.run(expand, capture_output=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(expand)}\n{done.stderr.decode()[-6000:]}")
    key = repr((_compiler_version(), flags, done.stdout))
    target = BUILD / "objects" / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.o"
    return _make(target, [compiler(), *own, "-c", str(source)])


def _link(flavour: str, objects: list[Path]) -> Path:
    exports = ROOT / "plugins" / "exports.map"
    key = repr((flavour, [path.name for path in objects], exports.read_bytes()))
    target = BUILD / flavour / hashlib.sha256(key.encode()).hexdigest()[:20] / "libchunkkv_emulated.so"
    flags = ["-shared", *FLAVOURS[flavour], f"-Wl,--version-script={exports}"]
    return _make(target, [compiler(), *flags, *map(str, objects), "-lpthread", "-ldl"])


def _make(target: Path, command: list[str]) -> Path:
    """Run the command, which is to write `target`, unless another process or call has."""
    with _locked(target):
        if not target.exists():
            partial = target.with_suffix(".partial")
            done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise BuildError(f"{' '.join(command)}\n{done.stderr[-6000:]}")
            partial.replace(target)
    return target


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{target.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
