"""What int8, int4 and w8a8 weights cost in accuracy: perplexity of a real text and agreement with the float32 engine.

Builds engines of one GGUF model in every precision, with both types of activations, and for int4 with the plain and the
searched rounding. The text is fed token by token (teacher forcing). Prints a table, then the result as one JSON line;
--output also writes it to a file. --rows measures some variants and leaves the other rows of that file. Nothing is
timed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import platform
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from rich.console import Console
from rich.table import Table

from chunkkv import ChunkKVSession, SamplingParams
from chunkkv.evaluation.lm_eval.continuations import log_probabilities
from chunkkv.files import write_whole
from chunkkv_builder.backends import input_calibration
from chunkkv_builder.build import main as build
from chunkkv_builder.checkpoint.gguf import GgufCheckpoint
from chunkkv_builder.onnx_graph import quantize

TEXT = Path(__file__).parent / "texts" / "moby_dick_chapter_1.txt"
BLOCK = 256  # tokens whose logits are held at once
NEW_TOKENS = 32
QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "How many legs does a spider have?",
    "Explain in two sentences why the sky is blue.",
    "Name three fruits that are red.",
    "Write a Python function that adds two numbers.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
)


@dataclass(frozen=True)
class Variant:
    """One way to store the weights of an engine.

    Parameters
    ----------
    weights : str
        "float32", "int8", "int4" or "w8a8".
    activations : str
        "float32" or "int8".
    rounding : str
        "none" for float32; "plain" gives each block's largest value exactly; "searched" looks for a better scale;
        "kept" takes the blocks of the file. Of w8a8, "smoothed" evens out the inputs, and "by output" does not.
    """

    weights: str
    activations: str
    rounding: str

    def flags(self) -> list[str]:
        """Return the flags of chunkkv-build."""
        if self.weights == "float32":
            return []
        return [
            *("--use_weight_only", "--weight_only_precision", self.weights),
            *("--weight_only_activations", self.activations),
        ]

    @contextlib.contextmanager
    def rounded(self) -> Iterator[None]:
        """Make the builder round the weights in this way; without "kept", as if the file had no blocks of its own."""
        with contextlib.ExitStack() as patches:
            if self.rounding in ("plain", "searched"):
                patches.enter_context(mock.patch.object(GgufCheckpoint, "stored_blocks", return_value=None))
            if self.rounding == "plain":
                plain = mock.patch.object(quantize, "search_scales", lambda blocks: quantize.plain_scales(blocks, 4))
                patches.enter_context(plain)
            if self.rounding == "by output":
                patches.enter_context(mock.patch.object(input_calibration, "smoothing_scales", np.ones_like))
            yield


REFERENCE = Variant("float32", "float32", "none")
VARIANTS = (
    REFERENCE,
    *(Variant("int8", activations, "plain") for activations in ("float32", "int8")),
    *(Variant("int4", activations, rule) for rule in ("plain", "searched") for activations in ("float32", "int8")),
    *(Variant("int4", activations, "kept") for activations in ("float32", "int8")),
    *(Variant("w8a8", "int8", rule) for rule in ("by output", "smoothed")),
)


def session(checkpoint: Path, variant: Variant, folder: Path, tokens: int) -> ChunkKVSession:
    """Build an engine and load it."""
    engine = folder / f"{variant.weights}-{variant.activations}-{variant.rounding}"
    limits = ["--max_seq_len", str(tokens + 256), "--max_batch_size", "1", "--log_level", "error"]
    with variant.rounded():
        build(["--checkpoint_dir", str(checkpoint), "--output_dir", str(engine), *limits, *variant.flags()])
    return ChunkKVSession.from_dir(engine)


def logits(engine: ChunkKVSession, ids: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the logits [n,vocab] after each token of ids [L], a block at a time."""
    executor = engine.executor
    cache = executor.new_cache(1, executor.capacity_for(len(ids)))
    for start in range(0, len(ids), BLOCK):
        yield executor.score_block(cache, ids[start : start + BLOCK], start, start)


def compare(found: Iterable[np.ndarray], reference: Iterable[np.ndarray], expected: np.ndarray) -> dict[str, float]:
    """Return the perplexity of logits over the tokens `expected` [L], and how far they are from the reference's.

    Both are given in blocks [n,vocab].
    """
    total, equal, divergence, place = 0.0, 0, 0.0, 0
    for ours, exact in zip(found, reference, strict=True):
        total += float(log_probabilities(ours, expected[place : place + len(ours)]).sum())
        equal += int((ours.argmax(axis=1) == exact.argmax(axis=1)).sum())
        divergence += _divergence(exact, ours)
        place += len(ours)
    return {
        "perplexity": round(float(np.exp(-total / place)), 4),
        "negative_log_likelihood": round(-total / place, 5),
        "argmax_agreement": round(equal / place, 4),
        "kl_divergence": round(divergence / place, 6),
    }


