"""ONNX Runtime: a step graph, a compress graph and one weights file; runs on any machine."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx

from chunkkv.engine.backends import ONNXRUNTIME
from chunkkv.engine.directory import COMPRESS_FILE, STEP_FILE
from chunkkv.errors import ConfigError
from chunkkv_builder.backends.graph_build import GraphBuild, plan_graphs
from chunkkv_builder.backends.interface import Built
from chunkkv_builder.checkpoint.interface import Checkpoint
from chunkkv_builder.onnx_graph import quantize
from chunkkv_builder.onnx_graph.compress import compress_graph
from chunkkv_builder.onnx_graph.transformer import PACKED_SUFFIX, SCALES_SUFFIX, StepGraph
from chunkkv_builder.onnx_graph.weights import WeightSource, write_weights
from chunkkv_builder.progress import Progress

WEIGHTS_FILE = "weights.safetensors"
HEAD_DIM_STEP = 8  # of GroupQueryAttention


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
        sources = weight_sources(planned.checkpoint, planned.limits.weight_only_precision)
        progress.stage("weights", len(sources))
        locations = write_weights(folder / WEIGHTS_FILE, sources, progress.advance)
        graphs = {STEP_FILE: StepGraph(planned.plan, locations).build()}
        if planned.plan.settings is not None:
            graphs[COMPRESS_FILE] = compress_graph(planned.plan)
        progress.stage("graphs", len(graphs))
        for file, model in graphs.items():
            onnx.save_model(model, folder / file)
            onnx.checker.check_model(str(folder / file))
            progress.advance()
        planned.write_config(folder)
        return Built({"onnx": onnx.__version__})


def weight_sources(checkpoint: Checkpoint, weight_only_precision: str | None = None) -> list[WeightSource]:
    """Return every tensor of the engine, in layer order.

    Parameters
    ----------
    checkpoint : Checkpoint
        Where the tensors come from.
    weight_only_precision : str or None, default None
        "int8" or "int4" packs the projections; None keeps them float32. The embedding table, norms and biases always
        stay float32.
    """
    sources = []
    for name in checkpoint.names():
        if weight_only_precision and name.endswith(("_proj.weight", "lm_head.weight")):
            sources += _packed(checkpoint, name, quantize.BITS[weight_only_precision])
        else:
            sources.append(WeightSource(name, checkpoint.shape(name), "float32", partial(_float32, checkpoint, name)))
    return sources


def _float32(checkpoint: Checkpoint, name: str) -> np.ndarray:
    return checkpoint.converted(name, "float32")


def _packed(checkpoint: Checkpoint, name: str, bits: int) -> list[WeightSource]:
    out_features, in_features = checkpoint.shape(name)
    packed_shape, scale_shape = quantize.packed_shapes(out_features, in_features, bits)
    pair = _OncePerPart(lambda: quantize.quantize(_float32(checkpoint, name), bits))
    return [
        WeightSource(name + PACKED_SUFFIX, packed_shape, "uint8", partial(pair.take, 0)),
        WeightSource(name + SCALES_SUFFIX, scale_shape, "float32", partial(pair.take, 1)),
    ]


class _OncePerPart:
    """Computes a pair once and hands out each half once, so that only one tensor is alive at a time."""

    def __init__(self, compute: Callable[[], tuple[np.ndarray, np.ndarray]]) -> None:
        self._compute = compute
        self._parts: dict[int, np.ndarray] = {}

    def take(self, part: int) -> np.ndarray:
        if part not in self._parts:
            self._parts = dict(enumerate(self._compute()))
        return self._parts.pop(part)
