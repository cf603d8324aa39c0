"""This runtime against transformers + kvpress on the CPU: same weights, same prompts, one run, one thread.

Measures prefill, compression alone, time per token and peak memory at keep 1.0, 0.2 and 0.1. Each side runs in its own
process, one after the other, so that neither shares memory or cores with the other. Prints a table, then the result as
one JSON line; --output also writes it to a file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from chunkkv.files import write_whole

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.picture import draw  # noqa: E402
from benchmarks.random_checkpoint import MEDIUM, write_random_checkpoint  # noqa: E402

NEEDLE = ROOT / "examples" / "needle" / "model"
KEEP_RATIOS = (1.0, 0.2, 0.1)
WINDOW, CHUNK_SIZE, BLOCK, STEPS = 32, 10, 512, 24


def run(command: list[str]) -> str:
    """Run a command on one thread and return its output; show its errors if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def build_engine(checkpoint: Path, engine: Path, longest: int) -> None:
    """Build the engine that the measurements use."""
    flags = {
        "checkpoint_dir": checkpoint,
        "output_dir": engine,
        "chunkkv_window": WINDOW,
        "chunkkv_chunk_size": CHUNK_SIZE,
        "chunkkv_pooling": 1,
        "max_num_tokens": BLOCK,
        "max_batch_size": 1,
        "max_seq_len": longest + 256,
        "max_input_len": longest,
    }
    arguments = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    run([sys.executable, "-m", "chunkkv_builder.build", "--chunkkv", *arguments])


