"""What a GPU executes: the machine code of the main kernels, counted by nvdisasm and held to a table.

python tests/native/machine_code.py             print the table, fail on anything that got worse
python tests/native/machine_code.py --update    write machine_code.json anew, for every architecture

The oldest architecture and the main one are compiled, or those of --architectures: each takes half a minute of a core.

Slots are the instructions that a warp issues on the shortest way round a kernel's main loop that does all of its work:
the way of a whole tile of contiguous keys, without the rare branches. Every branch of the loop is looked at, so no
condition need be known: of all ways with the expected number of products and exponentials, the shortest counts.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests")]

from native.compile_check import PLUGINS, find_cuda_tool, find_nvcc, nvcc_release  # noqa: E402

PASSES = "the passes of score"
TABLE = Path(__file__).parent / "machine_code.json"
CACHE = ROOT / "build" / "machine_code"
ARCHITECTURES = ("80", "89", "90a", "100", "120")
COMPARED = ("80", "90a")
JOBS = 2
SHARED_BYTES = {"80": 164, "89": 100, "90a": 228, "100": 228, "120": 100}  # KiB of a multiprocessor
REGISTERS, THREADS = 65_536, {"80": 2048, "89": 1536, "90a": 2048, "100": 2048, "120": 1536}
Table = dict[str, dict[str, dict[str, int]]]


@dataclass(frozen=True)
class Main:
    """A kernel of the table: the file it is in, its demangled name, and what its main loop does in one turn."""

    name: str
    source: str
    instance: str
    threads: int
    shared: int = 0  # dynamic, in bytes
    products: int = 0  # tensor core instructions of a warp in one turn
    exponentials: int = 0
    copies: int = 0  # cp.async instructions


def _score(query: str, key: str, head_dim: int, which: str) -> Main:
    """Return one of the two passes, in the shape for 64 query rows of a KV head: a turn is 32 rows and 32 keys."""
    item = {"Int8": 1, "Fp8": 1, "float": 4}.get(key, 2)
    pieces = head_dim * item // 16
    rows = 1 if head_dim > 128 else 2
    return Main(
        f"score {which} {query.strip('_')} x {key.strip('_')} D {head_dim}",
        PASSES,
        f"scoreTilesKernel<{query}, {key}, {head_dim}, {('statistics', 'columns').index(which)}>",
        threads=128 * 2 // rows,
        shared=3 * 2 * 32 * 16 * (pieces | 1),
        products=4 * rows * head_dim // 16,
        exponentials=16 * rows,
        copies=-(-2 * 32 * pieces // (256 // rows)),
    )


MAIN = (
    *(
        _score(query, key, head_dim, which)
        for query, key, head_dim in (
            ("__nv_bfloat16", "__nv_bfloat16", 128),
            ("__half", "__half", 64),
            ("__nv_bfloat16", "Fp8", 128),
            ("__nv_bfloat16", "Int8", 128),
        )
        for which in ("statistics", "columns")
    ),
    Main("compact in place", "compact.cu", "compactKernel<uint4, true>", threads=256),
    Main("select", "select.cu", "selectKernel", threads=1024),
    Main("finish", "score.cu", "finishKernel", threads=256),
)


def find_nvdisasm() -> str | None:
    """Return the path of nvdisasm, or None."""
    return find_cuda_tool("nvdisasm")


@dataclass(frozen=True)
class Instruction:
    """One line of machine code; `target` is where a branch goes."""

    address: int
    predicated: bool
    name: str
    target: str | None

    @property
    def mnemonic(self) -> str:
        return self.name.partition(".")[0]


_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_LABEL = re.compile(r"^(\.L_x_\w+):")


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Return the instructions of one function, and the place in them of every label."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := _LINE.search(line):
            aim = re.search(r"`\((\.L_x_\w+)\)", found[4])
            code.append(Instruction(int(found[1], 16), found[2] is not None, found[3], aim[1] if aim else None))
    return code, labels


State = tuple[int, ...]  # how many of each limited instruction a way has met


@dataclass(frozen=True)
class Block:
    """Instructions without a branch into or out of their middle; `after` are the blocks that may follow."""

    code: tuple[Instruction, ...]
    after: tuple[int, ...]

    def counts(self, names: Iterable[str]) -> State:
        return tuple(sum(one.mnemonic == name for one in self.code) for name in names)


def blocks(code: list[Instruction], labels: dict[str, int]) -> dict[int, Block]:
    """Return the basic blocks by the place of their first instruction."""
    firsts = {0, *labels.values()}
    firsts |= {place + 1 for place, one in enumerate(code) if one.mnemonic in ("BRA", "EXIT", "RET")}
    edges = sorted(first for first in firsts if first < len(code))
    return {
        first: Block(tuple(code[first:behind]), tuple(_successors(code, labels, behind - 1)))
        for first, behind in zip(edges, [*edges[1:], len(code)], strict=True)
    }


def shortest_turn(code: list[Instruction], labels: dict[str, int], wanted: Main) -> Counter[str] | None:
    """Return the instructions of the shortest way round a loop that does what `wanted` says, by their names."""
    of = blocks(code, labels)
    heads = {labels[one.target] for place, one in enumerate(code) if one.target and labels[one.target] <= place}
    turns = [turn for head in sorted(heads) if (turn := _turn_from(head, of, wanted)) is not None]
    return min(turns, key=lambda turn: sum(turn.values()), default=None)


def _turn_from(head: int, of: dict[int, Block], wanted: Main) -> Counter[str] | None:
    """Return the shortest way from a block back to itself that meets exactly the expected instructions."""
    limits = {"HMMA": wanted.products, "MUFU": wanted.exponentials, "LDGSTS": wanted.copies}
    goal, counts = tuple(limits.values()), {first: block.counts(limits) for first, block in of.items()}
    came: dict[tuple[int, State], tuple[int, State] | None] = {}
    start = (head, (0,) * len(goal))
    queue: list[tuple[int, tuple[int, State], tuple[int, State] | None]] = [(0, start, None)]
    while queue:
        length, node, before = heapq.heappop(queue)
        first, met = node
        if first == head and before is not None:
            if met != goal:
                continue
            names: Counter[str] = Counter()
            while before is not None:
                names.update(one.name for one in of[before[0]].code)
                before = came[before]
            return names
        if node in came:
            continue
        came[node] = before
        total = tuple(a + b for a, b in zip(met, counts[first], strict=True))
        if all(a <= b for a, b in zip(total, goal, strict=True)):
            for after in of[first].after:
                heapq.heappush(queue, (length + len(of[first].code), (after, total), node))
    return None


def _successors(code: list[Instruction], labels: dict[str, int], place: int) -> list[int]:
    one, following = code[place], [place + 1] if place + 1 < len(code) else []
    if one.mnemonic in ("EXIT", "RET"):
        return following if one.predicated else []
    if one.mnemonic == "BRA" and one.target is not None:
        # A branch of a warp whose threads differ goes out of the way to a collective; none of ours do.
        if ".DIV" in one.name:
            return following
        return [labels[one.target], *(following if one.predicated or ".U" in one.name else [])]
    return following


def measure(wanted: Main, function: str, usage: str, architecture: str) -> dict[str, int]:
    """Return the row of the table for a kernel: from its listing, and from what ptxas says of it."""
    code, labels = parse(function)
    registers = int(re.search(r"Used (\d+) registers", usage)[1])
    static = re.search(r"(\d+) bytes smem", usage)
    shared = wanted.shared + (int(static[1]) if static else 0)
    of_registers = REGISTERS // (-(-registers // 8) * 8 * wanted.threads)
    row = {
        "registers": registers,
        "spills": sum(int(n) for n in re.findall(r"(\d+) bytes spill", usage)),
        "shared": shared,
        "blocks": min(
            of_registers,
            THREADS[architecture] // wanted.threads,
            SHARED_BYTES[architecture] * 1024 // (shared + 1024),
        ),
    }
    if wanted.products:
        turn = shortest_turn(code, labels, wanted)
        if turn is None:
            raise RuntimeError(f"{wanted.name}, sm_{architecture}: no way round the main loop does the expected work")
        of = Counter({name: count for name, count in turn.items()})
        row["slots"] = sum(turn.values())
        row["narrow loads"] = sum(n for name, n in of.items() if re.match(r"LDG?\.E(?!.*(64|128))", name))
        row["generic loads"] = sum(n for name, n in of.items() if re.match(r"LD\.", name) or name == "LD")
        row["local"] = sum(n for name, n in of.items() if re.match(r"(LDL|STL)", name))
        row["shuffles"] = sum(n for name, n in of.items() if name.startswith("SHFL"))
        if int(architecture.rstrip("a")) >= 90:  # where the policy of a copy is put together in plain sight
            row["evict first"] = int(re.search(r"UMOV UR\d+, 0xf0 ;", function) is not None)
    return row


def measure_all(
    nvcc: str,
    nvdisasm: str,
    kernels: Sequence[Main] = MAIN,
    architectures: Sequence[str] = ARCHITECTURES,
    plugins: Path = PLUGINS,
) -> Table:
    """Return the rows of these kernels, whose sources lie in `plugins`; raises RuntimeError where nvcc refuses."""
    sources = dict.fromkeys(one.source for one in kernels)
    jobs = [(source, architecture, plugins) for architecture in architectures for source in sources]
    with ThreadPoolExecutor(JOBS) as pool:
        compiled = dict(zip(jobs, pool.map(lambda job: _compile(nvcc, nvdisasm, *job), jobs), strict=True))
    table: Table = {}
    for one in kernels:
        for architecture in architectures:
            functions, usages = compiled[one.source, architecture, plugins]
            (name,) = [name for name in functions if one.instance in name]
            row = measure(one, functions[name], usages[name], architecture)
            table.setdefault(one.name, {})[f"sm_{architecture}"] = row
    return table


def _compile(
    nvcc: str, nvdisasm: str, source: str, architecture: str, plugins: Path
) -> tuple[dict[str, str], dict[str, str]]:
    """Return listings and ptxas's words by demangled kernel, from the cache where nothing has changed since."""
    text = _passes_source() if source == PASSES else f'#include "{source}"\n'
    key = hashlib.sha256(repr((nvcc_release(nvcc), nvdisasm, text, architecture)).encode())
    for path in sorted(path for part in ("include", "kernels") for path in (plugins / part).rglob("*.*")):
        key.update(path.read_bytes())
    stem = f"{Path(source).stem}-{architecture}-{key.hexdigest()[:16]}"
    listing, log = CACHE / f"{stem}.sass", CACHE / f"{stem}.log"
    if not listing.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        file, cubin = CACHE / f"{stem}.cu", CACHE / f"{stem}.{os.getpid()}.cubin"
        file.write_text(text, encoding="utf-8")
        flags = ["-std=c++17", "-O3", "-cubin", "-Xptxas", "-v"]
        flags += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
        flags += [f"-I{plugins / part}" for part in ("include", "kernels")]
        done = subprocess.run([nvcc, *flags, str(file), "-o", str(cubin)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-4000:])
        shown = subprocess.run([nvdisasm, str(cubin)], capture_output=True, text=True, check=True)
        cubin.unlink()
        log.write_text(done.stderr, encoding="utf-8")
        partial = CACHE / f"{stem}.{os.getpid()}.partial"
        partial.write_text(shown.stdout, encoding="utf-8")
        partial.replace(listing)
    functions = re.split(r"^\.text\.(\w+):$", listing.read_text(encoding="utf-8"), flags=re.MULTILINE)
    usages = re.split(r"Compiling entry function '(\w+)'", log.read_text(encoding="utf-8"))
    return _demangled(functions[1::2], functions[2::2]), _demangled(usages[1::2], usages[2::2])


