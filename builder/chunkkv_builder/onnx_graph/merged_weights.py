"""One weight for the projections of query, key and value, which have the same input: one product instead of three."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from chunkkv_builder.onnx_graph.projections import CHANNELS_SUFFIX, OFFSETS_SUFFIX, SCALES_SUFFIX
from chunkkv_builder.onnx_graph.weights import WeightSource

MERGED = "qkv_proj"
_PIECES = ("q_proj", "k_proj", "v_proj")


def with_merged_projections(sources: Sequence[WeightSource]) -> list[WeightSource]:
    """Return `sources` with the weights, scales and biases of each layer's query, key and value put together.

    They are named after MERGED and hold the outputs of query, key and value in this order. Blocks are rounded one by
    one, so the merged weight holds the same numbers as the three.
    """
    pieces: dict[str, dict[str, WeightSource]] = {}
    order: list[WeightSource | str] = []
    for source in sources:
        piece = next((piece for piece in _PIECES if f".self_attn.{piece}." in source.name), None)
        if piece is None:
            order.append(source)
            continue
        merged = source.name.replace(piece, MERGED)
        if merged not in pieces:
            order.append(merged)
        pieces.setdefault(merged, {})[piece] = source
    return [entry if isinstance(entry, WeightSource) else _merged(entry, pieces) for entry in order]


def _merged(name: str, pieces: dict[str, dict[str, WeightSource]]) -> WeightSource:
    given = pieces[name]
    # Blocks of one projection may have offsets where those of another have none.
    scales = pieces.get(name.removesuffix(OFFSETS_SUFFIX) + SCALES_SUFFIX, {})
    loads: list[Callable[[], np.ndarray]] = []
    shapes = []
    for piece in _PIECES:
        if piece in given:
            loads.append(given[piece].load)
            shapes.append(given[piece].shape)
        else:
            shapes.append(scales[piece].shape)
            loads.append(partial(np.zeros, scales[piece].shape, np.float32))
    axis = 1 if name.endswith(CHANNELS_SUFFIX) else 0
    shape = list(shapes[0])
    shape[axis] = sum(piece[axis] for piece in shapes)
    dtype = next(iter(given.values())).dtype
    return WeightSource(name, tuple(shape), dtype, lambda: np.concatenate([load() for load in loads], axis=axis))
