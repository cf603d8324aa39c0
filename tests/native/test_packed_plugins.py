"""ChunkKVPrepare, Rope, Score and Compress in the plugin host, against NumPy over paged pools."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from chunkkv.native import BatchRows, NativeLibrary, RawArray, contiguous_kv
from native.memory import Memory, numpy_dtype
from native.packed_batch import SETTINGS, UNUSED, PackedBatch, Pools, setting_fields
from native.plugin_host import Range, node_fields
from native.plugin_op import PluginNode, open_host, plugins_of, run
from native.tensorrt_headers import Headers, own_headers, real_headers
from native.test_boundaries import DELIMITERS, VOCABULARY, bitmap
from native.test_rope import HEADS, KV_HEADS, POSITIONS, TOLERANCE, rotated, table

EVERY_HEADERS = [own_headers(10), own_headers(11), *real_headers()]
DELIMITED = replace(SETTINGS, boundaries="delimiter")
BATCHES = {
    "mixed": PackedBatch(),
    "contexts alone": PackedBatch(generations=()),
    "generations alone": PackedBatch(prompts=()),
    "one token": PackedBatch(prompts=(1,), generations=()),
    "nothing to compress": PackedBatch(prompts=(9, 3), generations=((50, 51),)),
    "many": PackedBatch(prompts=(9, 64, 10, 31, 8, 64, 12, 3), generations=((64, 64), (1, 2), (20, 200))),
    "more rows than rounding hides": PackedBatch(prompts=(57, *[1] * 7), generations=()),
}
KV_TYPES = ["int8", "float8_e4m3fn", "float16", "bfloat16", "float32"]


def prepare_fields(batch: PackedBatch, tokens_per_block: int = 8) -> dict[str, Any]:
    fields = setting_fields(batch.settings) | {"tokens_per_block": tokens_per_block}
    if batch.settings.boundaries == "delimiter":
        fields |= {"vocab_size": VOCABULARY, "delimiter_bitmap": bitmap().view(np.int32)}
    return fields


def prepare_inputs(batch: PackedBatch, pools: Pools, ids: NDArray[np.int32] | None = None) -> list[NDArray[Any]]:
    past = batch.sequence_length
    host = [batch.host_request_types, batch.context_lengths, past, pools.offsets]
    rows = [batch.sequence_length, batch.context_lengths, *host, batch.qkv]
    return rows if ids is None else [*rows, ids]


def kept_parts(batch: PackedBatch, packed: NDArray[Any]) -> list[NDArray[Any]]:
    return [packed[start:][:count] for start, count in zip(batch.row_starts, batch.kept_lengths, strict=True)][
        : batch.contexts
    ]


def assert_same_pools(pools: Pools, layers: list[int]) -> None:
    for given, wanted in zip(pools.contents(), pools.expected(layers), strict=True):
        np.testing.assert_array_equal(given, wanted)


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("settings", [SETTINGS, DELIMITED, replace(SETTINGS, budget_tokens=12)])
def test_prepare(memory: Memory, batch: PackedBatch, settings: Any) -> None:
    batch = replace(batch, settings=settings)
    pools = Pools(batch, memory)
    delimited = settings.boundaries == "delimiter"
    ids = np.resize(np.array([*DELIMITERS, 5, 30, -1, VOCABULARY], np.int32), batch.tokens) if delimited else None
    node = PluginNode("ChunkKVPrepare", prepare_fields(batch), memory=memory)
    attention, kept, starts, positions, *flags = node.run(prepare_inputs(batch, pools, ids))
    evicted = np.where(batch.host_request_types == 1, batch.context_lengths - batch.kept_lengths, 0)
    np.testing.assert_array_equal(attention, np.maximum(batch.sequence_length - evicted, 1))
    np.testing.assert_array_equal(kept, batch.kept_lengths)
    np.testing.assert_array_equal(starts, batch.row_starts)
    logical = [np.arange(length) for length in batch.prompts]
    logical += [np.array([seen - 1]) for _, seen in batch.generations]
    np.testing.assert_array_equal(positions, np.concatenate(logical))
    assert len(flags) == delimited
    if delimited:
        np.testing.assert_array_equal(flags[0], np.isin(ids, DELIMITERS))


def test_the_last_kept_tokens_are_those_of_the_node_that_this_thread_ran(memory: Memory) -> None:
    library = ctypes.CDLL(str(plugins_of(own_headers(11))))
    kept = library.chunkkv_last_kept_tokens
    kept.restype, kept.argtypes = ctypes.c_int64, [ctypes.c_int64]
    batch = PackedBatch()
    for settings in (SETTINGS, replace(SETTINGS, budget_tokens=12)):
        batch = replace(batch, settings=settings)
        node = PluginNode("ChunkKVPrepare", prepare_fields(batch), memory=memory)
        node.run(prepare_inputs(batch, Pools(batch, memory)))
        assert [kept(length) for length in (0, 9, 40, 50_000)] == [
            settings.kept_tokens(length) for length in (0, 9, 40, 50_000)
        ]
        assert kept(-1) == -1
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(kept, 40).result() == -1


@pytest.mark.parametrize("style", ["neox", "gptj"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("head_size", "rotary_dim"), [(64, 64), (80, 32)])
def test_rope(memory: Memory, style: str, dtype: str, head_size: int, rotary_dim: int) -> None:
    rng = np.random.default_rng(3)
    qkv = rng.normal(size=(11, HEADS + 2 * KV_HEADS, head_size)).astype(numpy_dtype(dtype))
    positions = rng.integers(0, POSITIONS, 11).astype(np.int32)
    fields = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_size": head_size, "rotary_dim": rotary_dim}
    fields |= {"neox": int(style == "neox"), "max_positions": POSITIONS}
    cos_sin = table(rotary_dim)
    node = PluginNode("ChunkKVRope", fields, memory=memory)
    (given,) = node.run([qkv.reshape(11, -1), positions, cos_sin.reshape(1, -1)])
    wanted = rotated(qkv, positions, cos_sin, style)
    assert given.dtype == qkv.dtype
    np.testing.assert_allclose(
        given.reshape(qkv.shape).astype(np.float64), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )
    np.testing.assert_array_equal(given.reshape(qkv.shape)[:, HEADS + KV_HEADS :], qkv[:, HEADS + KV_HEADS :])


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("settings", [SETTINGS, replace(DELIMITED, pooling=3), SETTINGS.with_score("logits")])
def test_score(memory: Memory, batch: PackedBatch, settings: Any) -> None:
    batch = replace(batch, settings=settings)
    (given,) = PluginNode("ChunkKVScore", batch.score_fields(), memory=memory).run(batch.score_inputs())
    wanted = batch.chunk_scores()
    np.testing.assert_array_equal(given == 0, wanted == 0)
    np.testing.assert_allclose(given, wanted, rtol=2e-5, atol=1e-5 * np.abs(wanted).max(initial=0))


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("settings", [SETTINGS, DELIMITED])
@pytest.mark.parametrize("mapping_rank", [1, 2])
@pytest.mark.parametrize("layers", [[1], [0, 1, 2, 3]], ids=["first", "last"])
def test_leader_and_follower(
    memory: Memory, batch: PackedBatch, settings: Any, mapping_rank: int, layers: list[int]
) -> None:
    """A leader compacts its own layer, or its whole group over two pools; a follower repeats it for a layer more."""
    batch = replace(batch, settings=settings)
    pools = Pools(batch, memory, pool_of_layer=(0, 1, 0, 0, 1), mapping_rank=mapping_rank)
    context, indices = pools.compress("leader", layers, batch.qkv)
    np.testing.assert_array_equal(context, pools.context())
    if batch.compresses:
        for given, wanted in zip(kept_parts(batch, indices), kept_parts(batch, batch.indices()), strict=True):
            np.testing.assert_array_equal(given, wanted)
    assert_same_pools(pools, layers)
    (context,) = pools.compress("follower", [4], indices)
    np.testing.assert_array_equal(context, pools.context())
    assert_same_pools(pools, [*layers, 4])


@pytest.mark.parametrize("name", ["generations alone", "one token", "nothing to compress"])
@pytest.mark.parametrize("role", ["leader", "ranker", "follower"])
def test_batches_without_rows_to_compress_only_copy_context(memory: Memory, name: str, role: str) -> None:
    """Such steps must cost no more than the copy: not even the pools are looked up."""
    batch = BATCHES[name]
    pools = Pools(batch, memory)
    sources = {"leader": batch.qkv, "ranker": np.zeros(batch.tokens, np.float32), "follower": batch.indices()}
    inputs = pools.inputs(role, pools.context(), sources[role])
    inputs[8] = np.zeros_like(inputs[8])
    context, *_ = PluginNode("ChunkKVCompress", pools.fields(role, [0, 1]), memory=memory).run(inputs)
    np.testing.assert_array_equal(context, pools.context())
    assert_same_pools(pools, [])


@pytest.mark.parametrize("role", ["leader", "follower"])
def test_a_node_that_only_orders_compacts_and_gives_one_number(memory: Memory, role: str) -> None:
    batch = BATCHES["many"]
    pools = Pools(batch, memory)
    source = batch.qkv if role == "leader" else batch.indices()
    fields = {**pools.fields(role, [0, 1]), "order_only": 1}
    done, *_ = PluginNode("ChunkKVCompress", fields, memory=memory).run(pools.inputs(role, pools.context(), source))
    assert done.shape == (1,) and done.dtype == np.int32
    assert_same_pools(pools, [0, 1])


@pytest.mark.parametrize("settings", [SETTINGS, DELIMITED])
def test_ranker_takes_the_scores_it_is_given(memory: Memory, settings: Any) -> None:
    """Each of two ranks scores half of the heads; both rank the sum, which is what one rank with all of them does."""
    whole = PackedBatch(settings=settings, heads=4, kv_heads=2)
    halves = []
    for rank in range(2):
        half = PackedBatch(settings=settings, heads=2, kv_heads=1)
        heads = whole.qkv.reshape(whole.tokens, -1, whole.head_size)
        half.qkv = heads[:, [2 * rank, 2 * rank + 1, 4 + rank, 6 + rank]].reshape(whole.tokens, -1)
        half.is_delimiter = whole.is_delimiter
        halves.append(half)
    scores = [
        PluginNode("ChunkKVScore", half.score_fields(), memory=memory).run(half.score_inputs()) for half in halves
    ]
    pools = Pools(whole, memory)
    _, indices = pools.compress("ranker", [0, 2], scores[0][0] + scores[1][0])
    for given, wanted in zip(kept_parts(whole, indices), kept_parts(whole, whole.indices()), strict=True):
        np.testing.assert_array_equal(given, wanted)
    assert_same_pools(pools, [0, 2])


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("tokens_per_block", [1, 16, 64])
def test_every_cache_type_moves_bit_by_bit(memory: Memory, kv_type: str, tokens_per_block: int) -> None:
    pools = Pools(PackedBatch(), memory, kv_type=kv_type, tokens_per_block=tokens_per_block)
    pools.compress("leader", [0, 1, 2], pools.batch.qkv)
    assert_same_pools(pools, [0, 1, 2])


@pytest.mark.parametrize("qkv_type", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("context_type", ["float32", "float16", "bfloat16", "float8_e4m3fn"])
def test_types_of_attention(memory: Memory, qkv_type: str, context_type: str) -> None:
    batch = PackedBatch(qkv_type=qkv_type)
    pools = Pools(batch, memory)
    given = pools.context(context_type)
    context, _ = pools.compress("leader", [2], batch.qkv, given)
    assert context.dtype == given.dtype and context.tobytes() == given.tobytes()
    assert_same_pools(pools, [2])


def test_any_contents_of_device_tensors_stay_inside(memory: Memory) -> None:
    """Lengths, starts and indices on the device may be anything; memory.release() looks for stray writes."""
    rng = np.random.default_rng(8)
    batch = PackedBatch(settings=DELIMITED)
    for _ in range(3):
        pools = Pools(batch, memory)
        pools.offsets[pools.offsets == UNUSED] = 0
        wild = rng.integers(-(2**31), 2**31 - 1, (5, batch.tokens), np.int64).astype(np.int32)
        for role, source in (("leader", batch.qkv), ("ranker", wild[4].view(np.float32)), ("follower", wild[4])):
            inputs = pools.inputs(role, pools.context(), source)
            for place in (2, 3, 4):
                inputs[place] = wild[place - 2, : batch.rows].copy()
            if role != "follower":
                inputs[-1] = wild[3]
            PluginNode("ChunkKVCompress", pools.fields(role, [0, 1]), memory=memory).run(inputs)
        inputs = prepare_inputs(batch, pools, wild[0])
        inputs[0], inputs[1] = wild[1, : batch.rows].copy(), wild[2, : batch.rows].copy()
        PluginNode("ChunkKVPrepare", prepare_fields(batch), memory=memory).run(inputs)


def test_workspace_of_the_profile_suffices_below_it(library: NativeLibrary) -> None:
    """Rows run in waves under a cap, which shorter prompts fill better: 2048 of 1024 tokens better than of 1088."""
    settings = replace(SETTINGS, window=31, chunk_size=10, min_tokens=43)
    rows, longest, heads = 2048, 1088, {"num_heads": 16, "num_kv_heads": 8, "head_size": 64}
    fields = setting_fields(settings) | heads | {"max_length": longest}
    row = Range("int32", (1,), (1,), (rows,))
    width = (16 + 2 * 8) * 64
    qkv = Range("float16", (1, width), (1, width), (rows * longest, width))
    given = open_host().build("chunkkv::ChunkKVScore:1", node_fields(fields), [qkv, *[row] * 4]).workspace

    def wanted(batch: int, length: int) -> int:
        def array(*shape: int) -> RawArray:
            return RawArray(4096, "float16", shape)  # only sizes are looked at

        cache = contiguous_kv(*[array(batch, 8, length, 64)] * 2)
        lengths = BatchRows(RawArray(4096, "int32", (batch,)), length)
        scores = RawArray(4096, "float32", (batch, library.max_chunks(settings, length)))
        return library.score_workspace(settings, lengths, array(batch, 16, 31, 64), cache, chunk_scores=scores)

    sizes = [wanted(batch, n) for batch in (1, 33, 1565, 1629, rows) for n in (1, 44, 512, 768, 1024, longest)]
    assert max(sizes) == wanted(rows, longest)
    assert max(sizes) + (rows * longest) * 8 <= given, "and the chunks have room as well"


@pytest.mark.parametrize("headers", EVERY_HEADERS, ids=[headers.name for headers in EVERY_HEADERS])
def test_every_set_of_headers(headers: Headers, memory: Memory) -> None:
    host = open_host(headers)
    batch = PackedBatch(settings=DELIMITED)
    pools = Pools(batch, memory)
    node = PluginNode("ChunkKVPrepare", prepare_fields(batch), host=host, memory=memory)
    ids = np.where(batch.is_delimiter, DELIMITERS[0], 5).astype(np.int32)
    _, kept, starts, _, flags = node.run(prepare_inputs(batch, pools, ids))
    np.testing.assert_array_equal(kept, batch.kept_lengths)
    np.testing.assert_array_equal(starts, batch.row_starts)
    np.testing.assert_array_equal(flags, batch.is_delimiter)
    (scores,) = PluginNode("ChunkKVScore", batch.score_fields(), host=host, memory=memory).run(batch.score_inputs())
    node = PluginNode("ChunkKVCompress", pools.fields("ranker", [0, 1, 2]), host=host, memory=memory)
    node.run(pools.inputs("ranker", pools.context(), scores))
    assert_same_pools(pools, [0, 1, 2])


def test_a_node_is_kept_between_steps_of_any_shape(memory: Memory) -> None:
    node = PluginNode("ChunkKVScore", PackedBatch().score_fields(), memory=memory)
    for batch in (*BATCHES.values(), *BATCHES.values()):
        (given,) = node.run(batch.score_inputs())
        np.testing.assert_allclose(given, batch.chunk_scores(), rtol=2e-5, atol=1e-7)
        if not memory.on_device:
            np.testing.assert_array_equal(run("ChunkKVScore", batch.score_fields(), batch.score_inputs())[0], given)
