"""rope against its formula in float64: both styles, every type and head size, in place and out of place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.messages import naming

from chunkkv.errors import NativeArgumentError
from chunkkv.native import NativeLibrary
from native.memory import Memory, numpy_dtype

HEADS, KV_HEADS, TOKENS, POSITIONS = 5, 2, 9, 40
# Rounded once: half a unit in the last place of the type, plus float32 arithmetic.
TOLERANCE = {"float32": 1e-6, "float16": 2**-11 * 1.01, "bfloat16": 2**-8 * 1.01}


def table(rotary_dim: int) -> NDArray[np.float32]:
    """Return TensorRT-LLM's table [P, rotary_dim / 2, 2]."""
    frequencies = 10_000.0 ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    angles = np.arange(POSITIONS)[:, None] * frequencies
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)


def rotated(qkv: NDArray[Any], positions: Any, cos_sin: NDArray[np.float32], style: str) -> NDArray[np.float64]:
    """Return float64 [T, heads, D] with the first rotary_dim elements of Q and K turned."""
    half = cos_sin.shape[1]
    result = qkv.astype(np.float64)
    turned = result[:, : HEADS + KV_HEADS, : 2 * half]
    split = turned.reshape(*turned.shape[:2], 2, half) if style == "neox" else None
    first, second = (
        (split[:, :, 0].copy(), split[:, :, 1].copy())
        if split is not None
        else (turned[..., 0::2].copy(), turned[..., 1::2].copy())
    )
    cosine, sine = (cos_sin[positions, :, i].astype(np.float64)[:, None] for i in (0, 1))
    pair = first * cosine - second * sine, second * cosine + first * sine
    if style == "neox":
        turned[..., :half], turned[..., half:] = pair
    else:
        turned[..., 0::2], turned[..., 1::2] = pair
    return result


def check(
    library: NativeLibrary,
    memory: Memory,
    dtype: str,
    dim: int,
    rotary_dim: int,
    style: str,
    *,
    in_place: bool,
    misalign: int = 0,
) -> None:
    rng = np.random.default_rng(dim)
    qkv = rng.normal(size=(TOKENS, HEADS + 2 * KV_HEADS, dim)).astype(numpy_dtype(dtype))
    positions = rng.integers(0, POSITIONS, TOKENS).astype(np.int32)
    cos_sin = table(rotary_dim)
    source = memory.put(qkv.reshape(TOKENS, -1), misalign)
    output = source if in_place else memory.empty(source.shape, dtype, misalign)
    sizes = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": dim}
    library.rope(source, output, memory.put(positions), memory.put(cos_sin), **sizes, style=style)
    got = memory.get(output).reshape(qkv.shape)
    wanted = rotated(qkv, positions, cos_sin, style)
    length = np.abs(qkv.astype(np.float64)).max()
    np.testing.assert_allclose(got.astype(np.float64), wanted, rtol=TOLERANCE[dtype], atol=2e-7 * length)
    untouched = np.zeros(qkv.shape, bool)
    untouched[:, HEADS + KV_HEADS :] = untouched[:, :, rotary_dim:] = True
    assert got[untouched].tobytes() == qkv[untouched].tobytes(), "V and the rest of each head are copied bit for bit"
    if not in_place:
        assert memory.get(source).tobytes() == qkv.tobytes()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("style", ["neox", "gptj"])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rotation(library: NativeLibrary, memory: Memory, dtype: str, dim: int, style: str, in_place: bool) -> None:
    check(library, memory, dtype, dim, dim, style, in_place=in_place)


@pytest.mark.parametrize("style", ["neox", "gptj"])
@pytest.mark.parametrize(("dim", "rotary_dim"), [(64, 32), (128, 16), (80, 32), (96, 2), (64, 34), (10, 6), (2, 2)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_partial_rotation_and_odd_sizes(
    library: NativeLibrary, memory: Memory, dtype: str, dim: int, rotary_dim: int, style: str
) -> None:
    check(library, memory, dtype, dim, rotary_dim, style, in_place=False)
    check(library, memory, dtype, dim, rotary_dim, style, in_place=True)


@pytest.mark.parametrize("style", ["neox", "gptj"])
def test_memory_that_is_not_16_byte_aligned(library: NativeLibrary, memory: Memory, style: str) -> None:
    check(library, memory, "float16", 64, 64, style, in_place=False, misalign=2)
    check(library, memory, "float32", 64, 32, style, in_place=True, misalign=4)


def test_positions_outside_the_table_are_clamped(library: NativeLibrary, memory: Memory) -> None:
    qkv = np.random.default_rng(0).normal(size=(4, 9 * 64)).astype(np.float32)
    given = np.array([-1, -(2**31), POSITIONS, 2**31 - 1], np.int32)
    sizes = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": 64}
    results = []
    for positions in (given, np.array([0, 0, POSITIONS - 1, POSITIONS - 1], np.int32)):
        output = memory.empty(qkv.shape, "float32")
        library.rope(memory.put(qkv), output, memory.put(positions), memory.put(table(64)), **sizes)
        results.append(memory.get(output).tobytes())
    assert results[0] == results[1]


def test_no_tokens_and_bad_arguments(library: NativeLibrary, memory: Memory) -> None:
    sizes = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": 64}
    empty = memory.empty((0, 9 * 64), "float16")
    cos_sin, no_positions = memory.put(table(64)), memory.empty((0,), "int32")
    library.rope(empty, empty, no_positions, cos_sin, **sizes)
    with pytest.raises(NativeArgumentError, match=naming("rotary_dim 128 2 64")):
        library.rope(empty, empty, no_positions, memory.put(table(128)), **sizes)
    with pytest.raises(NativeArgumentError, match=naming("style 'glm' neox gptj")):
        library.rope(empty, empty, no_positions, cos_sin, **sizes, style="glm")
    whole_numbers = memory.empty((0, 9 * 64), "int8")
    with pytest.raises(NativeArgumentError, match=naming("dtype 3")):
        library.rope(whole_numbers, whole_numbers, no_positions, cos_sin, **sizes)
    one = memory.empty((1, 9 * 64), "float16")
    crooked = memory.put(table(64), misalign=4)
    with pytest.raises(NativeArgumentError, match=naming("cos_sin 8")):
        library.rope(one, one, memory.put(np.zeros(1, np.int32)), crooked, **sizes)
