"""Compiles every kernel with nvcc for every supported GPU, and holds registers, shared memory and spills to a table.

python tests/native/compile_check.py            print the table, fail on anything that got worse
python tests/native/compile_check.py --update   write registers.json anew

With --architectures or --sources it compiles and compares a part: everything takes ten minutes of a core.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PLUGINS, CACHE = ROOT / "plugins", ROOT / "build" / "compile_check"
TABLE = Path(__file__).parent / "registers.json"
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
JOBS = 2
FLAGS = ["-std=c++17", "-O3", "-fatbin", "-Xptxas", "-v", "-Werror", "all-warnings"]

Usage = dict[str, dict[str, dict[str, int]]]  # kernel, architecture, quantity
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def find_cuda_tool(name: str) -> str | None:
    """Return the path of one of CUDA's programs: on PATH, or of its package from pip in this environment; or None."""
    for folder in (None, *(str(Path(entry, "nvidia", "cu13", "bin")) for entry in sys.path if entry)):
        if found := shutil.which(name, path=folder):
            return found
    return None


def find_nvcc() -> str | None:
    """Return the path of nvcc, or None."""
    return find_cuda_tool("nvcc")


@functools.cache
def nvcc_release(nvcc: str) -> str:
    """Return the release of nvcc, such as 13.0: register counts are comparable within one."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", text)
    return found[1] if found else "unknown"


def sources() -> list[Path]:
    """Return the kernel files, the largest first: it should not be the last one to start."""
    return sorted((PLUGINS / "kernels").glob("*.cu"), key=lambda path: -path.stat().st_size)


def compile_all(nvcc: str, files: Sequence[Path], architectures: Sequence[str]) -> Usage:
    """Return what every kernel of the files uses on every architecture; raises RuntimeError where nvcc refuses."""
    jobs = [(source, architecture) for source in files for architecture in architectures]
    with ThreadPoolExecutor(JOBS) as pool:
        logs = list(pool.map(lambda job: _log_of(nvcc, *job), jobs))
    return usage_of("\n".join(logs))


def usage_of(log: str) -> Usage:
    """Return what the kernels use of which a build's output speaks, where ptxas was told -v."""
    return _short_names(_parse(log))