def _divergence(exact: np.ndarray, ours: np.ndarray) -> float:
    """Return the sum over rows of the Kullback-Leibler divergence from softmax(exact) to softmax(ours), in nats."""
    total = 0.0
    for first, second in zip(exact.astype(np.float64), ours.astype(np.float64), strict=True):
        first, second = first - first.max(), second - second.max()
        first, second = first - np.log(np.exp(first).sum()), second - np.log(np.exp(second).sum())
        total += float((np.exp(first) * (first - second)).sum())
    return total


def answers(engine: ChunkKVSession) -> list[list[int]]:
    """Return the greedy answers to QUESTIONS."""
    greedy = SamplingParams(temperature=0.0, max_new_tokens=NEW_TOKENS)
    results = [engine.generate([{"role": "user", "content": text}], greedy) for text in QUESTIONS]
    return [list(result.token_ids) for result in results]


def measure(
    checkpoint: Path, ids_of: Path, tokens: int, variants: Iterable[Variant], console: Console
) -> tuple[int, list[dict[str, Any]]]:
    """Build and compare the variants; return the number of tokens that were fed and one row for each."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        reference = session(checkpoint, REFERENCE, Path(folder), tokens)
        assert reference.tokenizer is not None
        ids = np.array(reference.tokenizer.encode(ids_of.read_text(encoding="utf-8"))[:tokens], np.int64)
        exact, exact_logits = answers(reference), list(logits(reference, ids[:-1]))
        for variant in variants:
            engine = session(checkpoint, variant, Path(folder), tokens) if variant != REFERENCE else reference
            ours = answers(engine)
            equal_answers = sum(first == second for first, second in zip(ours, exact, strict=True))
            equal_first = sum(first[0] == second[0] for first, second in zip(ours, exact, strict=True))
            counts = {"equal_first_tokens": equal_first, "equal_answers": equal_answers, "answers": len(exact)}
            rows.append({**vars(variant), **compare(logits(engine, ids[:-1]), exact_logits, ids[1:]), **counts})
            console.print(rows[-1])
    return len(ids), rows


def table(rows: list[dict[str, Any]]) -> Table:
    """Return the rows for a terminal."""
    shown = Table(*rows[0])
    for row in rows:
        shown.add_row(*map(str, row.values()))
    return shown


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint_dir", type=Path, required=True, metavar="FILE", help="a GGUF file")
    parser.add_argument("--text", type=Path, default=TEXT, metavar="FILE", help="text in UTF-8; default: Moby-Dick, 1")
    parser.add_argument("--tokens", type=int, default=2048, metavar="N", help="tokens of the text; default: 2048")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write the JSON, too")
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        choices=range(len(VARIANTS)),
        metavar="N",
        help=f"measure rows of these numbers, 0 to {len(VARIANTS) - 1}; the others are those of --output; default: all",
    )
    arguments = parser.parse_args()
    console = Console(file=sys.stderr, highlight=False)
    chosen = VARIANTS if arguments.rows is None else [VARIANTS[number] for number in arguments.rows]
    count, rows = measure(arguments.checkpoint_dir, arguments.text, arguments.tokens, chosen, console)
    if arguments.rows is not None and arguments.output is not None and arguments.output.exists():
        rows = with_rows_of(json.loads(arguments.output.read_text(encoding="utf-8"))["rows"], rows)
    console.print(table(rows))
    write_result(arguments.checkpoint_dir, arguments.text, count, rows, arguments.output)


def with_rows_of(before: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows and those of an earlier result that they do not replace, in the order of VARIANTS."""
    by_variant = {tuple(row[name] for name in vars(REFERENCE)): row for row in (*before, *rows)}
    places = [tuple(vars(variant).values()) for variant in VARIANTS]
    return [by_variant[place] for place in places if place in by_variant]


def write_result(model: Path, text: Path, tokens: int, rows: list[dict[str, Any]], output: Path | None) -> None:
    """Print the rows as one JSON line with what they were measured on, and write them to `output`, too."""
    result = {
        "model": model.name,
        "text": {"file": text.name, "sha256": hashlib.sha256(text.read_bytes()).hexdigest(), "tokens": tokens},
        "machine": platform.machine(),
        "onnxruntime": version("onnxruntime"),
        "rows": rows,
    }
    if output is not None:
        write_whole(output, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