def _demangled(names: list[str], texts: list[str]) -> dict[str, str]:
    plain = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    short = [re.sub(r"\(chunkkv::Pass\)|chunkkv::|\(anonymous namespace\)::", "", name) for name in plain]
    return dict(zip(short, texts, strict=True))


def _passes_source() -> str:
    """Return a file that instantiates the passes of the table and nothing else."""
    kernels = [
        f"template __global__ void {one.instance.replace('>', '>(const __grid_constant__ ScoreArgs);')}"
        for one in MAIN
        if one.source == PASSES
    ]
    numbers = [re.sub(r", (\d)>", r", static_cast<Pass>(\1)>", kernel) for kernel in kernels]
    return "\n".join(['#include "score_tiles.cuh"', "namespace chunkkv {", *numbers, "}", ""])


LARGER_IS_BETTER = ("blocks", "evict first")


def complaints(table: Table, known: dict[str, Any], release: str) -> list[str]:
    """Return what is worse than the committed table; another release of nvcc may make other code, but no spill."""
    found = [
        f"{name}: {'not in the table' if name in table else 'no longer measured'}"
        for name in table.keys() ^ known["kernels"].keys()
    ]
    for name in sorted(table.keys() & known["kernels"].keys()):
        for architecture, row in table[name].items():
            then = known["kernels"][name].get(architecture, {})
            for quantity, value in row.items():
                before = then.get(quantity, 0)
                worse = value < before if quantity in LARGER_IS_BETTER else value > before
                if worse and (release == known["nvcc"] or quantity in ("spills", "local")):
                    found.append(f"{name} on {architecture}: {value} {quantity}, the table says {before}")
    return found


def shown(table: Table) -> str:
    """Return the table as text."""
    lines = []
    for name, places in table.items():
        for architecture, row in places.items():
            lines.append(f"{name:<44} {architecture:<7} " + "  ".join(f"{value} {key}" for key, value in row.items()))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the table and compare it with the committed one, or write that; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write machine_code.json anew")
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=COMPARED, metavar="NUMBER")
    options = parser.parse_args(arguments)
    nvcc, nvdisasm = find_nvcc(), find_nvdisasm()
    if nvcc is None or nvdisasm is None:
        print("nvcc or nvdisasm was not found; make sass gets both from pip", file=sys.stderr)
        return 1
    chosen = ARCHITECTURES if options.update else options.architectures
    table, release = measure_all(nvcc, nvdisasm, architectures=chosen), nvcc_release(nvcc)
    print(shown(table))
    if options.update:
        rows = [f"  {json.dumps(name)}: {json.dumps(places)}" for name, places in table.items()]
        text = ",\n".join(rows)
        TABLE.write_text(f'{{"nvcc": "{release}", "kernels": {{\n{text}\n}}}}\n', encoding="utf-8")
        return 0
    found = complaints(table, json.loads(TABLE.read_text(encoding="utf-8")), release)
    print("\n".join(found), file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
