"""Weight-only quantisation in the layout of ONNX Runtime's MatMulNBits operator (symmetric, blocks of 32)."""

from __future__ import annotations

import numpy as np

from chunkkv_builder.checkpoint.blocks import BLOCK

BITS = {"int8": 8, "int4": 4}


def packed_shapes(out_features: int, in_features: int, bits: int) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """Return the shapes of the packed weight (uint8) and of its scales (float32)."""
    blocks = -(-in_features // BLOCK)
    return (out_features, blocks, BLOCK * bits // 8), (out_features, blocks)


def quantize(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantise weight [out, in] to `bits` (4 or 8) per value; return packed uint8 and float32 scales.

    Each block of 32 inputs has one scale, chosen so that its largest magnitude is represented exactly;
    values are stored with an offset of 2**(bits-1), low nibble first.
    """
    _, scale_shape = packed_shapes(weight.shape[0], weight.shape[1], bits)
    padded = np.zeros((weight.shape[0], scale_shape[1] * BLOCK), dtype=np.float32)
    padded[:, : weight.shape[1]] = weight
    blocks = padded.reshape(*scale_shape, BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[..., None], axis=2)[..., 0]
    offset = 2 ** (bits - 1)
    scales = (largest / -offset).astype(np.float32)
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)
    codes = np.rint(blocks * inverse[..., None]) + offset
    return pack(np.clip(codes, 0, 2 * offset - 1).astype(np.uint8), bits), scales


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Return codes uint8 [out, blocks, 32] of `bits` (4 or 8) bits in the packed shape, low nibble first."""
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return np.ascontiguousarray(codes)


def dequantize(
    packed: np.ndarray, scales: np.ndarray, in_features: int, offsets: np.ndarray | None = None
) -> np.ndarray:
    """Return the float32 weight [out, in] that the packed form, its scales and the blocks' offsets stand for."""
    bits = packed.shape[2] * 8 // BLOCK
    codes = packed
    if bits == 4:
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], BLOCK)
    values = (codes.astype(np.float32) - 2 ** (bits - 1)) * scales[..., None]
    if offsets is not None:
        values += offsets[..., None]
    return values.reshape(packed.shape[0], -1)[:, :in_features]
