"""Runs a step graph over a text and over tokens at random while an engine is built, to see how large numbers are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from chunkkv.text.tokenizer import Tokenizer
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


def run_prompts(
    graph: onnx.ModelProto, folder: Path, plan: GraphPlan, prompts: Sequence[np.ndarray], outputs: Sequence[str]
) -> Iterator[dict[str, np.ndarray]]:
    """Yield what a step graph gives for each prompt as one block at the start of a cache, by the output's name.

    Parameters
    ----------
    graph : onnx.ModelProto
        A step graph with a cache in float32.
    folder : Path
        Where its weights lie. The graph is written there while it is needed.
    plan : GraphPlan
        What the graph was made from.
    prompts : sequence of numpy.ndarray
        Token ids [L] int64.
    outputs : sequence of str
        Names of the outputs.
    """
    file = folder / _GRAPH_FILE
    onnx.save_model(graph, file)
    try:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.x64quantprecision", "1")  # exact on every processor
        session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        inputs = {value.name for value in session.get_inputs()}
        for ids in prompts:
            feeds = {name: array for name, array in _feeds(plan, ids).items() if name in inputs}
            yield dict(zip(outputs, session.run(outputs, feeds), strict=True))
    finally:
        file.unlink()


def _feeds(plan: GraphPlan, ids: np.ndarray) -> dict[str, np.ndarray]:
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
    return feeds
