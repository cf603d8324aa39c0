"""Measure the settings of ChunkKV against each other, so that defaults are numbers and not taste.

    python examples/needle/measure_settings.py --work_dir build/settings --out docs/benchmarks/settings.json

Builds one engine of the shipped model and runs `chunkkv eval` on it, one setting changed at a time, all on the same
prompts and with as many kept tokens. A run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Final

from vocabulary import write_atomically

from chunkkv.cli import main as chunkkv
from chunkkv_builder.build_engine import main as build_engine

MODEL: Final = Path(__file__).resolve().parent / "model"
BASE: Final = "chunkkv:window=32"  # the engine's own window is the largest one that is compared
POLICIES: Final = (
    BASE,
    *(f"{BASE}:layer_reuse={size}:leader={leader}" for size in (2, 4) for leader in ("first", "last")),
    *(f"chunkkv:window={window}" for window in (8, 16, 64)),
    *(f"{BASE}:pooling={pooling}" for pooling in (3, 5, 7)),
    *(f"{BASE}:sinks={sinks}" for sinks in (0, 16)),
    *(f"{BASE}:chunk_size={size}" for size in (5, 16, 20, 32)),
    *(f"chunkkv-delimiter:window=32:chunk_size={size}" for size in (5, 10, 16, 20, 32)),
)
KEEP: Final = "0.2,0.1"
LENGTH: Final = 1024
SUITES: Final = ("recall", "distractors", "dense")
COMMAND: Final = (
    "python examples/needle/measure_settings.py --work_dir build/settings --out docs/benchmarks/settings.json"
)


def measure(folder: Path, suite: str, examples: int) -> dict[str, object]:
    """Return the summary of one suite; what is in `folder` already is not run again."""
    engine = folder / "engine"
    if not (engine / "manifest.json").is_file():
        flags = "--chunkkv --chunkkv_window 64 --chunkkv_min_tokens 78 --max_batch_size 48 --log_level error"
        build_engine(["--checkpoint_dir", str(MODEL), "--output_dir", str(engine), *flags.split()])
    output = folder / suite
    lists = {"suite": suite, "policies": ",".join(POLICIES), "keep": KEEP, "lengths": LENGTH, "examples": examples}
    command = ["eval", "--engine_dir", str(engine), "--output_dir", str(output), "--threads", "1", "--no_plots"]
    for name, value in lists.items():
        command += [f"--{name}", str(value)]
    chunkkv(command)
    return json.loads((output / "summary.json").read_text(encoding="utf-8"))


def main() -> None:
    """Measure every suite and write what the tables need."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--suites", default=",".join(SUITES))
    arguments = parser.parse_args()
    suites, differences, cells = [], [], []
    for suite in arguments.suites.split(","):
        summary = measure(arguments.work_dir, suite, arguments.examples)
        suites += summary["suites"]
        differences += summary["differences"]
        cells += [row for row in summary["cells"] if row["suite"] == "recall"]
    values = {"command": COMMAND, "length": LENGTH, "examples": arguments.examples}
    values |= {"suites": suites, "differences": differences, "cells": cells}
    write_atomically(arguments.out, (json.dumps(values, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
