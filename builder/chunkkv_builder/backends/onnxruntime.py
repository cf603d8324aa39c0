"""ONNX Runtime: a step graph, a compress graph and one weights file; runs on any machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx

from chunkkv.engine.directory import COMPRESS_FILE, STEP_FILE
from chunkkv.errors import ConfigError
from chunkkv_builder.checkpoint.hugging_face import Checkpoint
from chunkkv_builder.config import BuildConfig
from chunkkv_builder.onnx_graph import quantize
from chunkkv_builder.onnx_graph.compress import compress_graph
from chunkkv_builder.onnx_graph.transformer import PACKED_SUFFIX, SCALES_SUFFIX, StepGraph
from chunkkv_builder.onnx_graph.weights import WeightSource, write_weights
from chunkkv_builder.plan import Plan
from chunkkv_builder.progress import Progress

WEIGHTS_FILE = "weights.safetensors"
HEAD_DIM_STEP = 8


def missing(chunkkv: bool) -> list[str]:
    """Return what this machine lacks for building: nothing."""
    return []


def check(plan: Plan) -> None:
    """Raise ConfigError for a model that ONNX Runtime's attention cannot run."""
    if plan.model.head_dim % HEAD_DIM_STEP:
        raise ConfigError(
            f"head_dim is {plan.model.head_dim}; ONNX Runtime's attention takes multiples of {HEAD_DIM_STEP}: "
            "this model cannot be built for backend onnxruntime"
        )


def build(checkpoint: Checkpoint, plan: Plan, build: BuildConfig, out_dir: Path, progress: Progress) -> dict[str, str]:
    """Write the engine's graphs and weights to `out_dir`; return the versions that made them."""
    sources = weight_sources(checkpoint, build.weight_only_precision)
    progress.stage("weights", len(sources))
    locations = write_weights(out_dir / WEIGHTS_FILE, sources, progress.advance)
    graphs = {STEP_FILE: StepGraph(plan, locations).build()}
    if plan.settings is not None:
        graphs[COMPRESS_FILE] = compress_graph(plan)
    progress.stage("graphs", len(graphs))
    for name, model in graphs.items():
        onnx.save_model(model, out_dir / name)
        onnx.checker.check_model(str(out_dir / name))
        progress.advance()
    return {"onnx": onnx.__version__}


def weight_sources(checkpoint: Checkpoint, weight_only_precision: str | None = None) -> list[WeightSource]:
    """Return every tensor of the engine in layer order; projections are packed where a precision is given.

    The embedding table, norms and biases always stay float32.
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
