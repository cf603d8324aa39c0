"""Cosines and sines of all positions, as ONNX Runtime's attention takes them to rotate queries and keys itself."""

from __future__ import annotations

from functools import partial

import numpy as np

from chunkkv_builder.checkpoint.config_keys import GLOBAL, UNROTATED
from chunkkv_builder.checkpoint.model_config import ModelConfig, rope_frequencies
from chunkkv_builder.onnx_graph.weights import WeightSource

# What GroupQueryAttention rotates: heads of a multiple of 16 numbers, of which it turns a multiple of 16.
_STEP = 16


def table_names(kind: str) -> tuple[str, str]:
    """Return the names of the cosines and of the sines for a kind of rotated layer."""
    return f"rope.{kind}_cosines", f"rope.{kind}_sines"


def rotated_kinds(model: ModelConfig) -> list[str]:
    """Return the kinds of rotated layers that a model has."""
    return sorted({*model.rotations} - {UNROTATED}) or [GLOBAL]


def rotary_tables(model: ModelConfig, positions: int) -> list[WeightSource]:
    """Return float32 tables [positions,R/2] for R rotated dimensions; none for heads that must be rotated outside."""
    if model.head_dim % _STEP or model.rotated_dims % _STEP:
        return []
    shape = (positions, model.rotated_dims // 2)
    return [
        WeightSource(name, shape, "float32", partial(_table, model, kind, positions, function))
        for kind in rotated_kinds(model)
        for name, function in zip(table_names(kind), (np.cos, np.sin), strict=True)
    ]


def _table(model: ModelConfig, kind: str, positions: int, function: np.ufunc) -> np.ndarray:
    frequencies, factor = rope_frequencies(model, kind)
    # In float32 from the angles on, as transformers computes them.
    angles = np.arange(positions, dtype=np.float32)[:, None] * np.asarray(frequencies, np.float32)
    table: np.ndarray = function(angles) * np.float32(factor)
    return table