def _log_of(nvcc: str, source: Path, architecture: str) -> str:
    """Return what ptxas says, from the cache where nothing has changed since."""
    key = hashlib.sha256(repr((nvcc_release(nvcc), FLAGS, source.name, architecture)).encode())
    for path in sorted(path for part in ("include", "kernels") for path in (PLUGINS / part).rglob("*.*h")):
        key.update(path.read_bytes())
    key.update(source.read_bytes())
    log = CACHE / f"{source.stem}-{architecture}-{key.hexdigest()[:16]}.log"
    if log.exists():
        return log.read_text(encoding="utf-8")
    CACHE.mkdir(parents=True, exist_ok=True)
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    includes = [f"-I{PLUGINS / 'include'}", f"-I{PLUGINS / 'kernels'}"]
    command = [nvcc, *FLAGS, target, *includes, str(source), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    partial = log.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(done.stderr, encoding="utf-8")
    partial.replace(log)
    return done.stderr


def _parse(log: str) -> Usage:
    usage: Usage = {}
    entry: dict[str, int] = {}
    for line in log.splitlines():
        if found := _ENTRY.search(line):
            entry = usage.setdefault(found[1], {}).setdefault(f"sm_{found[2]}", {})
        elif found := _SPILLS.search(line):
            entry["stack"], entry["spills"] = int(found[1]), int(found[2]) + int(found[3])
        elif found := _USED.search(line):
            shared = _SHARED.search(line)
            entry["registers"], entry["shared"] = int(found[1]), int(shared[1]) if shared else 0
    return usage


def _short_names(usage: Usage) -> Usage:
    """Demangle, and drop what all kernels have in common."""
    filtered = subprocess.run(["c++filt", *usage], capture_output=True, text=True, check=True).stdout.splitlines()
    plain = [re.sub(r"chunkkv::|\(anonymous namespace\)::|^void ", "", name) for name in filtered]
    names = [re.sub(r"\([^()]*\)$", "", name) for name in plain]
    assert len(set(names)) == len(usage), "two kernels share a short name"
    return {name: usage[mangled] for name, mangled in sorted(zip(names, usage, strict=True))}


MOST_REGISTERS = {"boundariesKernel": 64}  # 1024 threads share 65536; a launch bound would make it spill


def complaints(usage: Usage, table: dict[str, Any], release: str, *, complete: bool = True) -> list[str]:
    """Return what is worse than the table says, or not in it; the table must be true for its own nvcc release.

    Unless `complete`, only some kernels were compiled.
    """
    found = [f"{name}: not in the table" for name in usage if name not in table["kernels"]]
    gone = [name for name in table["kernels"] if name not in usage] if complete else []
    found += [f"{name}: in the table, but no longer compiled" for name in gone]
    for name in sorted(set(usage) & set(table["kernels"])):
        for architecture, now in usage[name].items():
            then = table["kernels"][name].get(architecture, {})
            for quantity, value in now.items():
                known = then.get(quantity, 0)
                if quantity == "registers" and value > MOST_REGISTERS.get(name, 255):
                    found.append(f"{name} on {architecture}: {value} registers, its block leaves room for fewer")
                worse = quantity in ("spills", "stack") and value > known
                if worse or (release == table["nvcc"] and value != known):
                    found.append(f"{name} on {architecture}: {value} {quantity}, the table says {known}")
    return found


def as_table(usage: Usage, release: str) -> str:
    """Return registers.json: one line per kernel, so that a change shows as one line."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(places)}" for name, places in usage.items())
    return f'{{"nvcc": {json.dumps(release)}, "kernels": {{\n{lines}\n}}}}\n'


def show(usage: Usage) -> None:
    """Print one line per kernel: registers, static shared memory and spilled bytes on every architecture."""
    columns = list(dict.fromkeys(place for places in usage.values() for place in places))
    print(f"{'kernel':58}" + "".join(f"{column:>16}" for column in columns))
    for name, places in usage.items():
        cells = [places.get(column, {}) for column in columns]
        numbers = [f"{cell['registers']}r {cell['shared']}B {cell['spills']}s" if cell else "-" for cell in cells]
        print(f"{name[:57]:58}" + "".join(f"{number:>16}" for number in numbers))


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [path.stem for path in sources()]
    parser.add_argument("--update", action="store_true", help="write registers.json instead of comparing with it")
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES, metavar="NUMBER")
    parser.add_argument("--sources", nargs="+", choices=names, default=names, metavar="NAME")
    options = parser.parse_args(arguments)
    complete = set(options.sources) == set(names)
    if options.update and not (complete and set(options.architectures) == set(ARCHITECTURES)):
        parser.error("--update writes the whole table: leave --architectures and --sources out")
    nvcc = find_nvcc()
    if nvcc is None:
        print("nvcc was not found; install the CUDA toolkit or put it on PATH", file=sys.stderr)
        return 2
    started = time.monotonic()
    files = [path for path in sources() if path.stem in options.sources]
    usage, release = compile_all(nvcc, files, options.architectures), nvcc_release(nvcc)
    show(usage)
    sizes = f"{len(usage)} kernels, {len(options.architectures)} architectures"
    print(f"{sizes}, {time.monotonic() - started:.0f} s, nvcc {release}")
    if options.update:
        partial = TABLE.with_suffix(".partial")
        partial.write_text(as_table(usage, release), encoding="utf-8")
        partial.replace(TABLE)
        return 0
    found = complaints(usage, json.loads(TABLE.read_text(encoding="utf-8")), release, complete=complete)
    print("\n".join(found), file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
