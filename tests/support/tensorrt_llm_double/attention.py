"""GPTAttention over the paged cache in NumPy: writes the step's keys and values, reads the cache, attends.

A slot is all it knows: where the network leaves rotation to it, the slot is the position, as in the real kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from support.tensorrt_llm_double.graph import Node, numpy_dtype

INT8_KV, FP8_KV, FP8_MOST = 1 << 6, 1 << 7, 448.0
_ROPE_NEOX = 2
Hidden = Mapping[int, np.ndarray]  # slots by layer


class Pools:
    """Memory for keys and values on the host, known by its addresses; what was never written holds NaN."""

    def __init__(self) -> None:
        self._regions: dict[int, np.ndarray] = {}

    def allocate(self, nbytes: int) -> int:
        """Return the address of new memory."""
        memory = np.full(nbytes + 256, 0xFF, np.uint8)
        start = -memory.ctypes.data % 256
        region = memory[start : start + nbytes]
        self._regions[region.ctypes.data] = region
        return region.ctypes.data

    def load(self, address: int) -> np.ndarray:
        """Return the bytes from `address` to the end of its memory; what is changed must be stored."""
        return self._regions[address]

    def store(self, address: int, content: np.ndarray) -> None:
        """Write back what load returned."""
        assert content is self._regions[address]


def attend(
    node: Node, given: dict[str, np.ndarray], pools: Pools, hidden: Sequence[Hidden] | None = None
) -> np.ndarray:
    """Return context [T,Hq*D] float32; `hidden` are, per row and layer, slots that generation must not see."""
    settings = node.attributes
    heads, kv_heads, size = (settings[name] for name in ("num_heads", "num_kv_heads", "hidden_size_per_head"))
    packed = given["qkv"].astype(np.float32).reshape(len(given["qkv"]), heads + 2 * kv_heads, size)
    cache = _LayerCache(node, given, pools)
    out, at = np.empty((len(packed), heads, size), np.float32), 0
    for row, kind in enumerate(given["host_request_types"]):
        count = int(given["host_context_lengths"][row]) if kind == 0 else 1
        total = int(given["sequence_length"][row])
        first = total - count
        assert first >= 0 and (kind == 1 or first == 0), "a prompt in several parts"
        query, key, value = np.split(packed[at : at + count], (heads, heads + kv_heads), axis=1)
        if settings["position_embedding_type"]:
            positions = np.arange(first, total)
            query, key = (_rotated(x, positions, given["rotary_cos_sin"], settings) for x in (query, key))
            query, key = (x.astype(given["qkv"].dtype).astype(np.float32) for x in (query, key))
        cache.write(row, first, key, value)
        if kind == 0:
            keys, values = key, value
        else:
            unseen = hidden[row].get(settings["layer_idx"], ()) if hidden else ()
            keys, values = cache.read(row, np.setdiff1d(np.arange(total), unseen))
        out[at : at + count] = _attention(query, keys, values)
        at += count
    assert at == len(packed), "rows and lengths do not add up to the tokens"
    cache.close()
    return out.reshape(len(packed), heads * size)


def _attention(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Causal: query [t,Hq,D] are the last t of keys, values [n,Hkv,D]."""
    count, heads, size = query.shape
    length, kv_heads, _ = keys.shape
    grouped = query.transpose(1, 0, 2).reshape(kv_heads, heads // kv_heads * count, size)
    logits = (grouped @ keys.transpose(1, 2, 0) / np.float32(size) ** 0.5).reshape(heads, count, length)
    seen = np.arange(length) <= (length - count + np.arange(count))[:, None]
    logits = np.where(seen, logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    summed = weights.reshape(kv_heads, -1, length) @ values.transpose(1, 0, 2)
    return summed.reshape(heads, count, size).transpose(1, 0, 2)


def _rotated(x: np.ndarray, positions: np.ndarray, table: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """Rotate the halves of each head of x [t,H,D] by the table's angles at `positions`."""
    size = settings["rotary_embedding_dim"]
    assert size == x.shape[2] and settings["position_embedding_type"] == _ROPE_NEOX
    cos, sin = np.moveaxis(table.reshape(-1, size // 2, 2)[positions][:, None], 3, 0)
    low, high = np.split(x, 2, axis=2)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=2)


class _LayerCache:
    """One layer's keys and values of all rows, as the blocks [Hkv, tokens_per_block, D] of its pool."""

    def __init__(self, node: Node, given: dict[str, np.ndarray], pools: Pools) -> None:
        settings = node.attributes
        self._pool, in_pool = (int(number) for number in given["host_kv_cache_pool_mapping"][settings["layer_idx"]])
        mode = settings["kv_cache_quant_mode"]
        quantised = {INT8_KV: np.dtype(np.int8), FP8_KV: numpy_dtype("float8_e4m3fn")}
        self._dtype = quantised.get(mode & (INT8_KV | FP8_KV), given["qkv"].dtype)
        self._to_cache, self._from_cache = (
            float(given[name][0]) if name in given else 1.0 for name in ("kv_orig_quant_scale", "kv_quant_orig_scale")
        )
        self._tokens = settings["tokens_per_block"]
        block = (settings["num_kv_heads"], self._tokens, settings["hidden_size_per_head"])
        self._pools, self._address = pools, int(given["host_kv_cache_pool_pointers"][self._pool, 0])
        self._raw = pools.load(self._address)
        count = len(self._raw) // (int(np.prod(block)) * self._dtype.itemsize)
        whole = self._raw[: count * int(np.prod(block)) * self._dtype.itemsize]
        self._blocks = whole.view(self._dtype).reshape(count, *block)[2 * in_pool :]
        self._offsets = given["kv_cache_block_offsets"][self._pool]
        assert (self._offsets >= 0).all() and (self._offsets == given["host_kv_cache_block_offsets"][self._pool]).all()

    def write(self, row: int, first: int, key: np.ndarray, value: np.ndarray) -> None:
        """Store key, value [t,Hkv,D] in slots first, first + 1, …"""
        slots = np.arange(first, first + len(key))
        for kind, content in enumerate((key, value)):
            blocks = self._offsets[row, kind, slots // self._tokens]
            self._blocks[blocks, :, slots % self._tokens] = self._quantised(content)

    def read(self, row: int, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return keys and values [n,Hkv,D] float32 of n slots."""
        blocks = (self._offsets[row, kind, slots // self._tokens] for kind in (0, 1))
        found = [self._blocks[block, :, slots % self._tokens].astype(np.float32) for block in blocks]
        return found[0] * np.float32(self._from_cache), found[1] * np.float32(self._from_cache)

    def close(self) -> None:
        """Write everything back."""
        self._pools.store(self._address, self._raw)

    def _quantised(self, x: np.ndarray) -> np.ndarray:
        scaled = x * np.float32(self._to_cache)
        if self._dtype == np.int8:
            return np.clip(np.rint(scaled), -128, 127).astype(np.int8)
        if self._dtype == numpy_dtype("float8_e4m3fn"):
            scaled = np.clip(scaled, -FP8_MOST, FP8_MOST)
        return scaled.astype(self._dtype)
