"""The quantised types of GGUF: their values, and for those with blocks of 32 their whole numbers and scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from chunkkv_builder.checkpoint.blocks import BLOCK, QuantizedBlocks
from chunkkv_builder.checkpoint.gguf_file import TensorType

_PLAIN: dict[str, type] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_ROWS_AT_ONCE = 1024  # keeps what is computed on the way small beside the result
_PARTS = 8  # blocks of 32 in a block of the types with K

_Unpacked = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def dequantize(data: np.ndarray, kind: TensorType) -> np.ndarray:
    """Return the values of bytes [rows, bytes of a row]: [rows, values of a row].

    The plain types F32, F16 and BF16 are views in their own type, everything else is float32.
    """
    if kind.name in _PLAIN:
        return data.view(_PLAIN[kind.name])
    import gguf  # here, because it loads more than half of what a build loads otherwise

    code = gguf.GGMLQuantizationType[kind.name]
    values = np.empty((len(data), data.shape[1] // kind.block_bytes * kind.block), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # whoever asks checks that all is finite
        for first in range(0, len(data), _ROWS_AT_ONCE):
            rows = slice(first, first + _ROWS_AT_ONCE)
            values[rows] = gguf.dequantize(np.ascontiguousarray(data[rows]), code)
    return values


@dataclass(frozen=True)
class BlockFormat:
    """A type whose values are (code - zero) * scale, or code * scale + minimum, in blocks of 32.

    Parameters
    ----------
    bits : int
        Bits of a code.
    has_minimum : bool
        Whether a block has a minimum.
    unpack : callable
        Takes blocks, uint8 [..., bytes], and returns codes [..., 32], scales and minimums [...] (None where there are
        none), of each block of 32.
    """

    bits: int
    has_minimum: bool
    unpack: Callable[[np.ndarray], _Unpacked]


def to_blocks(data: np.ndarray, kind: TensorType, bits: int) -> QuantizedBlocks:
    """Return bytes [rows, bytes of a row] as codes of `bits` bits that stand for the same values.

    `kind` is a key of BLOCK_FORMATS whose codes have at most `bits` bits. Codes are shifted so that the middle of their
    range is at 2**(bits - 1): small numbers, so that nothing is lost where activations are rounded.
    """
    block_format = BLOCK_FORMATS[kind.name]
    middle = 2 ** (block_format.bits - 1)
    with np.errstate(invalid="ignore", over="ignore"):  # whoever asks checks that all is finite
        codes, scales, minimums = block_format.unpack(data.reshape(len(data), -1, kind.block_bytes))
        scales = scales.reshape(len(data), -1)
        offsets = None if minimums is None else minimums.reshape(len(data), -1) + scales * np.float32(middle)
    codes = codes + np.uint8(2 ** (bits - 1) - middle)
    return QuantizedBlocks(codes.reshape(len(data), -1, BLOCK), scales, offsets)


def _half(blocks: np.ndarray, place: int) -> np.ndarray:
    """Return the float16 number at byte `place` of each block, as float32."""
    return np.ascontiguousarray(blocks[..., place : place + 2]).view(np.float16)[..., 0].astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Return the low halves of `packed` [..., n], then the high ones: [..., 2 n]."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fifth_bits(packed: np.ndarray) -> np.ndarray:
    """Return bit i of the four bytes `packed` for value i, at its place in a code of five bits."""
    return np.unpackbits(packed, axis=-1, bitorder="little") << 4


def _q4_0(blocks: np.ndarray) -> _Unpacked:
    return _nibbles(blocks[..., 2:]), _half(blocks, 0), None


def _q4_1(blocks: np.ndarray) -> _Unpacked:
    return _nibbles(blocks[..., 4:]), _half(blocks, 0), _half(blocks, 2)


def _q5_0(blocks: np.ndarray) -> _Unpacked:
    return _nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6]), _half(blocks, 0), None


def _q5_1(blocks: np.ndarray) -> _Unpacked:
    return _nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8]), _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: np.ndarray) -> _Unpacked:
    return blocks[..., 2:] ^ 0x80, _half(blocks, 0), None  # from two's complement to an offset of 128


def _k_scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scales and minimums [..., 8] of Q4_K and Q5_K, whose twelve bytes hold sixteen numbers of six bits."""
    scale, minimum, rest = (blocks[..., first : first + 4] for first in (4, 8, 12))
    scales = np.concatenate([scale & 63, (rest & 15) | ((scale >> 2) & 48)], axis=-1)
    minimums = np.concatenate([minimum & 63, (rest >> 4) | ((minimum >> 2) & 48)], axis=-1)
    return _half(blocks, 0)[..., None] * scales, -(_half(blocks, 2)[..., None] * minimums)


def _k_nibbles(packed: np.ndarray) -> np.ndarray:
    """Return codes [..., 8, 32] of 128 bytes: every 32 bytes hold one block of 32 low and one high."""
    quarters = packed.reshape(*packed.shape[:-1], _PARTS // 2, BLOCK)
    return _nibbles(quarters).reshape(*packed.shape[:-1], _PARTS, BLOCK)


def _q4_k(blocks: np.ndarray) -> _Unpacked:
    return _k_nibbles(blocks[..., 16:]), *_k_scales(blocks)


def _q5_k(blocks: np.ndarray) -> _Unpacked:
    shifts = np.arange(_PARTS, dtype=np.uint8)[:, None]
    fifth = ((blocks[..., None, 16:48] >> shifts) & 1) << 4  # bit i of each byte belongs to block i of 32
    return _k_nibbles(blocks[..., 48:]) | fifth, *_k_scales(blocks)


# The types whose blocks an engine can take as they are. The others with K have 16 values to a scale.
BLOCK_FORMATS = {
    "Q4_0": BlockFormat(4, False, _q4_0),
    "Q4_1": BlockFormat(4, True, _q4_1),
    "Q5_0": BlockFormat(5, False, _q5_0),
    "Q5_1": BlockFormat(5, True, _q5_1),
    "Q8_0": BlockFormat(8, False, _q8_0),
    "Q4_K": BlockFormat(4, True, _q4_k),
    "Q5_K": BlockFormat(5, True, _q5_k),
}
