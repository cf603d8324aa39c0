"""Which tensors of a checkpoint an engine for ONNX Runtime stores, and in which form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np

from chunkkv_builder.checkpoint.blocks import StoredBlocks
from chunkkv_builder.checkpoint.interface import Checkpoint
from chunkkv_builder.checkpoint.model_config import DTYPES
from chunkkv_builder.onnx_graph import quantize
from chunkkv_builder.onnx_graph.projections import (
    CHANNEL_SCALES_SUFFIX,
    CHANNELS_SUFFIX,
    OFFSETS_SUFFIX,
    PACKED_SUFFIX,
    SCALES_SUFFIX,
)
from chunkkv_builder.onnx_graph.smoothing import SMOOTHED_SUFFIX, shared_inputs
from chunkkv_builder.onnx_graph.weights import WeightSource

_PROJECTIONS = "_proj.weight"
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
_Parts = tuple[np.ndarray, ...]


def weight_sources(
    checkpoint: Checkpoint,
    weight_only_precision: str | None = None,
    prefill_precision: str | None = None,
    smoothed: Checkpoint | None = None,
) -> list[WeightSource]:
    """Return every tensor of the engine, in layer order.

    Parameters
    ----------
    checkpoint : Checkpoint
        Where the tensors come from.
    weight_only_precision : str or None, default None
        "int8" or "int4" packs the projections, the embedding table and the head; None keeps them float32. Blocks that
        the checkpoint has already are packed as they are. "w8a8" rounds the projections to 8 bits with a scale for each
        output, and packs the table and the head. Norms and biases always stay float32.
    prefill_precision : str or None, default None
        "w8a8" stores the projections a second time, as "w8a8" does, for the blocks of a prompt. What scales their
        inputs is stored a second time, too, with SMOOTHED_SUFFIX.
    smoothed : Checkpoint or None, default None
        The same model, from which "w8a8" takes its tensors: a SmoothedCheckpoint; None for `checkpoint` as it is.
    """
    sources = []
    smoothed = smoothed or checkpoint
    given = smoothed if weight_only_precision == quantize.W8A8 else checkpoint
    scaling = {name for shared in shared_inputs(checkpoint.config) for name in shared.divided}
    for name in checkpoint.names():
        if (bits := packed_bits(given, name, weight_only_precision)) is not None:
            sources += _packed(given, name, bits)
        elif weight_only_precision == quantize.W8A8 and name.endswith(_PROJECTIONS):
            sources += _by_channel(given, name)
        else:
            sources.append(_float_source(given, name))
        if prefill_precision == quantize.W8A8 and name.endswith(_PROJECTIONS):
            sources += _by_channel(smoothed, name)
        elif prefill_precision == quantize.W8A8 and name in scaling:
            sources.append(_float_source(smoothed, name, SMOOTHED_SUFFIX))
    return sources


def packed_bits(checkpoint: Checkpoint, name: str, weight_only_precision: str | None) -> int | None:
    """Return in how many bits a tensor is packed in blocks, None for one that is not.

    The embedding table and the head have 8 bits, because rounding them to 4 costs much accuracy. Only blocks of 4 bits
    that the checkpoint has already are kept for int4, since nothing is rounded then.
    """
    if weight_only_precision is None:
        return None
    bits = quantize.BITS.get(weight_only_precision)
    if bits is None:
        return max(quantize.BITS.values()) if name in _VOCABULARY else None
    if name in _VOCABULARY:
        return bits if checkpoint.stored_blocks(name, bits) is not None else max(quantize.BITS.values())
    return bits if name.endswith(_PROJECTIONS) else None


def packing_report(checkpoint: Checkpoint, weight_only_precision: str | None) -> list[str]:
    """Return one line for each quantised type of weights that weight_sources packs.

    It says whether their blocks are kept, or their values rounded a second time. With "w8a8" all projections are.
    Without weight-only precision nothing is packed.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for name in checkpoint.names():
        if (stored := checkpoint.stored_type(name)) in DTYPES:
            continue
        bits = packed_bits(checkpoint, name, weight_only_precision)
        if bits is not None:
            is_kept = checkpoint.stored_blocks(name, bits) is not None
            counts[stored, f"blocks kept as int{bits}" if is_kept else f"values rounded again, to int{bits}"] += 1
        elif weight_only_precision is not None and name.endswith(_PROJECTIONS):
            counts[stored, f"values rounded again, to {weight_only_precision}"] += 1
    return [f"{count} weights in {stored}: {what}" for (stored, what), count in sorted(counts.items())]


def _float_source(checkpoint: Checkpoint, name: str, suffix: str = "") -> WeightSource:
    return WeightSource(name + suffix, checkpoint.shape(name), "float32", partial(_float32, checkpoint, name))


def _float32(checkpoint: Checkpoint, name: str) -> np.ndarray:
    return checkpoint.converted(name, "float32")


def _by_channel(checkpoint: Checkpoint, name: str) -> list[WeightSource]:
    out_features, in_features = checkpoint.shape(name)
    parts = _OncePerPart(lambda: quantize.quantize_channels(_float32(checkpoint, name)))
    return [
        WeightSource(name + CHANNELS_SUFFIX, (in_features, out_features), "int8", partial(parts.take, 0)),
        WeightSource(name + CHANNEL_SCALES_SUFFIX, (out_features,), "float32", partial(parts.take, 1)),
    ]


def _packed(checkpoint: Checkpoint, name: str, bits: int) -> list[WeightSource]:
    out_features, in_features = checkpoint.shape(name)
    packed_shape, scale_shape = quantize.packed_shapes(out_features, in_features, bits)
    stored = checkpoint.stored_blocks(name, bits)
    if stored is None:
        parts = _OncePerPart(lambda: quantize.quantize(_float32(checkpoint, name), bits))
    else:
        parts = _OncePerPart(partial(_stored_parts, stored, bits))
    sources = [
        WeightSource(name + PACKED_SUFFIX, packed_shape, "uint8", partial(parts.take, 0)),
        WeightSource(name + SCALES_SUFFIX, scale_shape, "float32", partial(parts.take, 1)),
    ]
    if stored is not None and stored.has_offsets:
        sources.append(WeightSource(name + OFFSETS_SUFFIX, scale_shape, "float32", partial(parts.take, 2)))
    return sources


def _stored_parts(stored: StoredBlocks, bits: int) -> _Parts:
    blocks = stored.load()
    packed = quantize.pack(blocks.codes, bits)
    return (packed, blocks.scales) if blocks.offsets is None else (packed, blocks.scales, blocks.offsets)


class _OncePerPart:
    """Computes the parts of a tensor once and hands out each once, so that only one tensor is alive at a time."""

    def __init__(self, compute: Callable[[], _Parts]) -> None:
        self._compute = compute
        self._parts: dict[int, np.ndarray] = {}

    def take(self, part: int) -> np.ndarray:
        if part not in self._parts:
            self._parts = dict(enumerate(self._compute()))
        return self._parts.pop(part)
