"""Settings and layer groups that calibration tries where the question is in the prompt, and which of them it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from chunkkv.engine.layer_groups import layer_groups
from chunkkv.evaluation.measured_heads import HeadCandidate, MeasuredHeads
from chunkkv.evaluation.recipe_search import layer_reuse_text
from chunkkv.settings import ChunkKVSettings

_TRIED: dict[str, tuple[Any, ...]] = {
    "window": (8, 16, 32),
    "chunk_size": (10, 20, 32),
    "boundaries": ("delimiter", "fixed"),
    "head_reduce": ("max", "mean"),
}
_LARGEST_GROUP = 4  # layers
_FEWEST_PROMPTS = 6  # of which an interval says anything


def variations(engine: ChunkKVSettings) -> list[HeadCandidate]:
    """Return the engine's settings with one of them changed; no window is larger than its own, which it observed."""
    found = []
    for name, values in _TRIED.items():
        for value in values:
            if value == getattr(engine, name) or (name == "window" and value > engine.window):
                continue
            changed = {name: value} if name != "head_reduce" or engine.score == "softmax" else None
            if changed is None:
                continue
            sizes = {**{size: getattr(engine, size) for size in ("window", "sinks", "chunk_size")}, **changed}
            least = sizes["window"] + sizes["sinks"] + sizes["chunk_size"]
            settings = dataclasses.replace(engine, **changed, min_tokens=max(engine.min_tokens, least))
            found.append(HeadCandidate(f"{name} {value}", settings))
    return found


def groupings(engine: ChunkKVSettings, demand: np.ndarray, keep_per_10k: int) -> list[HeadCandidate]:
    """Return the engine's settings with layers that share one choice, and one leader for each group.

    Pairs are led by their first layer, or by the one that reads: that of the largest demand [layers,H]. Or only layers
    share in which no head wants more than the average share, up to four of them in a row.
    """
    wanted, layers = demand.max(axis=1), len(demand)
    if layers < 2:
        return []
    pairs, quiet = layer_groups(layers, 2), _quiet_groups(wanted <= keep_per_10k / 10_000)
    found = [HeadCandidate("pairs of layers, the first leads", _grouped(engine, pairs, np.arange(layers, 0, -1)))]
    found.append(HeadCandidate("pairs of layers, the one that reads leads", _grouped(engine, pairs, wanted)))
    if len(quiet) < layers:
        name = f"layers that read little share, {len(quiet)} choices for {layers} layers"
        found.append(HeadCandidate(name, _grouped(engine, quiet, wanted)))
    return found


def group_fields(candidate: HeadCandidate) -> dict[str, Any]:
    """Return as JSON values what a recipe needs for the groups of a candidate; nothing without groups."""
    settings = candidate.settings
    if settings is None or all(len(group) == 1 for group in settings.layer_groups):
        return {}
    return {"layer_reuse": layer_reuse_text(settings.layer_groups), "leaders": list(settings.leaders)}


def better(engine: MeasuredHeads, tried: Sequence[MeasuredHeads]) -> MeasuredHeads:
    """Return the settings to take: the engine's own unless others are better with 95 % confidence, then the best.

    On fewer than six prompts nothing is sure.
    """
    sure = [one for one in tried if len(one.right) >= _FEWEST_PROMPTS and one.gain(engine)[1] > 0]
    return max(sure, key=lambda one: float(np.mean(one.right)), default=engine)


def _grouped(engine: ChunkKVSettings, groups: tuple[tuple[int, ...], ...], rank: np.ndarray) -> ChunkKVSettings:
    leaders = tuple(max(group, key=lambda layer: (rank[layer], -layer)) for group in groups)
    return dataclasses.replace(engine, layer_groups=groups, leaders=leaders)


def _quiet_groups(is_quiet: np.ndarray) -> tuple[tuple[int, ...], ...]:
    groups: list[list[int]] = []
    for layer, quiet in enumerate(is_quiet):
        joins = quiet and groups and is_quiet[groups[-1][-1]] and len(groups[-1]) < _LARGEST_GROUP
        if joins:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return tuple(map(tuple, groups))
