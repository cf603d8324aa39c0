"""What a GPU executes: the machine code of the main kernels, counted by nvdisasm and held to a table.

python tests/native/machine_code.py             print the table, fail on anything that got worse
python tests/native/machine_code.py --update    write machine_code.json anew, for every architecture

The oldest architecture and the main one are compiled, or those of --architectures: each takes half a minute of a core.

Slots are the instructions that a warp issues on the shortest way round a kernel's main loop that does all of its work:
the way of a whole tile of keys, without the rare branches. Every branch of the loop is looked at, so no condition need
be known: of all ways with the expected products, exponentials, copies, shuffles and lookups of pages, the shortest
counts. So one kernel has several ways: a warp takes half of a tile of 64 keys where a KV head has at most 64 query
rows, and all of it where there are more; keys are contiguous or lie in pages.
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
    shuffles: int = 0
    lookups: int = 0  # loads from the block table

    @property
    def text(self) -> str:
        """What is compiled: the file, or of the passes this instance alone, so that no other changes its code."""
        if self.source != PASSES:
            return f'#include "{self.source}"\n'
        kernel = self.instance.replace(">", ">(const __grid_constant__ ScoreArgs);")
        numbered = re.sub(r", (\d)>", r", static_cast<Pass>(\1)>", kernel)
        return f'#include "score_tiles.cuh"\nnamespace chunkkv {{\ntemplate __global__ void {numbered}\n}}\n'


def _score(query: str, key: str, head_dim: int, which: str, query_rows: int = 64, *, paged: bool = False) -> Main:
    """Return one of the two passes for 64 or 128 query rows of a KV head: a turn is 32 rows, and 32 or 64 keys."""
    item = {"Int8": 1, "Fp8": 1, "float": 4}.get(key, 2)
    pieces = head_dim * item // 16
    rows = 1 if head_dim > 128 else 2
    groups = query_rows // 64
    case = f"{', 128 query rows' if groups > 1 else ''}{', paged' if paged else ''}"
    return Main(
        f"score {which} {query.strip('_')} x {key.strip('_')} D {head_dim}{case}",
        PASSES,
        f"scoreTilesKernel<{query}, {key}, {head_dim}, {('statistics', 'columns').index(which)}>",
        threads=128 * 2 // rows,
        shared=3 * 2 * 32 * 16 * (pieces | 1),
        products=4 * rows * head_dim // 16 * groups,
        exponentials=16 * rows * groups,
        copies=-(-2 * 32 * pieces // (256 // rows)),
        shuffles=(8 * groups if which == "columns" else 0) + (8 if paged else 0),
        lookups=2 if paged else 0,
    )


BFLOAT16 = ("__nv_bfloat16", "__nv_bfloat16", 128)
BYTES = (("__nv_bfloat16", "Fp8", 128), ("__nv_bfloat16", "Int8", 128))
BOTH = ("statistics", "columns")
MAIN = (
    *(_score(*shape, which) for shape in (BFLOAT16, ("__half", "__half", 64), *BYTES) for which in BOTH),
    *(_score(*shape, which, 128) for shape in (BFLOAT16, *BYTES) for which in BOTH),
    *(_score(*BFLOAT16, which, query_rows, paged=True) for query_rows in (64, 128) for which in BOTH),
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
    operands: str = ""

    @property
    def mnemonic(self) -> str:
        return self.name.partition(".")[0]

    def reads(self, register: str) -> bool:
        """Whether an operand behind the first is this register."""
        return re.search(rf"\b{register}\b", self.operands.partition(",")[2]) is not None


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
            code.append(
                Instruction(int(found[1], 16), found[2] is not None, found[3], aim[1] if aim else None, found[4])
            )
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
    firsts |= {place + 1 for place, one in enumerate(code) if one.mnemonic in ("EXIT", "RET") or one.target}
    edges = sorted(first for first in firsts if first < len(code))
    return {
        first: Block(tuple(code[first:behind]), tuple(_successors(code, labels, behind - 1)))
        for first, behind in zip(edges, [*edges[1:], len(code)], strict=True)
    }


def shortest_turn(code: list[Instruction], labels: dict[str, int], wanted: Main) -> list[Instruction] | None:
    """Return the instructions of the shortest way round a loop that does what `wanted` says."""
    of = blocks(code, labels)
    heads = {labels[one.target] for place, one in enumerate(code) if one.target and labels[one.target] <= place}
    turns = [turn for head in sorted(heads) if (turn := _turn_from(head, of, wanted)) is not None]
    return min(turns, key=len, default=None)


def _turn_from(head: int, of: dict[int, Block], wanted: Main) -> list[Instruction] | None:
    """Return the shortest way from a block back to itself that meets exactly the expected instructions."""
    limits = {"HMMA": wanted.products, "MUFU": wanted.exponentials, "LDGSTS": wanted.copies}
    limits |= {"SHFL": wanted.shuffles, "LDG": wanted.lookups}
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
            way: list[tuple[Instruction, ...]] = []
            while before is not None:
                way.append(of[before[0]].code)
                before = came[before]
            return [one for code in reversed(way) for one in code]
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
    # For sm_80 a call to a label of the function itself is a branch that warps take together.
    if one.mnemonic in ("BRA", "CALL") and one.target is not None:
        # A branch of a warp whose threads differ goes out of the way to a collective; none of ours do.
        if ".DIV" in one.name:
            return following
        return [labels[one.target], *(following if one.predicated or ".U" in one.name else [])]
    return following


def slots_before_use(turn: list[Instruction], name: str) -> int:
    """Return the fewest slots of a loop between an instruction `name` and the first one that reads what it gives."""
    twice, fewest = turn * 2, len(turn)
    for place, one in enumerate(turn):
        if one.mnemonic != name:
            continue
        register = re.match(r"\s*(R\d+)", one.operands)
        assert register is not None, one
        uses = (at for at in range(place + 1, place + len(turn)) if twice[at].reads(register[1]))
        fewest = min(fewest, next(uses, len(turn) + place) - place)
    return fewest


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
        of = Counter(one.name for one in turn)
        row["slots"] = len(turn)
        if wanted.lookups:
            row["slots before a lookup is used"] = slots_before_use(turn, "LDG")
        row["narrow loads"] = sum(n for name, n in of.items() if re.match(r"LDG?\.E(?!.*(64|128))", name))
        row["generic loads"] = sum(n for name, n in of.items() if re.match(r"LD\.", name) or name == "LD")
        row["local"] = sum(n for name, n in of.items() if re.match(r"(LDL|STL)", name))
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
    texts = dict.fromkeys(one.text for one in kernels)
    jobs = [(text, architecture, plugins) for architecture in architectures for text in texts]
    with ThreadPoolExecutor(JOBS) as pool:
        compiled = dict(zip(jobs, pool.map(lambda job: _compile(nvcc, nvdisasm, *job), jobs), strict=True))
    table: Table = {}
    for one in kernels:
        for architecture in architectures:
            functions, usages = compiled[one.text, architecture, plugins]
            (name,) = [name for name in functions if one.instance in name]
            row = measure(one, functions[name], usages[name], architecture)
            table.setdefault(one.name, {})[f"sm_{architecture}"] = row
    return table


def _compile(
    nvcc: str, nvdisasm: str, text: str, architecture: str, plugins: Path
) -> tuple[dict[str, str], dict[str, str]]:
    """Return listings and ptxas's words by demangled kernel, from the cache where nothing has changed since."""
    key = hashlib.sha256(repr((nvcc_release(nvcc), nvdisasm, text, architecture)).encode())
    for path in sorted(path for part in ("include", "kernels") for path in (plugins / part).rglob("*.*")):
        key.update(path.read_bytes())
    stem = f"{architecture}-{key.hexdigest()[:16]}"
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


LARGER_IS_BETTER = ("blocks", "evict first", "slots before a lookup is used")


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
