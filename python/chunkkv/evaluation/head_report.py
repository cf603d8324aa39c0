"""What a search for reading heads says of itself: how long it takes, a picture of the demand, and its measurements."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from chunkkv.evaluation.head_search import BUDGET_SHARES, HeadSearchResult, MeasuredHeads
from chunkkv.evaluation.run_time import duration
from chunkkv.evaluation.texts.calibration_texts import CalibrationPrompt
from chunkkv.limits import KEEP_SCALE
from chunkkv.session import ChunkKVSession

_SHADES = " ·░▒▓█"
_PROBE_TOKENS = 256
_READINGS = 3.0  # what a prompt that is read again takes, in prefills
_CANDIDATES = 3 + 2 * len(BUDGET_SHARES)


def estimate_text(session: ChunkKVSession, prompts: Sequence[CalibrationPrompt], found_on: int) -> str:
    """Return how many prompts will be run and about how long that takes; a short prefill is timed."""
    prefiller = session.executor.blockwise_prefiller()
    probe = min(_PROBE_TOKENS, session.limits.max_input_len)
    cache, ids = prefiller.new_cache(1, probe), np.array(prompts[0].ids[:probe], np.int64)
    start = time.monotonic()
    prefiller.fill(ids, cache, threading.Event())
    per_token = (time.monotonic() - start) / len(ids)
    read = sum(len(prompt.ids) for prompt in prompts) * _READINGS
    asked = sum(len(task.question) + len(task.answer) for prompt in prompts[found_on:] for task in prompt.tasks)
    seconds = per_token * (read + 2 * _CANDIDATES * asked)
    return (
        f"calibrate: {found_on} prompts to find heads, {len(prompts) - found_on} to measure: about {duration(seconds)}"
    )


def demand_picture(result: HeadSearchResult) -> str:
    """Return the demand of every head as text: a line per KV head, a column per layer."""
    layers, heads = result.demand.shape
    settings = result.chosen.candidate.settings
    reading = settings.reading_heads if settings is not None else ()
    tens = "".join(str(layer // 10) if layer % 10 == 0 else " " for layer in range(layers))
    lines = [
        f"demand by layer and KV head, keep {result.keep_per_10k / KEEP_SCALE * 100:g} % in total; "
        f"{_SHADES[1]} some, {_SHADES[-1]} all of its tokens, R: proposed as reading head",
        f"layer  {tens}",
        "       " + "".join(str(layer % 10) for layer in range(layers)),
    ]
    for head in range(heads):
        shades = [_SHADES[min(int(np.ceil(share * 5)), 5)] for share in result.demand[:, head]]
        marks = ["R" if reading and head in reading[layer] else shade for layer, shade in enumerate(shades)]
        lines += [f"head {head:<2}" + "".join(shades), "       " + "".join(m if m == "R" else " " for m in marks)]
    return "\n".join(lines)


def measurements(
    result: HeadSearchResult, chosen: MeasuredHeads, texts: Sequence[str], length: int, seed: int, chat: bool
) -> dict[str, Any]:
    """Return as JSON values what a recipe says of how its heads were found.

    Parameters
    ----------
    result : HeadSearchResult
        The search.
    chosen : MeasuredHeads
        The proposal that the recipe has.
    texts : sequence of str
        The kinds of text that prompts were cut from.
    length : int
        Most tokens of a prompt.
    seed : int
        Seed of the prompts.
    chat : bool
        Whether they were in the chat template.
    """
    return {
        "texts": list(texts),
        "length": length,
        "seed": seed,
        "chat": chat,
        "found_on_prompts": len(result.per_prompt),
        "heads_found_by_every_prompt": result.agreement(),
        "prompts": len(chosen.right),
        "keep_ratio": result.keep_per_10k / KEEP_SCALE,
        "asked": "after compression",
        "chosen": chosen.candidate.name,
        "rows": result.rows(),
        "demand": result.demand.round(3).tolist(),
    }