def measure(side: str, case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run one side of one case in a process of its own."""
    file = folder / "case.json"
    file.write_text(json.dumps(case))
    return json.loads(run([sys.executable, str(ROOT / "benchmarks" / "worker.py"), side, str(file)]).splitlines()[-1])


def check(ours: dict[str, Any], peer: dict[str, Any], keep_ratio: float) -> None:
    """Refuse to report times of two sides that do not compute the same: next token, and decode logits at keep 1."""
    if ours["prefill_top"] != peer["prefill_top"]:
        raise SystemExit(f"the two sides predict different tokens: {ours['prefill_top']} and {peer['prefill_top']}")
    difference = np.abs(np.subtract(ours["last_logits"], peer["last_logits"])).max()
    if keep_ratio == 1.0 and difference > 2e-3:
        raise SystemExit(f"the two sides' logits differ by {difference} with the full cache")


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Return the median of each time in milliseconds, the best too, and the memory figures."""
    times = {
        f"{name}_ms": {"median": statistics.median(result[f"{name}_s"]) * 1e3, "best": min(result[f"{name}_s"]) * 1e3}
        for name in ("prefill", "compress", "decode")
    }
    memory = {name: result[name] for name in ("peak_mb", "resident_after_load_mb")}
    return {**times, **memory, "kept_tokens": result["kept_tokens"]}


def run_model(name: str, checkpoint: Path, lengths: list[int], repeats: int, folder: Path, console: Console) -> list:
    """Measure one model at every length and keep ratio."""
    engine = folder / f"{name}-engine"
    build_engine(checkpoint, engine, max(lengths))
    vocabulary = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    rows = []
    for length in lengths:
        ids = np.random.default_rng(length).integers(3, vocabulary, length).tolist()
        for keep_ratio in KEEP_RATIOS:
            case = {
                "engine_dir": str(engine),
                "checkpoint_dir": str(checkpoint),
                "ids": ids,
                "keep_ratio": keep_ratio,
                "window": WINDOW,
                "chunk_size": CHUNK_SIZE,
                "block": BLOCK,
                "steps": STEPS,
                "threads": 1,
                "repeats": repeats,
            }
            console.print(f"{name}, {length} tokens, keep {keep_ratio} …")
            ours = measure("ours", case, folder)
            peer = measure("transformers", case, folder)
            check(ours, peer, keep_ratio)
            row = {"model": name, "tokens": length, "keep_ratio": keep_ratio}
            rows.append({**row, "ours": summary(ours), "transformers_kvpress": summary(peer)})
    return rows


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what the times mean: peer divided by ours, above 1 where ours is better."""
    full = {(r["model"], r["tokens"]): r for r in rows if r["keep_ratio"] == 1.0}
    table = []
    for row in rows:
        ours, peer = row["ours"], row["transformers_kvpress"]
        whole = full[row["model"], row["tokens"]]["transformers_kvpress"]
        compress = ours["compress_ms"]["median"]
        table.append(
            {
                "model": row["model"],
                "tokens": row["tokens"],
                "keep_ratio": row["keep_ratio"],
                "prefill_speedup": peer["prefill_ms"]["median"] / ours["prefill_ms"]["median"],
                "compress_speedup": peer["compress_ms"]["median"] / compress if compress else None,
                "compress_share_of_prefill": compress / ours["prefill_ms"]["median"],
                "decode_speedup_over_full_cache": whole["decode_ms"]["median"] / ours["decode_ms"]["median"],
                "peak_memory_ratio": ours["peak_mb"] / peer["peak_mb"],
            }
        )
    return table


def show(rows: list[dict[str, Any]], speedups: list[dict[str, Any]], console: Console) -> None:
    """Print the table people read."""
    table = Table(title="CPU, one thread: ours / transformers + kvpress (median ms)")
    for column in ("model", "tokens", "keep", "prefill", "compress", "per token", "peak MB", "per token vs full HF"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row, ratio in zip(rows, speedups, strict=True):
        ours, peer = row["ours"], row["transformers_kvpress"]
        cells = [
            f"{ours[k]['median']:.1f} / {peer[k]['median']:.1f}" for k in ("prefill_ms", "compress_ms", "decode_ms")
        ]
        memory = f"{ours['peak_mb']:.0f} / {peer['peak_mb']:.0f}"
        speedup = f"{ratio['decode_speedup_over_full_cache']:.2f}x"
        table.add_row(row["model"], str(row["tokens"]), str(row["keep_ratio"]), *cells, memory, speedup)
    console.print(table)


def commit() -> str:
    """Return the commit that was measured, marked where the checkout has changes."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    return done.stdout.strip() or "unknown"


def conditions(repeats: int) -> dict[str, Any]:
    """Return what the numbers depend on."""
    processor = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "command": "make bench",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit(),
        "device": processor,
        "threads": 1,
        "repeats": repeats,
        "decode_steps": STEPS,
        "dtype": "float32",
        "window": WINDOW,
        "chunk_size": CHUNK_SIZE,
        "prefill_block": BLOCK,
        "versions": {name: version(name) for name in ("onnxruntime", "torch", "transformers", "kvpress", "numpy")},
        "shapes": {key: MEDIUM[key] for key in MEDIUM if key.startswith(("hidden", "num", "inter", "head", "vocab"))},
        "notes": "medium has random weights; kvpress keeps whole chunks, so its kept count may differ by a few tokens",
    }


def main() -> None:
    """Measure everything and print table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="2048,8192", help="prompt lengths of the medium model")
    parser.add_argument("--repeats", type=int, default=3, help="prefills per case; medians are reported")
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    lengths = [int(value) for value in arguments.lengths.split(",")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_checkpoint(folder / "medium")
        rows = run_model("medium", folder / "medium", lengths, arguments.repeats, folder, console)
        rows += run_model("needle", NEEDLE, [min(lengths)], arguments.repeats, folder, console)
    speedups = ratios(rows)
    show(rows, speedups, console)
    result = json.dumps({**conditions(arguments.repeats), "rows": rows, "ratios": speedups})
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(arguments.output, json.dumps(json.loads(result), indent=1) + "\n")
        draw(json.loads(result), arguments.output.with_suffix(".png"))
    print(result)


if __name__ == "__main__":
    main()
