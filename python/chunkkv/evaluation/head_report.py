"""What a search for reading heads says of itself: how long it takes, a picture of the demand, and its measurements."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from chunkkv.evaluation.head_search import HeadSearchResult
from chunkkv.evaluation.measured_heads import MeasuredHeads
from chunkkv.evaluation.run_time import READINGS, duration
from chunkkv.evaluation.settings_search import group_fields
from chunkkv.evaluation.texts.calibration_texts import CalibrationPrompt
from chunkkv.limits import KEEP_SCALE
from chunkkv.session import ChunkKVSession

_SHADES = " ·░▒▓█"
_PROBE_TOKENS = 256
# As measured on SmolLM2, in prefills and in tokens of a prefill.
_SMALL, _CHOSEN = 2.0, 7.0  # a token of a small block, and one of an answer with the choice of tokens before it
_IN_PROMPT, _AFTER = 14, 10  # about how many candidates are asked


def estimate_text(
    session: ChunkKVSession, prompts: Sequence[CalibrationPrompt], found_on: int, asked_later: bool = True
) -> str:
    """Return how many prompts will be run and about how long that takes; a short prefill is timed."""
    prefiller = session.executor.blockwise_prefiller()
    probe = min(_PROBE_TOKENS, session.limits.max_input_len)
    cache, ids = prefiller.new_cache(1, probe), np.array(prompts[0].ids[:probe], np.int64)
    start = time.monotonic()
    prefiller.fill(ids, cache, threading.Event())
    per_token = (time.monotonic() - start) / len(ids)
    tasks = [task for prompt in prompts[found_on:] for task in prompt.tasks]
    questions, answers = (sum(len(getattr(task, part)) for task in tasks) for part in ("question", "answer"))
    first, others = (sum(len(prompt.ids) for prompt in some) for some in (prompts[:found_on], prompts[found_on:]))
    tokens = READINGS * first + others + _SMALL * questions + _CHOSEN * _IN_PROMPT * answers
    if asked_later:
        tokens += READINGS * others + _SMALL * _AFTER * (questions + answers)
    seconds = per_token * tokens
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


def decisions(result: HeadSearchResult) -> list[str]:
    """Return what the command says of its tables.

    A sentence on the settings and one on the layer groups that the question in the prompt speaks for; and one on a
    ranking of all heads, where it answers later questions better than the proposal does.
    """
    engine, tried = result.in_prompt[1], result.in_prompt[2:]
    uniform = [one for one in tried if _budget_split(one) == "uniform"]
    grouped = [one for one in uniform if group_fields(one.candidate)]
    changed = [one for one in uniform if one not in grouped]
    sentences = []
    if result.taken is not engine:
        sentences.append(f"settings: {result.taken.candidate.name}, {_points(result.taken, engine)}")
    elif changed:
        sentences.append(
            "settings: the engine's, because no other is better with 95 % confidence; nearest is "
            f"{_best(changed, engine)}"
        )
    if grouped:
        sentences.append(
            f"layer groups: none, every layer chooses for itself; groups would change least with "
            f"{_best(grouped, engine)}"
        )
    if (ranking := result.without_recipe()) is not None and (form := ranking.candidate.settings) is not None:
        flags = "--chunkkv_budget_split ranked --chunkkv_heads each"
        flags += f" --chunkkv_chunk_size {form.chunk_size} --chunkkv_pooling {form.pooling}"
        sentences.append(
            f"without a recipe: {ranking.candidate.name} by a second reading, {_points(ranking, result.chosen)} beside "
            f"the proposal; build with {flags}"
        )
    return sentences


def _budget_split(one: MeasuredHeads) -> str:
    return "" if one.candidate.settings is None else one.candidate.settings.budget_split


def _best(measured: Sequence[MeasuredHeads], base: MeasuredHeads) -> str:
    best = max(measured, key=lambda one: one.gain(base)[0])
    return f"{best.candidate.name}, {_points(best, base)}"


def _points(one: MeasuredHeads, base: MeasuredHeads) -> str:
    row = one.row(base)
    gain, low, high = (f"{100 * row[name]:+.1f}" for name in ("gain", "low", "high"))
    return f"{gain} ({low} to {high}) points"


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
        "asked": "in the prompt" if result.measured is result.in_prompt else "after compression",
        "chosen": chosen.candidate.name,
        "settings": result.taken.candidate.name,
        **({} if result.measured is result.in_prompt else {"rows": result.rows()}),
        "rows_in_prompt": result.rows_in_prompt(),
        "demand": result.demand.round(3).tolist(),
    }
