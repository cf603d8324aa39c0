"""Weights whose queries have the scale of attention already.

ONNX Runtime's attention over a float cache is faster for one query where it need not scale the product with the keys:
otherwise it copies them into another order first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from chunkkv_builder.checkpoint.model_config import ModelConfig
from chunkkv_builder.onnx_graph.projections import CHANNELS_SUFFIX, PACKED_SUFFIX
from chunkkv_builder.onnx_graph.weights import WeightSource


def with_scaled_queries(sources: Sequence[WeightSource], model: ModelConfig) -> list[WeightSource]:
    """Return `sources` with the scale of attention in what gives queries their size.

    That is the weight of their norm where the model has one, or else the projection and its bias; of a packed
    projection, its scales and offsets. Where head_dim is 16, 64 or 256 the scale is a power of two and nothing is
    rounded; else each of these numbers is rounded once more, in float32.
    """
    sized_by = ".self_attn.q_norm." if model.qk_norm else ".self_attn.q_proj."
    codes = (PACKED_SUFFIX, CHANNELS_SUFFIX)
    factor = np.float32(model.attention_scale or model.head_dim**-0.5)
    return [
        replace(source, load=partial(_multiplied, source, factor))
        if sized_by in source.name and not source.name.endswith(codes)
        else source
        for source in sources
    ]


def _multiplied(source: WeightSource, factor: np.float32) -> np.ndarray:
    return source.load() * factor
