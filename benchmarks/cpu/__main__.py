"""Measures this project and its peers on a CPU: the same model, the same token ids, one process for each measurement.

    python -m benchmarks.cpu                 # every cell; many hours, and a run that was cut off goes on
    python -m benchmarks.cpu --quick         # four cells: about 20 minutes on a quiet machine
    python -m benchmarks.cpu --minutes 12    # starts no measurement after 12 minutes
    python -m benchmarks.cpu --page_only     # docs/cpu.md, its pictures and README's table from the JSON files

Within a round the variants of a cell run one after the other, so that ratios are of neighbours. Before each measurement
it waits until the machine is quiet; how busy it was meanwhile stands beside each number. An engine that is not
installed is named, and the others are measured without it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.cpu import page, variants
from benchmarks.cpu.contract import Case
from benchmarks.cpu.machine import ROOT, describe, wait_until_quiet
from benchmarks.cpu.results import all_measurements, compact, file_of
from benchmarks.cpu.variants import Cell, Variant
from chunkkv.evaluation.records import append_record
from chunkkv.evaluation.texts.real_texts import real_text
from chunkkv.files import write_whole
from chunkkv.text.tokenizer import Tokenizer
from chunkkv_builder.checkpoint.gguf import GgufCheckpoint
from examples.demo.fetch import fetch

STEPS = 48
APART = 1500  # characters between the beginnings of two prompts
WORK = ROOT / "build" / "bench-cpu"
CONSOLE = Console(stderr=True, highlight=False)


def prompts(tokenizer: Tokenizer, length: int, rows: int) -> tuple[tuple[int, ...], ...]:
    """Return `rows` prompts of `length` tokens of a novel, each from another place of it."""
    text = real_text("novel").text
    return tuple(tuple(tokenizer.encode(text[row * APART :])[:length]) for row in range(rows))


def run_worker(engine: str, action: str, case: Path | None = None, threads: int = 1) -> Any:
    """Run benchmarks.cpu.worker in the environment of an engine; return its JSON, or raise OSError with its reason."""
    python = ROOT / variants.ENVIRONMENTS[engine] / "bin" / "python"
    if not python.exists():
        raise OSError(f"there is no {variants.ENVIRONMENTS[engine]}")
    paths = [str(ROOT), str(ROOT / "python"), str(ROOT / "builder"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    words = [str(python), "-m", "benchmarks.cpu.worker", action, engine, *([str(case)] if case else [])]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    if done.returncode:
        raise OSError((done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1])
    if action == "prepare":  # prints nothing of its own, but libraries may
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


class Bench:
    """One run of the benchmark.

    Parameters
    ----------
    work : Path
        Folder for models and outcomes.
    wait_s : float
        Longest wait for a quiet machine before each measurement.
    engines : sequence of str
        The engines that are measured.
    """

    def __init__(self, work: Path, wait_s: float, engines: Sequence[str]) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self._work, self._wait_s, self._path = work, wait_s, work / "measurements.jsonl"
        self._model = fetch()
        checkpoint = GgufCheckpoint.open(self._model)  # its folder goes with it
        assert checkpoint.tokenizer_dir is not None, "the model's file has its tokenizer"
        self._tokenizer = Tokenizer.from_dir(checkpoint.tokenizer_dir)
        self._machine = describe()
        self._names, self.versions, self.missing = engines, dict[str, str](), dict[str, str]()

    def prepare(self) -> None:
        """Ask every engine for its version and let it write its models; those that cannot are missing."""
        for engine in self._names:
            title = variants.TITLES[engine]
            try:
                self.versions[engine] = run_worker(engine, "version")
                for weights in dict.fromkeys(one.weights for one in variants.VARIANTS if one.engine == engine):
                    CONSOLE.print(f"{title} {weights}: preparing the model …")
                    variant = next(one for one in variants.VARIANTS if (one.engine, one.weights) == (engine, weights))
                    self._run(variant, "prepare", Cell(1, 1, 1))
            except OSError as problem:
                self.versions.pop(engine, None)
                self.missing[engine] = str(problem)
                CONSOLE.print(f"{title} is left out: {problem}")

    def run(self, cells: Sequence[Cell], rounds: int, until: float) -> None:
        """Measure what is missing, and stop when the clock says `until`."""
        for number in range(rounds):
            for cell in cells:
                order = [one for one in variants.VARIANTS if one.engine in self.versions]
                for variant in order if number % 2 == 0 else reversed(order):
                    if time.monotonic() > until:
                        return
                    head = {"variant": variant.key, **vars(cell), "round": number}
                    if not self._is_known(head, variant):
                        self._measure(head, variant, cell)

    def _measure(self, head: dict[str, Any], variant: Variant, cell: Cell) -> None:
        is_quiet = wait_until_quiet(self._wait_s)
        version = self.versions[variant.engine]
        try:
            found = self._run(variant, "measure", cell)
        except OSError as problem:
            CONSOLE.print(f"{cell.title}: {variant.title} failed: {problem}")
            return
        append_record(self._path, {**head, "version": version, "processor": self._machine["processor"], **found})
        note = "" if is_quiet else f" (other work took {found['other_cores']} cores)"
        CONSOLE.print(
            f"{cell.title}: {variant.title}: first token {found['first_token_s']:.2f} s, {found['step_ms']:.1f} ms "
            f"per step, {found['peak_mb']:.0f} MB{note}"
        )

    def _run(self, variant: Variant, action: str, cell: Cell) -> Any:
        ids = prompts(self._tokenizer, cell.tokens, cell.rows)
        case = Case(self._work, self._model, variant.weights, variant.keep, cell.threads, STEPS, ids)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "case.json"
            path.write_text(json.dumps(case.to_json()), "utf-8")
            return run_worker(variant.engine, action, path, cell.threads)

    def _is_known(self, head: dict[str, Any], variant: Variant) -> bool:
        wanted = {**head, "version": self.versions[variant.engine]}
        return any(all(record[key] == value for key, value in wanted.items()) for record in self.records())

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield what was measured with the present versions, on a processor like this one."""
        if self._path.is_file():
            for record in map(json.loads, self._path.read_text("utf-8").splitlines()):
                is_present = self.versions.get(record["variant"].split("|")[0]) == record["version"]
                if is_present and record.get("processor") == self._machine["processor"]:
                    yield record

    def result(self) -> dict[str, Any]:
        """Return the JSON file's content."""
        same = "version", "processor"  # the file's head says them once
        rows = [{key: value for key, value in record.items() if key not in same} for record in self.records()]
        return {
            "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
            "machine": self._machine,
            "model": self._model.name,
            "steps": STEPS,
            "versions": self.versions,
            "missing": self.missing,
            "measurements": sorted(rows, key=lambda row: (row["tokens"], row["threads"], row["rows"], row["round"])),
        }


