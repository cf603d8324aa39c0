"""Finds the scales of a KV cache of 8 bits: how large its keys and values become on a text and on tokens at random.

The engine's own graph runs once with a cache in float32, while the engine is built.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from chunkkv.cache_scales import CacheScales
from chunkkv.text.tokenizer import Tokenizer
from chunkkv_builder.checkpoint.config_keys import UNROTATED
from chunkkv_builder.checkpoint.model_config import ModelConfig
from chunkkv_builder.onnx_graph.eight_bit_cache import KINDS
from chunkkv_builder.plan import GraphPlan

TEXT = "evaluation/texts/excerpts/speech.txt"  # of the package chunkkv: prose with figures
TOKENS = 512  # of the text, and as many at random
_LETTERS = 8 * TOKENS  # of the text that are tokenized: more than any tokenizer needs
_GRAPH_FILE = "calibration.onnx"


def calibration_prompts(tokenizer: Tokenizer | None, vocab_size: int, longest: int) -> list[np.ndarray]:
    """Return what the graph reads, token ids [L] int64 of at most `longest` tokens: the text, and tokens at random.

    Without a tokenizer there is no text. Tokens at random reach words that no text of this length has.
    """
    count = min(TOKENS, longest)
    prompts = [np.random.default_rng(0).integers(0, vocab_size, count)]
    if tokenizer is not None:
        text = resources.files("chunkkv").joinpath(TEXT).read_text(encoding="utf-8")[:_LETTERS]
        ids = np.array(tokenizer.encode(text)[:count], np.int64)
        prompts.append(ids[ids < vocab_size])
    return prompts


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
    file = folder / _GRAPH_FILE
    onnx.save_model(graph, file)
    try:
        largest = _largest(file, plan, prompts)
    finally:
        file.unlink()
    keys, values = ([largest[f"present_{kind}.{part.number}"] for part in plan.parts] for kind in KINDS)
    return CacheScales.for_largest(keys, values)


def _largest(file: Path, plan: GraphPlan, prompts: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Return what the channels [H,D] of every cache reach, by the name of the graph's output."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")  # exact on every processor
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    inputs = {value.name for value in session.get_inputs()}
    outputs = [(kind, part, f"present_{kind}.{part.number}") for part in plan.parts for kind in KINDS]
    largest: dict[str, np.ndarray] = {}
    for ids in prompts:
        feeds: dict[str, np.ndarray] = {
            "input_ids": ids[None],
            "position_ids": np.arange(len(ids))[None],
            "cache_lengths": np.zeros((plan.layout.length_classes, 1), np.int32),
            "logit_indices": np.zeros((1, 1), np.int64),
            "query_count": np.zeros(1, np.int64),
        }
        for part in plan.parts:
            empty = np.zeros((1, len(part.kv_heads), len(ids), plan.model.head_dim), np.float32)
            feeds |= {f"past_{kind}.{part.number}": empty for kind in KINDS}
        caches = session.run(
            [name for *_, name in outputs], {name: array for name, array in feeds.items() if name in inputs}
        )
        for (kind, part, name), cache in zip(outputs, caches, strict=True):
            held = cache[0] if kind == "value" else _lengths_of_pairs(plan.model, part.layer, cache[0])
            largest[name] = np.maximum(largest.get(name, 0), np.abs(held).max(axis=1))
    return largest


def _lengths_of_pairs(model: ModelConfig, layer: int, keys: np.ndarray) -> np.ndarray:
    """Return keys [H,S,D] with the length of its pair in place of every number that is rotated.

    A rotation turns pairs and keeps their lengths, so what is found at some positions holds at all of them.
    """
    if model.rotations and model.rotations[layer] == UNROTATED:
        return keys
    half = model.rotated_dims // 2
    lengths = np.hypot(keys[..., :half], keys[..., half : 2 * half])
    return np.concatenate([lengths, lengths, keys[..., 2 * half :]], axis=-1)
