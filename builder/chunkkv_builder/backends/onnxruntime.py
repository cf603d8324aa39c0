"""ONNX Runtime: a step graph, a compress graph and one weights file; runs on any machine."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx

from chunkkv.cache_scales import CacheScales
from chunkkv.engine.backends import ONNXRUNTIME
from chunkkv.engine.directory import COMPRESS_FILE, GIVEN_FILE, PREFILL_BLOCKS_FILES, REREAD_FILE, STEP_FILE
from chunkkv.errors import ConfigError
from chunkkv.text.tokenizer import Tokenizer
from chunkkv_builder.backends.graph_build import GraphBuild, plan_graphs
from chunkkv_builder.backends.interface import Built
from chunkkv_builder.checkpoint.interface import Checkpoint
from chunkkv_builder.config import W8A8
from chunkkv_builder.onnx_graph.compress import compress_graph
from chunkkv_builder.onnx_graph.fused_step import FusedStepGraph
from chunkkv_builder.onnx_graph.merged_weights import with_merged_projections
from chunkkv_builder.onnx_graph.packed_weights import packing_report, weight_sources
from chunkkv_builder.onnx_graph.prefill_blocks import PrefillBlocksGraph, stages_of
from chunkkv_builder.onnx_graph.projections import (
    CHANNEL_SCALES_SUFFIX,
    CHANNELS_SUFFIX,
    OFFSETS_SUFFIX,
    PACKED_SUFFIX,
    SCALES_SUFFIX,
)
from chunkkv_builder.onnx_graph.reread import reread_graph
from chunkkv_builder.onnx_graph.rotary_tables import rotary_tables
from chunkkv_builder.onnx_graph.scaled_queries import with_scaled_queries
from chunkkv_builder.onnx_graph.smoothing import SmoothedCheckpoint
from chunkkv_builder.onnx_graph.weights import WeightLocation, WeightSource, overwrite_weights, write_weights
from chunkkv_builder.plan import GraphPlan
from chunkkv_builder.progress import Progress

WEIGHTS_FILE = "weights.safetensors"
HEAD_DIM_STEP = 8  # of GroupQueryAttention


def step_weights(
    checkpoint: Checkpoint,
    precision: str | None,
    positions: int,
    cache_dtype: str = "float32",
    prefill_precision: str | None = None,
) -> list[WeightSource]:
    """Return every tensor of a step graph, and those of its own that `prefill_precision` gives a prompt's blocks.

    Parameters
    ----------
    checkpoint : Checkpoint
        The model.
    precision, prefill_precision : str or None
        As weight_sources takes them.
    positions : int
        Positions that the engine has.
    cache_dtype : str, default "float32"
        Type of the KV cache. Attention over another one would rotate in that type, and gets no tables for it.
    """
    tables = rotary_tables(checkpoint.config, positions) if cache_dtype == "float32" else []
    return [*_merged_sources(checkpoint, precision, prefill_precision), *tables]


def _merged_sources(
    checkpoint: Checkpoint,
    precision: str | None,
    prefill_precision: str | None,
    smoothed: Checkpoint | None = None,
) -> list[WeightSource]:
    """Return weight_sources as FusedStepGraph reads them."""
    sources = weight_sources(checkpoint, precision, prefill_precision, smoothed)
    return with_merged_projections(with_scaled_queries(sources, checkpoint.config))


def compression_graphs(
    plan: GraphPlan, cache_dtype: str = "float32", scales: CacheScales | None = None
) -> dict[str, onnx.ModelProto]:
    """Return the graphs that score, choose and compact, by file name: with attention, and with a second reading."""
    assert plan.settings is not None
    graphs = {COMPRESS_FILE: compress_graph(plan, cache_dtype, scales), REREAD_FILE: reread_graph(plan)}
    if plan.settings.score != "given":
        given = dataclasses.replace(plan, settings=plan.settings.with_score("given"))
        graphs[GIVEN_FILE] = compress_graph(given, cache_dtype, scales)
    return graphs


def prefill_graphs(
    plan: GraphPlan,
    weights: Mapping[str, WeightLocation],
    cache_dtype: str = "float32",
    scales: CacheScales | None = None,
) -> dict[str, onnx.ModelProto]:
    """Return the stages of the graph that appends a prompt's blocks, by file name; PrefillBlocksGraph has the rest."""
    stages = stages_of(plan.model.num_layers)
    return {
        file: PrefillBlocksGraph(plan, weights, layers, cache_dtype, scales).build()
        for file, layers in zip(PREFILL_BLOCKS_FILES, stages, strict=False)  # a small model has fewer stages
    }


