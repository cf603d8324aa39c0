"""Measures engines that are built from recipes, as the product runs them: contexts that are asked afterwards.

python -m benchmarks.real.built --output docs/benchmarks/reading-heads.json

Outcomes have the form of benchmarks.real; every one is written as it comes, and a run that was cut off goes on. The
contexts are those of benchmarks.real; recipes were found on other texts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.real.__main__ import GGUF, compact
from benchmarks.real.contexts import Asked, Context, make_context
from benchmarks.real.full_cache import Scored
from benchmarks.real.measure import AFTER, IN, context_head, measured
from benchmarks.real.policies import FULL
from benchmarks.results.runs import ROOT
from chunkkv import Context as Compressed
from chunkkv.cli.progress import progress_bars
from chunkkv.evaluation.lm_eval.continuations import log_probabilities
from chunkkv.evaluation.records import append_record
from chunkkv.files import write_whole
from chunkkv.session import ChunkKVSession
from chunkkv_builder.build import main as build_engine

EXAMPLES = ROOT / "examples" / "smollm2"
COMMON = "--chunkkv --max_seq_len 8192 --log_level error"
WHOLE = 10_000


@dataclass(frozen=True)
class Built:
    """A policy: the flags of its engine, its scorer, where the question stands, and the shares kept per 10,000."""

    policy: str
    flags: tuple[str, ...]
    scorer: str
    mode: str
    keeps: tuple[int, ...]


def recipe(name: str) -> tuple[str, ...]:
    """Return the flags of an engine that is built from a recipe of examples/smollm2."""
    return ("--chunkkv_recipe", str(EXAMPLES / name))


RANKED = ("--chunkkv_budget_split", "ranked", "--chunkkv_min_tokens", "40")
UNIFORM = ("--chunkkv_min_tokens", "40")
STATIC, CHUNKS = recipe("recipe-static.json"), recipe("recipe.json")
EVERYTHING = (
    Built(FULL, UNIFORM, "window", AFTER, (WHOLE,)),
    Built("reading heads, reread chunks (engine)", CHUNKS, "reread", AFTER, (2_000,)),
    Built("reading heads, others recent tokens (engine)", STATIC, "window", AFTER, (2_000, 1_000)),
    Built("one ranking of all layers, reread (engine)", RANKED, "reread", AFTER, (2_000,)),
    Built("reading heads, reread chunks (engine)", CHUNKS, "reread", AFTER, (1_000, 500)),
    Built("ChunkKV (engine)", UNIFORM, "window", AFTER, (2_000,)),
    Built("reading heads, window chunks (engine)", CHUNKS, "window", AFTER, (2_000,)),
    Built("reading heads, window chunks (engine)", CHUNKS, "window", IN, (300,)),
    Built("reading heads, others recent tokens (engine)", STATIC, "window", IN, (300,)),
    Built("ChunkKV (engine)", UNIFORM, "window", IN, (500,)),
    Built("reading heads, window chunks (engine)", CHUNKS, "window", IN, (500,)),
    Built(FULL, UNIFORM, "window", IN, (WHOLE,)),
    Built("one ranking of all layers, reread (engine)", RANKED, "reread", AFTER, (1_000,)),
)


def engine(folder: Path, flags: Sequence[str]) -> ChunkKVSession:
    """Return an engine of SmolLM2 with `flags`, built below `folder` where it is missing; it runs on one thread."""
    name = "-".join(Path(flag).stem for flag in flags if not flag.startswith("--"))
    path = folder / f"engine-{name}"
    if not (path / "manifest.json").is_file():
        build_engine(["--checkpoint_dir", str(GGUF), "--output_dir", str(path), *COMMON.split(), *flags])
    return ChunkKVSession.from_dir(path, threads=1)


def outcomes(session: ChunkKVSession, built: Built, context: Context, keep: int) -> Iterator[tuple[str, list[Any]]]:
    """Yield the key and the outcome of every task of a context."""
    ratio = keep / WHOLE
    if built.mode == AFTER:
        compressed = session.compress(list(context.ids), keep_ratio=ratio, scorer=built.scorer)
    for asked in context.asked:
        if built.mode == AFTER:
            scored = score(session, compressed, asked.question, asked)
        else:
            whole = [*context.ids, *asked.question]
            compressed = session.compress(whole, keep_ratio=ratio, scorer=built.scorer)
            scored = score(session, compressed, (), asked)
        right = "".join(map(str, scored.right))
        total = round(float(np.sum(scored.log_probabilities)), 3)
        yield f"{built.mode}|{asked.name}|{built.policy}|{keep}", [compressed.kept_tokens, right, total]


def score(session: ChunkKVSession, compressed: Compressed, fed: Sequence[int], asked: Asked) -> Scored:
    """Score the tokens of an answer behind a compressed prompt and `fed`; see benchmarks.real.full_cache."""
    executor, first = session.executor, max(asked.first_scored, 0 if fed else 1)
    block = np.array([*fed, *asked.answer[:-1]], np.int64)
    cache = executor.new_cache(1, executor.capacity_for(tuple(slots + len(block) for slots in compressed.slots)))
    executor.continuer().copy(compressed.cache, compressed.slots, cache)
    logits = executor.score_block(cache, block, compressed.slots, len(compressed))[len(fed) + first - 1 :]
    expected = np.array(asked.answer[first:], np.int64)
    right = logits.argmax(axis=1) == expected
    return Scored(tuple(map(int, right)), tuple(log_probabilities(logits, expected).tolist()))


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work_dir", type=Path, default=ROOT / "build" / "results-real-built", help="engines, outcomes"
    )
    parser.add_argument("--contexts", type=int, default=12, help="contexts of each length")
    parser.add_argument("--lengths", default="1000", help="tokens of the contexts")
    parser.add_argument("--only", default="", help="measure only policies whose name holds this")
    parser.add_argument("--output", type=Path, help="also write the JSON of all outcomes here")
    arguments = parser.parse_args()
    path = arguments.work_dir / "outcomes.jsonl"
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    plan = [
        (built, keep, int(length), number)
        for built in EVERYTHING
        if arguments.only in built.policy
        for keep in built.keeps
        for length in arguments.lengths.split(",")
        for number in range(arguments.contexts)
    ]
    session, flags = None, None
    with progress_bars(False) as begin:
        advance = begin("outcomes", len(plan))
        for built, keep, length, number in plan:
            if session is None or flags != built.flags:
                session, flags = engine(arguments.work_dir, built.flags), built.flags
            assert session.tokenizer is not None
            context, start = make_context(session.tokenizer, length, number), time.process_time()
            known = measured(path).get(context.name, {}).get("outcomes", {})
            if f"{built.mode}|{context.asked[-1].name}|{built.policy}|{keep}" not in known:
                made = dict(outcomes(session, built, context, keep))
                seconds = round(time.process_time() - start, 1)
                append_record(path, {**context_head(context), "seconds": seconds, "outcomes": made})
            advance(1)
            if arguments.output:
                write_whole(arguments.output, compact(measured(path)))


if __name__ == "__main__":
    main()
