"""Runs everything the results page reports, on one engine of the shipped model; a run that was cut off goes on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.results.runs import ENGINE_FLAGS, MODEL, RUNS, Run
from benchmarks.results.trials import compact
from chunkkv.evaluation.evaluator import Evaluator
from chunkkv.files import write_whole
from chunkkv.session import ChunkKVSession
from chunkkv_builder.build import main as build_engine

SECONDS_FILE = "seconds.json"  # measuring time so far, over all attempts


def engine(folder: Path) -> ChunkKVSession:
    """Return the session of the engine in `folder`, built there where it is missing; it runs on one thread."""
    if not (folder / "manifest.json").is_file():
        flags = [*ENGINE_FLAGS.split(), "--log_level", "error"]
        build_engine(["--checkpoint_dir", str(MODEL), "--output_dir", str(folder), *flags])
    return ChunkKVSession.from_dir(folder, threads=1)


def run_one(session: ChunkKVSession, run: Run, folder: Path, progress: Progress) -> dict[str, Any]:
    """Return a run's compacted records and the seconds it took; what is in `folder` already is not run again."""
    assert session.settings is not None
    plan = run.plan(session)
    evaluator = Evaluator(session, plan)
    clock = folder / SECONDS_FILE
    before = json.loads(clock.read_text(encoding="utf-8")) if clock.is_file() else 0.0
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    bar = progress.add_task(run.name, total=len(evaluator.examples()))

    def advance(count: int) -> None:
        progress.advance(bar, count)
        if count == 1:
            write_whole(clock, json.dumps(before + time.monotonic() - start))

    records = evaluator.run(folder, advance)
    seconds = json.loads(clock.read_text(encoding="utf-8"))
    return {"name": run.name, "seconds": round(seconds, 1), **compact(plan.header(session.settings), records)}


def measure(work_dir: Path, device: str) -> dict[str, Any]:
    """Return everything that is measured, as JSON values; `work_dir` keeps what is done."""
    session = engine(work_dir / "engine")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        runs = [run_one(session, run, work_dir / run.name, progress) for run in RUNS]
    return {"engine_flags": ENGINE_FLAGS, "device": device, "runs": runs}


def text(measured: dict[str, Any]) -> str:
    """Return the JSON text with one line per row of trials, so that changes can be read."""
    runs = []
    for run in measured["runs"]:
        groups = []
        for group in run["groups"]:
            rows = ",\n".join(f"   {json.dumps(row)}" for row in group["outcomes"])
            known = json.dumps({name: value for name, value in group.items() if name != "outcomes"})
            groups.append(f'  {known[:-1]}, "outcomes": [\n{rows}\n  ]}}')
        agreement = ",\n".join(f"  {json.dumps(row)}" for row in run["agreement"])
        known = json.dumps({name: value for name, value in run.items() if name not in ("groups", "agreement")})
        joined = ",\n".join(groups)
        runs.append(f' {known[:-1]}, "groups": [\n{joined}\n ], "agreement": [\n{agreement}\n ]}}')
    known = json.dumps({name: value for name, value in measured.items() if name != "runs"})
    joined = ",\n".join(runs)
    return f'{known[:-1]}, "runs": [\n{joined}\n]}}\n'
