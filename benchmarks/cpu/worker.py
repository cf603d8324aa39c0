"""Runs one engine in its own environment: python -m benchmarks.cpu.worker version|prepare|measure ENGINE [CASE]

`version` prints the engine's version. `prepare` and `measure` read a case (JSON); `measure` prints what it took as one
JSON line. Memory is that of this process, so a process measures one case.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.cpu.contract import BenchmarkEngine, Case
from benchmarks.cpu.machine import busy_s, memory_mb

SETTLE = 4  # first steps that are not counted
NAMED_TOKENS = 16  # tokens of the first row that show whether engines agree


def engine_named(name: str) -> BenchmarkEngine:
    """Return an engine; raises ImportError or OSError where it is not installed."""
    return importlib.import_module(f"benchmarks.cpu.engines.{name}").ENGINE


def measure(engine: BenchmarkEngine, case: Case) -> dict[str, Any]:
    """Run a case and return its times in seconds, on the clock and of the processor, and its memory in MB."""
    runner = engine.load(case)
    loaded, busy, own, clock = memory_mb("VmRSS"), busy_s(), time.process_time(), time.perf_counter()
    tokens = [runner.prefill()]
    first, first_cpu = time.perf_counter() - clock, time.process_time() - own
    steps, steps_cpu = [], []
    for _ in range(case.steps):
        start, start_cpu = time.perf_counter(), time.process_time()
        tokens.append(runner.step())
        steps.append(time.perf_counter() - start)
        steps_cpu.append(time.process_time() - start_cpu)
    wall, worked = time.perf_counter() - clock, time.process_time() - own
    compress = runner.compress_s()
    return {
        "first_token_s": round(first, 4),
        "first_token_cpu_s": round(first_cpu, 4),
        "compress_s": None if compress is None else round(compress, 5),
        "step_ms": round(1e3 * statistics.median(steps[SETTLE:]), 3),
        "step_cpu_ms": round(1e3 * statistics.median(steps_cpu[SETTLE:]), 3),
        "peak_mb": round(memory_mb("VmHWM"), 1),
        "loaded_mb": round(loaded, 1),
        "other_cores": round(max(0.0, busy_s() - busy - worked) / wall, 2),
        "answer": [row[0] for row in tokens[:NAMED_TOKENS]],
    }


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["version", "prepare", "measure"])
    parser.add_argument("engine")
    parser.add_argument("case", type=Path, nargs="?")
    arguments = parser.parse_args()
    engine = engine_named(arguments.engine)
    if arguments.action == "version":
        print(json.dumps(engine.version()))
        return
    case = Case.from_json(json.loads(arguments.case.read_text("utf-8")))
    if arguments.action == "prepare":
        engine.prepare(case.work, case.model, case.weights)
    else:
        print(json.dumps(measure(engine, case)))


if __name__ == "__main__":
    main()
