"""ONNX Runtime: a step graph, a compress graph and one weights file; runs on any machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from chunkkv.errors import ConfigError
from chunkkv_builder.checkpoint import Checkpoint
from chunkkv_builder.config import BuildConfig
from chunkkv_builder.model_config import ModelConfig
from chunkkv_builder.onnx_graph import quantize
from chunkkv_builder.onnx_graph.compress import compress_graph
from chunkkv_builder.onnx_graph.transformer import PACKED_SUFFIX, SCALES_SUFFIX, StepGraph
from chunkkv_builder.onnx_graph.weights import WeightSource, write_weights
from chunkkv_builder.plan import Plan
from chunkkv_builder.progress import Progress

WEIGHTS_FILE = "weights.safetensors"
STEP_FILE = "step.onnx"
COMPRESS_FILE = "compress.onnx"


def build(checkpoint: Checkpoint, plan: Plan, build: BuildConfig, out_dir: Path, progress: Progress) -> dict[str, str]:
    """Write the engine's graphs and weights to `out_dir`; return the versions that made them.

    Raises ConfigError for a type other than float32, or blocks shorter than the observation window.
    """
    if build.dtype != "float32":
        raise ConfigError(
            f"dtype is {build.dtype!r}; ONNX Runtime on the CPU computes in float32: give --dtype float32, "
            "or --use_weight_only --weight_only_precision int8 or int4 for smaller weights"
        )
    if plan.settings is not None and build.max_num_tokens < plan.settings.window:
        raise ConfigError(
            f"max_num_tokens is {build.max_num_tokens}, below the observation window {plan.settings.window}: "
            "the last prefill block must hold the whole window, raise --max_num_tokens or lower --chunkkv_window"
        )
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


@dataclass(frozen=True)
class _Linear:
    """A projection of the checkpoint: name, shape [out,in], whether it has a bias."""

    name: str
    shape: tuple[int, int]
    bias: bool = False


def weight_sources(checkpoint: Checkpoint, weight_only_precision: str | None = None) -> list[WeightSource]:
    """Return every tensor of the engine in layer order; projections are packed where a precision is given.

    The embedding table, norms and biases always stay float32.
    """
    model = checkpoint.config
    sources = [_float32(checkpoint, "model.embed_tokens.weight")]
    for index in range(model.num_layers):
        prefix = f"model.layers.{index}"
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += ["self_attn.q_norm", "self_attn.k_norm"] if model.qk_norm else []
        sources += [_float32(checkpoint, f"{prefix}.{norm}.weight") for norm in norms]
        for linear in _layer_projections(model, prefix):
            sources += _projection(checkpoint, linear, weight_only_precision)
    sources.append(_float32(checkpoint, "model.norm.weight"))
    head = _Linear("lm_head", (model.vocab_size, model.hidden_size))
    if not model.tie_word_embeddings:
        sources += _projection(checkpoint, head, weight_only_precision)
    return sources


def _layer_projections(model: ModelConfig, prefix: str) -> list[_Linear]:
    hidden, inner = model.hidden_size, model.intermediate_size
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    return [
        _Linear(f"{attention}.q_proj", (queries, hidden), model.attention_bias),
        _Linear(f"{attention}.k_proj", (keys, hidden), model.attention_bias),
        _Linear(f"{attention}.v_proj", (keys, hidden), model.attention_bias),
        _Linear(f"{attention}.o_proj", (hidden, queries), model.attention_out_bias),
        _Linear(f"{mlp}.gate_proj", (inner, hidden), model.mlp_bias),
        _Linear(f"{mlp}.up_proj", (inner, hidden), model.mlp_bias),
        _Linear(f"{mlp}.down_proj", (hidden, inner), model.mlp_bias),
    ]


def _float32(checkpoint: Checkpoint, name: str) -> WeightSource:
    return WeightSource(
        name,
        tuple(checkpoint.shape(name)),
        "float32",
        lambda: np.asarray(checkpoint.tensor(name), dtype=np.float32),
    )


def _projection(checkpoint: Checkpoint, linear: _Linear, precision: str | None) -> list[WeightSource]:
    weight = f"{linear.name}.weight"
    bias = [_float32(checkpoint, f"{linear.name}.bias")] if linear.bias else []
    if precision is None:
        return [_float32(checkpoint, weight), *bias]
    bits = quantize.BITS[precision]
    packed_shape, scale_shape = quantize.packed_shapes(*linear.shape, bits)
    pair = _OncePerPart(lambda: quantize.quantize(np.asarray(checkpoint.tensor(weight), dtype=np.float32), bits))
    return [
        WeightSource(weight + PACKED_SUFFIX, packed_shape, "uint8", lambda: pair.take(0)),
        WeightSource(weight + SCALES_SUFFIX, scale_shape, "float32", lambda: pair.take(1)),
        *bias,
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