def _numbers(text: str) -> list[int]:
    return [int(value) for value in text.split(",")]


def main() -> None:
    """Measure, and write this processor's JSON file and the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four cells instead of all")
    for name in ("tokens", "threads", "rows"):
        parser.add_argument(f"--{name}", type=_numbers, metavar="N,N", help=f"only cells with these {name}")
    parser.add_argument("--engines", default=",".join(variants.TITLES), metavar="NAME,NAME", help="default: all")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="measurements of each variant; default: 1")
    parser.add_argument("--minutes", type=float, default=1e6, metavar="N", help="start nothing after so many minutes")
    parser.add_argument("--wait_s", type=float, default=60, metavar="N", help="longest wait for a quiet machine")
    parser.add_argument("--work_dir", type=Path, default=WORK, metavar="DIR", help="models and outcomes")
    parser.add_argument("--page_only", action="store_true", help="write the pages from the JSON files")
    arguments = parser.parse_args()
    if not arguments.page_only:
        until = time.monotonic() + 60 * arguments.minutes
        cells = [
            cell
            for cell in (variants.QUICK if arguments.quick else variants.ALL)
            if all(
                getattr(arguments, name) is None or getattr(cell, name) in getattr(arguments, name)
                for name in ("tokens", "threads", "rows")
            )
        ]
        bench = Bench(arguments.work_dir.resolve(), arguments.wait_s, arguments.engines.split(","))
        bench.prepare()
        bench.run(cells, arguments.rounds, until)
        result = bench.result()
        if not result["measurements"]:
            sys.exit("nothing was measured")
        write_whole(file_of(result["machine"]), compact(result))
    for path in page.write(all_measurements()):
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
