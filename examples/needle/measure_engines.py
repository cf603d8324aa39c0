"""Measure what an answer loses: `python examples/needle/measure_engines.py --out examples/needle/engines.json`.

Builds engines of the shipped model, asks each the same new prompts (codes somewhere in a text of 1024 tokens, the
question at the end) and counts exact answers: by the precision of the weights, and by how ChunkKV chooses.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from documents import Task, Writer, test_prompt
from rich.console import Console
from rich.progress import Progress

from chunkkv import ChunkKVSession, SamplingParams
from chunkkv.evaluation.statistics import wilson
from chunkkv.files import write_whole
from chunkkv_builder.build import main as build_engine

MODEL: Final = Path(__file__).resolve().parent / "model"
KEEP_RATIOS: Final = (1.0, 0.5, 0.2, 0.1)
TASKS: Final = {"code": Task(), "code among 8": Task(facts=8)}
DELIMITER: Final = {"chunkkv_boundaries": "delimiter", "chunkkv_chunk_size": 20}
# name: the build's flags beyond --chunkkv
PRECISIONS: Final = {
    "float32": DELIMITER,
    "int8": {**DELIMITER, "use_weight_only": True, "weight_only_precision": "int8"},
    "int4": {**DELIMITER, "use_weight_only": True, "weight_only_precision": "int4"},
}
CHOICES: Final = {
    f"{boundaries}, chunks of {size}, {groups}": {
        "chunkkv_boundaries": boundaries,
        "chunkkv_chunk_size": size,
        **flags,
    }
    for boundaries in ("fixed", "delimiter")
    for size in (10, 20)
    for groups, flags in {
        "every layer": {},
        "pairs, first leads": {"chunkkv_layer_reuse": 2, "chunkkv_leader": "first"},
        "pairs, last leads": {"chunkkv_layer_reuse": 2, "chunkkv_leader": "last"},
    }.items()
}


def build(name: str, flags: dict[str, object], folder: Path) -> Path:
    """Build one engine of the shipped model."""
    output = folder / name.replace(", ", "-").replace(" ", "_")
    command = ["--checkpoint_dir", str(MODEL), "--output_dir", str(output), "--log_level", "error"]
    # A grid's own losses: docs/method.md has what pooling saves.
    command += ["--chunkkv", "--chunkkv_pooling", "1", "--chunkkv_window", "32", "--chunkkv_head_reduce", "mean"]
    for flag, value in flags.items():
        command += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    build_engine(command)
    return output


def exact_answers(session: ChunkKVSession, examples: list[tuple[list[int], list[int]]], keep_ratio: float) -> int:
    """Count the prompts whose greedy answer is the expected one, end token included."""
    sampling = SamplingParams(max_new_tokens=len(max((answer for _, answer in examples), key=len)))
    right = 0
    for prompt, answer in examples:
        right += list(session.generate(prompt, sampling, keep_ratio=keep_ratio).token_ids) == answer
    return right


def measure(length: int, count: int, seed: int, console: Console) -> list[dict[str, Any]]:
    """Return one cell per engine, task and keep ratio."""
    examples = {}
    for number, (name, task) in enumerate(TASKS.items()):
        writer = Writer([seed, length, number])
        examples[name] = [test_prompt(writer, length, task) for _ in range(count)]
    engines: list[tuple[str, str, dict[str, Any], list[str], tuple[float, ...]]]
    engines = [("weights", name, flags, list(TASKS), KEEP_RATIOS) for name, flags in PRECISIONS.items()]
    engines += [("choice", name, flags, ["code"], KEEP_RATIOS[1:]) for name, flags in CHOICES.items()]
    cells = []
    with tempfile.TemporaryDirectory() as folder, Progress(console=console) as progress:
        bar = progress.add_task("prompts", total=count * sum(len(tasks) * len(ratios) for *_, tasks, ratios in engines))
        for kind, engine_name, flags, tasks, ratios in engines:
            engine = build(engine_name, flags, Path(folder))
            session = ChunkKVSession.from_dir(engine, threads=1)
            for task_name, ratio in itertools.product(tasks, ratios):
                right = exact_answers(session, examples[task_name], ratio)
                low, high = (round(bound, 4) for bound in wilson(right, count))
                numbers = {"n": count, "exact": right / count, "low": low, "high": high}
                size = (engine / "weights.safetensors").stat().st_size
                names: dict[str, Any] = {kind: engine_name, "task": task_name}
                cells.append({**names, "keep_ratio": ratio, **numbers, "weight_bytes": size})
                progress.advance(bar, count)
    return cells


def card_rows(cells: list[dict[str, Any]]) -> list[str]:
    """Return the rows of the model card's two tables: exact answers in percent with their interval."""
    rows: dict[str, list[str]] = {}
    for cell in cells:
        if "weights" in cell:
            row = f"{cell['weights']}, {cell['weight_bytes'] / 1e6:.1f} MB | {cell['task']}"
        else:
            row = str(cell["choice"])
        percent = [f"{cell[key] * 100:.1f}" for key in ("exact", "low", "high")]
        rows.setdefault(row, []).append(f"{percent[0]} ({percent[1]}–{percent[2]})")
    return [f"| {' | '.join([row, *values])} |" for row, values in rows.items()]


def main() -> None:
    """Measure, write the JSON, print the rows of the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=9)
    arguments = parser.parse_args()
    started = time.perf_counter()
    cells = measure(arguments.length, arguments.count, arguments.seed, Console(stderr=True))
    command = "python examples/needle/measure_engines.py --out examples/needle/engines.json"
    values = {"command": command, "length": arguments.length, "seed": arguments.seed, "cells": cells}
    write_whole(arguments.out, json.dumps(values, indent=1) + "\n")
    print("\n".join(card_rows(cells)))
    print(f"{arguments.out}: {len(cells)} cells in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
