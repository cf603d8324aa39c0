"""Policies that need an engine of their own: `ChunkKVSession.compress` compresses, and answers are scored behind it.

Nothing here is computed by the measurement: the session prefills, chooses and compacts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.real.full_cache import Scored
from benchmarks.real.policies import RANKED, RANKED_HEADS, RANKED_TOKENS, READING_24, RECIPE, RECIPE_10, STATIC
from chunkkv.contexts.context import Context
from chunkkv.evaluation.lm_eval.continuations import log_probabilities
from chunkkv.session import ChunkKVSession
from chunkkv_builder.build import main as build_engine


@dataclass
class Product:
    """An engine, and the scorer that its prompts are compressed with."""

    session: ChunkKVSession
    scorer: str
    _ids: bytes = b""
    _contexts: dict[int, Context] = field(default_factory=dict)  # of the last prompt, by share kept

    def score(
        self, ids: np.ndarray, keep: int, fed: Sequence[int], answer: Sequence[int], first: int
    ) -> tuple[int, Scored]:
        """Return the kept tokens per head of a prompt, and the scores of an answer as Engine.score gives them."""
        if self._ids != ids.tobytes():
            self._ids = ids.tobytes()
            self._contexts.clear()
        if keep not in self._contexts:
            made = self.session.compress(ids.tolist(), keep_ratio=keep / 10_000, scorer=self.scorer)
            self._contexts[keep] = made
        context, executor = self._contexts[keep], self.session.executor
        block = np.array([*fed, *answer[:-1]], np.int64)
        cache = executor.new_cache(1, executor.capacity_for(tuple(slots + len(block) for slots in context.slots)))
        executor.continuer().copy(context.cache, context.slots, cache)
        logits = executor.score_block(cache, block, context.slots, len(ids))[len(fed) + first - 1 :]
        expected = np.array(answer[first:], np.int64)
        right = tuple(map(int, logits.argmax(axis=1) == expected))
        return context.kept_tokens, Scored(right, tuple(log_probabilities(logits, expected).tolist()))


def products(names: Collection[str], folder: Path, gguf: Path, recipes: Path) -> dict[str, Product]:
    """Return those of the policies that have engines of their own; missing engines are built in `folder`."""
    made, heads = {}, "--chunkkv_budget_split ranked --chunkkv_heads each"
    for name, kind, flags, scorer in (
        (RANKED, "ranked", "--chunkkv_budget_split ranked", "reread"),
        (RANKED_HEADS, "ranked-heads", heads, "reread"),
        (RANKED_TOKENS, "ranked-tokens", f"{heads} --chunkkv_chunk_size 1 --chunkkv_pooling 1", "reread"),
        (RECIPE, "recipe", f"--chunkkv_recipe {recipes / 'recipe.json'}", "reread"),
        (STATIC, "recipe-static", f"--chunkkv_recipe {recipes / 'recipe-static.json'}", "window"),
        (RECIPE_10, "recipe-10", f"--chunkkv_recipe {recipes / 'recipe-10.json'}", "reread"),
        (READING_24, "recipe-in-prompt", f"--chunkkv_recipe {recipes / 'recipe-in-prompt.json'}", "window"),
    ):
        if name not in names:
            continue
        place = folder / f"engine-{kind}"
        if not (place / "manifest.json").is_file():
            common = f"--checkpoint_dir {gguf} --output_dir {place} --chunkkv --max_seq_len 8192 --log_level error"
            build_engine([*common.split(), *flags.split()])
        made[name] = Product(ChunkKVSession.from_dir(place, threads=1), scorer)
    return made
