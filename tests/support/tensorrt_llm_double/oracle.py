"""The ChunkKV plugins of a TensorRT-LLM network of one rank in NumPy, from the reference op alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from chunkkv import reference
from chunkkv.settings import ChunkKVSettings
from support.tensorrt_llm_double.attention import Pools
from support.tensorrt_llm_double.graph import Node

Arrays = list[np.ndarray]
_SHARED = ("window", "chunk_size", "sinks", "boundaries", "pooling", "score", "min_tokens", "budget_tokens")
_SHARED += ("window_reduce", "head_reduce", "value_norm")


def oracle_plugins(pools: Pools) -> Callable[[Node], Callable[[Arrays], Arrays]]:
    """Return what makes a runner for a plugin node; `pools` is the memory that pool pointers mean."""

    run = {"ChunkKVPrepare": _prepare, "ChunkKVRope": _rope, "ChunkKVCompress": partial(_compress, pools)}
    return lambda node: partial(run[node.plugin or ""], node.fields())


def _settings(fields: dict[str, Any]) -> ChunkKVSettings:
    return ChunkKVSettings(keep_per_10k=fields["keep_per_10k"] or 10_000, **{name: fields[name] for name in _SHARED})


def _prepare(fields: dict[str, Any], given: Arrays) -> Arrays:
    sequence, context, types, host_context, host_past, _, qkv = given[:7]
    settings = _settings(fields)
    kept = np.array([settings.kept_tokens(int(length)) for length in context], np.int32)
    prompt = types == 0
    assert (host_past[prompt] == host_context[prompt]).all(), "a prompt in parts, or blocks used again"
    attention = np.where(prompt, sequence, sequence - (context - kept)).astype(np.int32)
    counts = np.where(prompt, host_context, 1)
    starts = (np.cumsum(counts) - counts).astype(np.int32)
    rows = [np.arange(n) if p else np.array([s - 1]) for p, n, s in zip(prompt, host_context, sequence, strict=True)]
    positions = np.concatenate(rows).astype(np.int32)
    assert len(positions) == len(qkv)
    made = [attention, kept, starts, positions]
    if fields["boundaries"] == "delimiter":
        words = np.atleast_1d(np.array(fields["delimiter_bitmap"], np.int32)).view(np.uint32)
        ids = given[7]
        made.append((words[ids // 32] >> (ids % 32).astype(np.uint32) & 1).astype(np.int32))
    return made


def _rope(fields: dict[str, Any], given: Arrays) -> Arrays:
    qkv, positions, table = given[:3]
    size, half = fields["head_size"], fields["rotary_dim"] // 2
    heads = fields["num_heads"] + fields["num_kv_heads"]
    assert fields["neox"] and size == 2 * half
    out = qkv.astype(np.float32).reshape(len(qkv), -1, size)
    cos, sin = np.moveaxis(table.reshape(-1, half, 2)[positions][:, None], 3, 0)
    a, b = (part.copy() for part in np.split(out[:, :heads], 2, axis=2))
    out[:, :heads] = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2)
    return [out.reshape(qkv.shape).astype(qkv.dtype)]


def _token_scores(fields: dict[str, Any], settings: ChunkKVSettings, qkv: np.ndarray) -> np.ndarray:
    heads, kv_heads = fields["num_heads"], fields["num_kv_heads"]
    rows = qkv.astype(np.float32).reshape(len(qkv), -1, fields["head_size"]).transpose(1, 0, 2)
    query, key = rows[:heads, -settings.window :], rows[heads : heads + kv_heads]
    options = settings.window, settings.pooling, settings.score
    return reference.token_scores(query, key, *options, head_reduce=settings.head_reduce)


def _compress(pools: Pools, fields: dict[str, Any], given: Arrays) -> Arrays:
    context, source, kept_lengths, starts, _, types, host_context = given[:7]
    settings, role = _settings(fields), fields["role"]
    indices = np.zeros(len(context), np.int32)
    for row in np.flatnonzero(types == 0):
        at, length, kept = int(starts[row]), int(host_context[row]), int(kept_lengths[row])
        if kept == length:
            continue
        flags = given[10][at : at + length] != 0 if len(given) > 10 else None
        if role == "follower":
            chosen = source[at : at + kept]
        else:
            scores = _token_scores(fields, settings, source[at : at + length])
            chosen = reference.select_tokens(scores, length, kept, settings, flags)
        indices[at : at + kept] = chosen
        for place in range(len(np.atleast_1d(fields["layers"]))):
            _compact(pools, fields, given, row, place, chosen)
    first = np.zeros(1, np.int32) if fields["order_only"] else context.copy()
    return [first, *([] if role == "follower" else [indices])]


def _compact(pools: Pools, fields: dict[str, Any], given: Arrays, row: int, place: int, chosen: np.ndarray) -> None:
    offsets, pointers, mapping = given[7:10]
    layer = int(np.atleast_1d(fields["layers"])[place])
    pool, in_pool = (int(number) for number in mapping[layer])
    assert fields["mapping_rank"] == 2 and np.atleast_1d(fields["layer_in_pool"])[place] == in_pool
    tokens, heads = fields["tokens_per_block"], fields["num_kv_heads"]
    row_bytes = fields["head_size"] * fields["kv_bytes"]
    raw = pools.load(int(pointers[pool, 0]))
    block_bytes = heads * tokens * row_bytes
    blocks = raw[: len(raw) // block_bytes * block_bytes].reshape(-1, heads, tokens, row_bytes)[2 * in_pool :]
    for kind in (0, 1):
        own, slots = offsets[pool, row, kind], np.arange(len(chosen))
        moved = blocks[own[chosen // tokens], :, chosen % tokens]
        blocks[own[slots // tokens], :, slots % tokens] = moved
    pools.store(int(pointers[pool, 0]), raw)
