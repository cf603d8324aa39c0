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

from chunkkv.cli.main import main as chunkkv
from chunkkv.files import write_whole
from chunkkv_builder.build import main as build_engine

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
DELIMITER: Final = "chunkkv-delimiter:window=32:chunk_size=20"
POOLED: Final = (DELIMITER, *(f"{DELIMITER}:pooling={pooling}" for pooling in (5, 7)))
# folder: suite and policies
RUNS: Final = {suite: (suite, POLICIES) for suite in ("recall", "distractors", "dense")} | {
    f"{suite}-pooled": (suite, POOLED) for suite in ("recall", "dense")
}
ROW: Final = ("suite", "mode", "policy", "keep_ratio", "n", "kept", "accuracy", "low", "high")
DIFFERENCE: Final = ("suite", "mode", "policy", "minus", "keep_ratio", "difference", "low", "high")
SCRIPT: Final = "python examples/needle/measure_settings.py"
COMMAND: Final = f"{SCRIPT} --work_dir build/settings --out docs/benchmarks/settings.json"


def measure(folder: Path, name: str, examples: int) -> dict[str, list[dict[str, object]]]:
    """Return the summary of one run; what is in `folder` already is not run again."""
    suite, policies = RUNS[name]
    engine = folder / "engine"
    if not (engine / "manifest.json").is_file():
        flags = "--chunkkv_window 64 --chunkkv_min_tokens 78 --chunkkv_pooling 1 --chunkkv_boundaries fixed "
        flags += "--chunkkv_head_reduce mean "
        flags += "--chunkkv_leader last --max_batch_size 48 --log_level error"
        build_engine(["--checkpoint_dir", str(MODEL), "--output_dir", str(engine), "--chunkkv", *flags.split()])
    output = folder / name
    lists = {"suite": suite, "policies": ",".join(policies), "keep": KEEP, "lengths": LENGTH, "examples": examples}
    command = ["eval", "--engine_dir", str(engine), "--output_dir", str(output), "--threads", "1", "--no_plots"]
    for flag, value in lists.items():
        command += [f"--{flag}", str(value)]
    chunkkv(command)
    return json.loads((output / "summary.json").read_text(encoding="utf-8"))


def main() -> None:
    """Measure every run and write one row per line: accuracies with intervals, and differences on the same prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=200, help="prompts per cell; default: 200")
    arguments = parser.parse_args()
    tables: dict[str, list[str]] = {"accuracy": [], "differences": []}
    for name in RUNS:
        summary = measure(arguments.work_dir, name, arguments.examples)
        for table, source, columns in (("accuracy", "suites", ROW), ("differences", "differences", DIFFERENCE)):
            rows = (json.dumps({column: row[column] for column in columns}) for row in summary[source])
            tables[table] += [row for row in rows if row not in tables[table]]
    head = json.dumps({"command": COMMAND, "length": LENGTH, "examples_per_cell": arguments.examples})
    parts = [f'"{table}": [\n' + ",\n".join(rows) + "\n]" for table, rows in tables.items()]
    write_whole(arguments.out, ",\n".join([head.removesuffix("}"), *parts]) + "}\n")


if __name__ == "__main__":
    main()
