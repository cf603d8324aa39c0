"""Engines for ONNX Runtime whose heads keep unequal numbers of tokens, made from settings instead of flags."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import onnx

from chunkkv.engine.directory import STEP_FILE
from chunkkv.executors.onnxruntime.executor import OnnxRuntimeExecutor
from chunkkv.requests import Limits
from chunkkv.session import ChunkKVSession
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.backends.onnxruntime import WEIGHTS_FILE, compression_graphs, step_weights
from chunkkv_builder.checkpoint.hugging_face import HuggingFaceCheckpoint
from chunkkv_builder.onnx_graph.fused_step import FusedStepGraph
from chunkkv_builder.onnx_graph.packed_weights import weight_sources
from chunkkv_builder.onnx_graph.transformer import StepGraph
from chunkkv_builder.onnx_graph.weights import WeightLocation, write_weights
from chunkkv_builder.plan import GraphPlan, make_plan
from support import engines

VARIANT, LAYERS, KV_HEADS = "llama_tied", 3, 3
SIZES = {"num_attention_heads": 6, "num_key_value_heads": KV_HEADS, "hidden_size": 96}
READING = ((0, 2), (), (1,))  # a layer of both classes with a gap, a layer of one class, a layer of both
SMALL: dict[str, Any] = {"window": 4, "chunk_size": 3, "sinks": 2, "min_tokens": 10, "keep_per_10k": 4_000}
CLASSES: dict[str, Any] = {
    "budget_split": "classes",
    "num_kv_heads": KV_HEADS,
    "reading_heads": READING,
    "reading_share_per_10k": 18_000,
    "local_share_per_10k": 6_000,
}
RANKED_HEADS: dict[str, Any] = {"budget_split": "ranked", "heads": "each", "num_kv_heads": KV_HEADS}
BLOCK = 16  # of prefill
LIMITS = Limits(max_batch_size=4, max_input_len=192, max_seq_len=256, vocab_size=384)
_FOLDER = tempfile.TemporaryDirectory(prefix="chunkkv-test-classes-")  # kept until the process ends


def settings_of(**changes: Any) -> ChunkKVSettings:
    """Return small settings with every layer in a group of its own and `changes`."""
    groups = tuple((layer,) for layer in range(LAYERS))
    return ChunkKVSettings(**{**SMALL, "layer_groups": groups, **changes})


def checkpoint(variant: str = VARIANT) -> Path:
    """Return the directory of the checkpoint that engines here are made from."""
    return engines.checkpoint_dir(variant, **SIZES)


@cache
def _weights(variant: str, attention: str) -> tuple[Path, dict[str, WeightLocation]]:
    folder = Path(tempfile.mkdtemp(dir=_FOLDER.name))
    opened = HuggingFaceCheckpoint.open(checkpoint(variant))
    fused = attention == "fused"
    sources = step_weights(opened, None, LIMITS.max_seq_len) if fused else weight_sources(opened, None)
    return folder, write_weights(folder / WEIGHTS_FILE, sources)


def plan_of(settings: ChunkKVSettings | None, variant: str = VARIANT) -> GraphPlan:
    """Return the plan of an engine with `settings`."""
    return make_plan(HuggingFaceCheckpoint.open(checkpoint(variant)).config, settings)


@cache
def session(settings: ChunkKVSettings | None, attention: str = "fused", variant: str = VARIANT) -> ChunkKVSession:
    """Return a session on an engine with `settings`, which has no tokenizer.

    Its step graph is ONNX Runtime's own where `attention` is "fused", and that of other engines for "standard".
    """
    weights, locations = _weights(variant, attention)
    folder = Path(tempfile.mkdtemp(dir=_FOLDER.name))
    (folder / WEIGHTS_FILE).hardlink_to(weights / WEIGHTS_FILE)
    plan = plan_of(settings, variant)
    graph = FusedStepGraph(plan, locations) if attention == "fused" else StepGraph(plan, locations)
    onnx.save_model(graph.build(), folder / STEP_FILE)
    if settings is not None:
        for name, graph in compression_graphs(plan).items():
            onnx.save_model(graph, folder / name)
    executor = OnnxRuntimeExecutor(folder, BLOCK, settings, threads=1)
    return ChunkKVSession(executor, settings, LIMITS)
