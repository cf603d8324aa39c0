"""What a prompt costs in accuracy that is held or read in fewer bits: perplexity behind it, and agreement.

Builds engines of one model with every type of KV cache, and with prompts read by `--prefill_precision w8a8`. A text is
the prompt; what follows it is scored behind the whole prompt and behind what ChunkKV keeps of it, and compared with the
engine that does both in float32, with the same share kept. Prints a table, then the result as one JSON line; --output
also writes it to a file. Nothing is timed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.weight_precision import BLOCK, TEXT, compare, table, write_result
from chunkkv import ChunkKVSession
from chunkkv_builder.build import main as build
from chunkkv_builder.config import KV_CACHE_DTYPES, PREFILL_PRECISIONS

KEPT_PER_10K = (10_000, 2_000)
EXACT = "float32"
# Types of the cache, and in what prompts are read.
VARIANTS = (
    *((dtype, EXACT) for dtype in KV_CACHE_DTYPES),
    *((dtype, precision) for precision in PREFILL_PRECISIONS for dtype in (EXACT, "int8")),
)


def session(checkpoint: Path, dtype: str, prompts_in: str, folder: Path, tokens: int) -> ChunkKVSession:
    """Build an engine with ChunkKV, a cache of `dtype` and prompts that are read in `prompts_in`, and load it."""
    limits = ["--max_seq_len", str(tokens), "--max_batch_size", "1", "--log_level", "error", "--chunkkv"]
    output = folder / f"{dtype}-{prompts_in}"
    flags = ["--checkpoint_dir", str(checkpoint), "--output_dir", str(output), "--kv_cache_dtype", dtype]
    build([*flags, *limits, *([] if prompts_in == EXACT else ["--prefill_precision", prompts_in])])
    return ChunkKVSession.from_dir(output)


def continued(
    engine: ChunkKVSession, prompt: np.ndarray, text: np.ndarray, keep_per_10k: int
) -> tuple[list[np.ndarray], dict[int, np.ndarray]]:
    """Return the logits [n,vocab] after each token of text [S] behind a prompt [L], in blocks, and what was kept."""
    executor, kept = engine.executor, {}
    prefiller, slots = executor.blockwise_prefiller(), len(prompt)
    cache = prefiller.new_cache(1, len(prompt) + len(text))
    _, queries = prefiller.fill(prompt, cache, threading.Event())
    if keep_per_10k < KEPT_PER_10K[0]:
        assert engine.settings is not None
        slots = engine.settings.kept_tokens(len(prompt), keep_per_10k)
        small = prefiller.new_cache(1, slots + len(text))
        kept = dict(prefiller.compress(cache, queries, prompt, keep_per_10k, 0, small).kept_indices)
        cache = small
    blocks = [
        executor.score_block(cache, text[start : start + BLOCK], slots + start, len(prompt) + start)
        for start in range(0, len(text), BLOCK)
    ]
    return blocks, kept


def measure(
    checkpoint: Path, ids_of: Path, lengths: tuple[int, int], console: Console
) -> tuple[int, list[dict[str, Any]]]:
    """Build and compare every variant; return the number of tokens that were read, and a row per variant and share."""
    rows: list[dict[str, Any]] = []
    exact: dict[int, tuple[list[np.ndarray], dict[int, np.ndarray]]] = {}
    prompt_tokens, tokens = lengths[0], sum(lengths)
    with tempfile.TemporaryDirectory() as folder:
        for dtype, prompts_in in VARIANTS:
            engine = session(checkpoint, dtype, prompts_in, Path(folder), tokens)
            assert engine.tokenizer is not None
            ids = np.array(engine.tokenizer.encode(ids_of.read_text(encoding="utf-8"))[:tokens], np.int64)
            prompt, text = ids[:prompt_tokens], ids[prompt_tokens:]
            for keep_per_10k in KEPT_PER_10K:
                blocks, kept = continued(engine, prompt, text[:-1], keep_per_10k)
                reference, expected = exact.setdefault(keep_per_10k, (blocks, kept))
                same = [float(np.isin(kept[part], expected[part]).mean()) for part in kept]
                rows.append(
                    {
                        "kv_cache": dtype,
                        "prompts_in": prompts_in,
                        "keep_ratio": keep_per_10k / KEPT_PER_10K[0],
                        "bytes_per_token": engine.executor.kv_bytes_per_token,
                        **compare(blocks, reference, text[1:]),
                        "same_kept_tokens": round(float(np.mean(same)), 5) if same else 1.0,
                    }
                )
                console.print(rows[-1])
    return tokens, rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint_dir", type=Path, required=True, metavar="PATH", help="a checkpoint or GGUF file")
    parser.add_argument("--text", type=Path, default=TEXT, metavar="FILE", help="text in UTF-8; default: Moby-Dick, 1")
    parser.add_argument("--prompt_tokens", type=int, default=2048, metavar="N", help="length of the prompt")
    parser.add_argument("--tokens", type=int, default=768, metavar="N", help="tokens behind it that are scored")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write the JSON, too")
    arguments = parser.parse_args()
    console = Console(file=sys.stderr, highlight=False)
    lengths = arguments.prompt_tokens, arguments.tokens
    count, rows = measure(arguments.checkpoint_dir, arguments.text, lengths, console)
    console.print(table(rows))
    write_result(arguments.checkpoint_dir, arguments.text, count, rows, arguments.output)


if __name__ == "__main__":
    main()
