"""Head classes: read from a recipe, or found by the reconstruction scores of a few contexts that are not measured.

python -m benchmarks.real.recipes --heads 12 --output build/results-real/heads-12.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from benchmarks.real.contexts import make_context
from benchmarks.real.policies import READING, Classes
from chunkkv.files import write_whole

FIRST_CONTEXT = 1_000  # far from the numbers that are measured
KEEP_PER_10K = 2_000


def read_classes(path: Path) -> dict[str, Classes]:
    """Return the head classes of a recipe, by the name of their policy."""
    recipe = json.loads(path.read_text(encoding="utf-8"))
    settings = recipe.get("settings", recipe)
    heads = settings["reading_heads"]
    kv_heads = 1 + max(max(layer, default=0) for layer in heads)
    reading = np.zeros((len(heads), settings.get("kv_heads", kv_heads)), bool)
    for layer, numbers in enumerate(heads):
        reading[layer, numbers] = True
    return {READING.format(int(reading.sum())): Classes(reading, settings["reading_share_per_10k"])}


def demand(scores: np.ndarray, per_10k: int) -> np.ndarray:
    """Return the share of its tokens that every head [layers,Hkv] would keep, if all tokens competed for the total."""
    from benchmarks.real.peers import best

    return best(scores, scores.shape[2] * per_10k // 10_000, over=3).mean(axis=2)


def reading_heads(demands: np.ndarray, count: int) -> np.ndarray:
    """Return the `count` heads of the largest demand [layers,Hkv], as bool of the same shape."""
    chosen = np.zeros(demands.size, bool)
    chosen[np.argsort(-demands.ravel(), kind="stable")[:count]] = True
    return chosen.reshape(demands.shape)


def main() -> None:
    """Find the heads, and write them."""
    from benchmarks.real.__main__ import GGUF, engine
    from benchmarks.real.peers import Peers
    from benchmarks.results.runs import ROOT

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=ROOT / "build" / "results-real", help="engine and outcomes")
    parser.add_argument("--gguf", type=Path, default=GGUF, help="the model's file")
    parser.add_argument("--heads", type=int, default=12, help="how many read")
    parser.add_argument("--prompts", type=int, default=3, help="how many contexts are reread")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    tokenizer = engine(arguments.work_dir / "engine", arguments.gguf).tokenizer
    peers = Peers(arguments.gguf, arguments.work_dir / "transformers")
    demands = []
    for number in range(FIRST_CONTEXT, FIRST_CONTEXT + arguments.prompts):
        ids = np.array(make_context(tokenizer, 1_000, number).ids, np.int64)
        demands.append(demand(peers.kvzip_scores(ids), KEEP_PER_10K))
    mean = np.mean(demands, axis=0)
    chosen = reading_heads(mean, arguments.heads)
    recipe = {
        "kv_heads": chosen.shape[1],
        "reading_heads": [np.flatnonzero(layer).tolist() for layer in chosen],
        "reading_share_per_10k": 10_000 * chosen.size // arguments.heads,
        "demand": mean.round(3).tolist(),
    }
    write_whole(arguments.output, json.dumps(recipe) + "\n")


if __name__ == "__main__":
    main()