class OnnxRuntimeBackend:
    """Builds for ONNX Runtime; satisfies chunkkv_builder.backends.interface.Backend."""

    name = ONNXRUNTIME

    def missing(self, flags: Namespace) -> list[str]:
        """Return what this machine lacks: nothing, the graphs are made with the package onnx alone."""
        return []

    def plan(self, flags: Namespace, progress: Progress) -> GraphBuild:
        """Read the checkpoint and plan the graphs; raises as plan_graphs does."""
        return plan_graphs(flags, self.name, progress)

    def check(self, planned: GraphBuild, progress: Progress) -> None:
        """Raise ConfigError for a model that ONNX Runtime's attention cannot run."""
        head_dim = planned.plan.model.head_dim
        if head_dim % HEAD_DIM_STEP:
            raise ConfigError(
                f"head_dim is {head_dim}; ONNX Runtime's attention takes multiples of {HEAD_DIM_STEP}: "
                f"this model cannot be built for backend {self.name}"
            )

    def build(self, planned: GraphBuild, folder: Path, progress: Progress) -> Built:
        """Write weights, graphs and config.json to `folder`; return the version of onnx."""
        precision = planned.limits.weight_only_precision
        cache_dtype = planned.limits.cache_dtype
        prefill = planned.limits.prefill_precision
        sources = step_weights(planned.checkpoint, precision, planned.limits.max_seq_len, cache_dtype, prefill)
        progress.stage("weights", len(sources))
        stored = write_weights(folder / WEIGHTS_FILE, sources, progress.advance)
        locations = stored if prefill is None else _without_channels(stored)
        for line in packing_report(planned.checkpoint, precision):
            progress.info(line)
        if W8A8 in (precision, prefill):
            _smooth_weights(planned, stored, locations, folder, progress)
        activations = planned.limits.weight_only_activations
        scales = _cache_scales(planned, locations, folder, progress) if cache_dtype == "int8" else None
        graphs = {STEP_FILE: FusedStepGraph(planned.plan, locations, activations, cache_dtype, scales).build()}
        if W8A8 in (precision, prefill):
            graphs |= prefill_graphs(planned.plan, stored, cache_dtype, scales)
        if planned.plan.settings is not None:
            graphs |= compression_graphs(planned.plan, cache_dtype, scales)
        progress.stage("graphs", len(graphs))
        for file, model in graphs.items():
            onnx.save_model(model, folder / file)
            onnx.checker.check_model(str(folder / file))
            progress.advance()
        planned.write_config(folder)
        return Built({"onnx": onnx.__version__})


def _without_channels(locations: Mapping[str, WeightLocation]) -> dict[str, WeightLocation]:
    """Return where the tensors of the step graph lie: without those of a prompt's blocks."""
    only_prefill = (CHANNELS_SUFFIX, CHANNEL_SCALES_SUFFIX)
    return {name: place for name, place in locations.items() if not name.endswith(only_prefill)}


def _smooth_weights(
    planned: GraphBuild,
    stored: Mapping[str, WeightLocation],
    locations: Mapping[str, WeightLocation],
    folder: Path,
    progress: Progress,
) -> None:
    """Run the model, whose weights lie in `folder`, and write those of w8a8 again in their places, evened out.

    `stored` are all tensors, `locations` those of the step graph.
    """
    # Only calibrations take the engine, which is slow to import.
    from chunkkv_builder.backends.input_calibration import calibrated_scales

    limits = planned.limits
    progress.stage("smoothing", 1)
    activations = limits.weight_only_activations
    scales = calibrated_scales(planned.plan, locations, activations, folder, _prompts(planned))
    smoothed = SmoothedCheckpoint(planned.checkpoint, scales)
    precisions = limits.weight_only_precision, limits.prefill_precision
    sources = _merged_sources(planned.checkpoint, *precisions, smoothed)
    packed = (PACKED_SUFFIX, SCALES_SUFFIX, OFFSETS_SUFFIX)
    changed = [source for source in sources if not source.name.endswith(packed)]
    progress.extend(len(changed))
    progress.advance()
    overwrite_weights(folder / WEIGHTS_FILE, stored, changed, progress.advance)


def _cache_scales(
    planned: GraphBuild, locations: Mapping[str, WeightLocation], folder: Path, progress: Progress
) -> CacheScales:
    """Run the model, whose weights lie in `folder`, to see how large its keys and values become."""
    from chunkkv_builder.backends.cache_calibration import calibrate

    progress.stage("KV scales", 1)
    graph = FusedStepGraph(planned.plan, locations, planned.limits.weight_only_activations).build()
    scales = calibrate(graph, folder, planned.plan, _prompts(planned))
    progress.advance()
    return scales


def _prompts(planned: GraphBuild) -> list[np.ndarray]:
    from chunkkv_builder.backends.calibration import calibration_prompts

    tokenizer = None if planned.tokenizer_dir is None else Tokenizer.from_dir(planned.tokenizer_dir)
    return calibration_prompts(tokenizer, planned.plan.model.vocab_size, planned.limits.max_seq_len)
