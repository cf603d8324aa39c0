"""Weight-only quantisation in the layout of ONNX Runtime's MatMulNBits operator (symmetric, blocks of 32)."""

from __future__ import annotations

import numpy as np

from chunkkv_builder.checkpoint.blocks import BLOCK

BITS = {"int8": 8, "int4": 4}
W8A8 = "w8a8"  # 8 bits with a scale for each output, multiplied with inputs of 8 bits with a scale for each token
LARGEST_CODE = 127  # of the codes of W8A8
SEARCHED_BITS = 4  # with 8 bits the plain scales are good enough
# A candidate scale maps a block's largest magnitude to one of these codes. Codes end at -8 and 7: 8 is the plain rule,
# and more clips the largest magnitude for finer steps of all others.
_LARGEST_CODES = np.linspace(6.0, 11.0, 41, dtype=np.float32)
_VALUES_AT_ONCE = 2**20  # bounds the memory of the search, whose arrays hold one number for each of these


def packed_shapes(out_features: int, in_features: int, bits: int) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """Return the shapes of the packed weight (uint8) and of its scales (float32)."""
    blocks = -(-in_features // BLOCK)
    return (out_features, blocks, BLOCK * bits // 8), (out_features, blocks)


def quantize(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantise a weight by the best rule for `bits`: search_scales for 4, plain_scales for 8.

    Parameters
    ----------
    weight : ndarray
        float32 [out, in].
    bits : int
        4 or 8 per value.

    Returns
    -------
    packed : ndarray
        uint8 [out, blocks, 32 * bits / 8]; values have an offset of 2**(bits-1), low nibble first.
    scales : ndarray
        float32 [out, blocks].
    """
    blocks = _blocks(weight)
    scales = search_scales(blocks) if bits == SEARCHED_BITS else plain_scales(blocks, bits)
    return pack(_codes(blocks, scales, bits), bits), scales


def quantize_channels(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantise a weight to 8 bits with one scale for each output, as products of whole numbers need it.

    Parameters
    ----------
    weight : ndarray
        float32 [out, in].

    Returns
    -------
    codes : ndarray
        int8 [in, out], from -127 to 127.
    scales : ndarray
        float32 [out].
    """
    scales = (np.abs(weight).max(axis=1) / LARGEST_CODE).astype(np.float32)
    return np.ascontiguousarray(np.rint(weight * _inverse(scales)[:, None]).T.astype(np.int8)), scales


def plain_scales(blocks: np.ndarray, bits: int) -> np.ndarray:
    """Return scales [out, blocks] with which the largest magnitude of each block of 32 is represented exactly."""
    return (_largest(blocks) / -(2 ** (bits - 1))).astype(np.float32)


def search_scales(blocks: np.ndarray) -> np.ndarray:
    """Return scales [out, blocks] for 4 bits with the least squared error of each block of 32 among the candidates.

    For each candidate scale the values are rounded, then the scale is fitted to the rounded values by least squares.
    """
    rows = max(1, _VALUES_AT_ONCE // (blocks.shape[1] * BLOCK))
    return np.concatenate([_search(blocks[start : start + rows]) for start in range(0, len(blocks), rows)])


def _search(blocks: np.ndarray) -> np.ndarray:
    # In units of the largest value the squares below neither overflow nor vanish, however large or small a block is.
    largest = _largest(blocks)
    units = np.divide(blocks, largest[..., None], out=np.zeros_like(blocks), where=largest[..., None] != 0)
    best, best_gain = np.zeros_like(largest), np.full_like(largest, -1.0)
    for code in _LARGEST_CODES:
        codes = np.rint(units * -code)
        np.clip(codes, -8, 7, out=codes)
        # The least-squares scale is dot / norm, and it lowers the squared error by dot**2 / norm.
        dot = np.einsum("obi,obi->ob", units, codes)
        scales = dot * _inverse(np.einsum("obi,obi->ob", codes, codes))
        gain = dot * scales
        is_better = gain > best_gain
        best, best_gain = np.where(is_better, scales, best), np.where(is_better, gain, best_gain)
    return best * largest


def _blocks(weight: np.ndarray) -> np.ndarray:
    """Return a weight [out, in] as [out, blocks, 32], the last block filled with zeros."""
    count = -(-weight.shape[1] // BLOCK)
    padded = np.zeros((weight.shape[0], count * BLOCK), dtype=np.float32)
    padded[:, : weight.shape[1]] = weight
    return padded.reshape(weight.shape[0], count, BLOCK)


def _largest(blocks: np.ndarray) -> np.ndarray:
    """Return the value of the largest magnitude of each block, with its sign."""
    return np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[..., None], axis=2)[..., 0]


def _inverse(values: np.ndarray) -> np.ndarray:
    """Return 1 / values, and 0 where a value is 0."""
    return np.divide(1.0, values, out=np.zeros_like(values), where=values != 0)


def _codes(blocks: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    offset = 2 ** (bits - 1)
    codes = np.rint(blocks * _inverse(scales)[..., None]) + offset
    return np.clip(codes, 0, 2 * offset - 1).astype(np.uint8)


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
