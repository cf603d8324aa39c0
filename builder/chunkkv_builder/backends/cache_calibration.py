"""Finds the scales of a KV cache of 8 bits: how large its keys and values become on a text and on tokens at random.

The engine's own graph runs once with a cache in float32, while the engine is built.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from chunkkv.cache_scales import CacheScales
from chunkkv_builder.backends.calibration import run_prompts
from chunkkv_builder.checkpoint.config_keys import UNROTATED
from chunkkv_builder.checkpoint.model_config import ModelConfig
from chunkkv_builder.onnx_graph.eight_bit_cache import KINDS
from chunkkv_builder.plan import GraphPlan


def calibrate(graph: onnx.ModelProto, folder: Path, plan: GraphPlan, prompts: list[np.ndarray]) -> CacheScales:
    """Return the scales with which 8 bits hold the keys and values of the prompts.

    Parameters
    ----------
    graph : onnx.ModelProto
        The step graph with a cache in float32.
    folder : Path
        Where its weights lie. The graph is written there while it is needed.
    plan : GraphPlan
        What the graph was made from.
    prompts : list of numpy.ndarray
        Token ids [L] int64.
    """
    outputs = [(kind, part, f"present_{kind}.{part.number}") for part in plan.parts for kind in KINDS]
    largest: dict[str, np.ndarray] = {}
    for caches in run_prompts(graph, folder, plan, prompts, [name for *_, name in outputs]):
        for kind, part, name in outputs:
            cache = caches[name][0]
            held = cache if kind == "value" else _lengths_of_pairs(plan.model, part.layer, cache)
            largest[name] = np.maximum(largest.get(name, 0), np.abs(held).max(axis=1))
    keys, values = ([largest[f"present_{kind}.{part.number}"] for part in plan.parts] for kind in KINDS)
    return CacheScales.for_largest(keys, values)


def _lengths_of_pairs(model: ModelConfig, layer: int, keys: np.ndarray) -> np.ndarray:
    """Return keys [H,S,D] with the length of its pair in place of every number that is rotated.

    A rotation turns pairs and keeps their lengths, so what is found at some positions holds at all of them.
    """
    if model.rotations and model.rotations[layer] == UNROTATED:
        return keys
    half = model.rotated_dims // 2
    lengths = np.hypot(keys[..., :half], keys[..., half : 2 * half])
    return np.concatenate([lengths, lengths, keys[..., 2 * half :]], axis=-1)
