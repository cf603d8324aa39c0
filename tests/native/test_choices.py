"""Version 2 of the contract on the kernels: windows of requests, reductions, value norms, choices per head, classes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import op_properties
from support.op_cases import OpCase

from chunkkv import reference
from chunkkv.errors import NativeArgumentError
from chunkkv.native import BatchRows, NativeLibrary, contiguous_kv
from chunkkv.settings import ChunkKVSettings
from native.memory import Memory
from native.native_op import NativeOp, dequantize, make_cache, quantize
from native.score_checks import TOLERANCE

WINDOW = 20
OWN = ChunkKVSettings(window=WINDOW, chunk_size=6, sinks=3, min_tokens=29, keep_per_10k=4_000, pooling=3)
LENGTHS = (150, 97, 29, 333, 20)
VARIANTS: dict[str, dict[str, Any]] = {
    "as version 1": {"head_reduce": "mean"},
    "largest head": {"head_reduce": "max"},
    "largest of the window": {"window_reduce": "max", "head_reduce": "mean"},
    "largest of both": {"window_reduce": "max", "head_reduce": "max"},
    "value norms": {"value_norm": "on"},
    "each head": {"heads": "each"},
    "each head by its largest": {"heads": "each", "window_reduce": "max", "head_reduce": "max", "value_norm": "on"},
    "delimiters, largest head, value norms": {"boundaries": "delimiter", "head_reduce": "max", "value_norm": "on"},
    "logits of each head": {"heads": "each", "score": "logits", "head_reduce": "mean"},
}


def arrays(settings: ChunkKVSettings, storage: str = "float16", heads: tuple[int, int] = (6, 2)) -> dict[str, Any]:
    """Return what select_batch takes, with a window of its own for every row."""
    tried = OpCase("choices", settings, LENGTHS, *heads, head_dim=64, extra_padding=2)
    inputs = tried.inputs(storage)
    rng = np.random.default_rng(3)
    value = (rng.normal(size=inputs.key.shape) * rng.random((*inputs.key.shape[:3], 1))).astype(inputs.key.dtype)
    for row, length in enumerate(LENGTHS):
        value[row, :, length:] = np.nan
    given = {"query": inputs.query, "key": inputs.key, "lengths": inputs.lengths, "settings": settings}
    given |= {"window": np.array([20, 1, 7, 13, 20], np.int32), "is_delimiter": inputs.is_delimiter}
    return given | ({"value": value} if settings.value_norm == "on" else {})


def check(op: NativeOp, given: dict[str, Any]) -> None:
    """Compare with the reference: scores closely, choices exactly outside chunks near the cut."""
    settings, expected_of = given["settings"], dict(given)
    if op.key_storage is not None:
        for name in ("key", "value"):
            if name in given:
                expected_of[name] = dequantize(quantize(given[name], op.key_storage))
    indices, lengths, scores = op.select(**given)
    wanted = reference.select_batch(**expected_of)
    np.testing.assert_array_equal(lengths, wanted.kept_lengths)
    assert scores.shape == wanted.token_scores.shape and indices.shape == wanted.kept_indices.shape
    for row, length in enumerate(given["lengths"]):
        if lengths[row] == length:
            continue
        flags = None if given.get("is_delimiter") is None else given["is_delimiter"][row, :length]
        own = (np.atleast_2d(x[row]) for x in (scores, wanted.token_scores, indices, wanted.kept_indices))
        for score, right, chosen, kept in zip(*own, strict=True):
            op_properties.assert_scores_close(score, right, settings.score)
            count = lengths[row]
            assert (chosen[count:] == reference.PAD_INDEX).all()
            excused = op_properties.differs_near_cut(chosen[:count], kept[:count], right, length, settings, flags)
            assert excused == 0


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_every_variant_is_the_references(
    library: NativeLibrary, memory: Memory, storage: str, variant: dict[str, Any]
) -> None:
    settings = replace(OWN, **variant)
    for layout in ("contiguous", "paged"):
        check(NativeOp(library, memory, layout=layout), arrays(settings, storage))
    check(NativeOp(library, memory, layout="packed", packed_rows=True, whole_query=True), arrays(settings, storage))


@pytest.mark.parametrize("key_storage", ["int8", "float8_e4m3fn"])
def test_norms_of_quantized_values(library: NativeLibrary, memory: Memory, key_storage: str) -> None:
    for head_dim in (64, 80, 128):
        settings = replace(OWN, value_norm="on", window_reduce="max")
        given = arrays(settings)
        for name in ("query", "key", "value"):
            given[name] = np.tile(given[name], (1, 1, 1, 2))[..., :head_dim]
        check(NativeOp(library, memory, key_storage, layout="paged"), given)


@pytest.mark.parametrize("heads", [(1, 1), (7, 1), (12, 3), (16, 1)])
@pytest.mark.parametrize("window", [1, 9, 33, 128])
def test_heads_apart_in_every_arrangement(
    library: NativeLibrary, memory: Memory, window: int, heads: tuple[int, int]
) -> None:
    """The rows of a head are rounded up to 8, and a warp's rows may belong to several heads, or a head's to several."""
    for reduce in ({"window_reduce": "max", "head_reduce": "mean"}, {"head_reduce": "max"}):
        settings = replace(OWN, window=window, min_tokens=window + 9, **reduce)
        given = arrays(settings, heads=heads)
        given["lengths"] = np.minimum(given["lengths"] + window, given["key"].shape[2]).astype(np.int32)
        given["window"] = np.array([window, max(1, window - 3), 1, window // 2 + 1, window], np.int32)
        check(NativeOp(library, memory), given)


def test_scores_from_outside(library: NativeLibrary, memory: Memory) -> None:
    rng = np.random.default_rng(5)
    for variant in ({}, {"heads": "each"}, {"boundaries": "delimiter"}, {"heads": "each", "pooling": 1}):
        settings = replace(OWN.with_score("given"), **variant)
        given = arrays(settings) | {"query": None, "window": None}
        shape = (len(LENGTHS), 2, given["key"].shape[2])
        scores = rng.random(shape if settings.heads == "each" else (shape[0], shape[2])).astype(np.float32)
        scores[1, ..., 97 - WINDOW :] = np.nan  # the window and the padding are not read
        for packed in (False, True):
            check(NativeOp(library, memory, packed_rows=packed), given | {"scores": scores})


def test_a_full_window_gives_the_bits_of_no_window(library: NativeLibrary, memory: Memory) -> None:
    given = arrays(OWN)
    op = NativeOp(library, memory)
    plain = op.select(**(given | {"window": None}))
    for full in (WINDOW, WINDOW + 1, 2**31 - 1):  # larger ones are clamped
        again = op.select(**(given | {"window": np.full(len(LENGTHS), full, np.int32)}))
        assert [x.tobytes() for x in again] == [x.tobytes() for x in plain]


def test_equal_heads_choose_as_one(library: NativeLibrary, memory: Memory) -> None:
    given = arrays(OWN)
    query, key = (np.repeat(given[name][:, :1], given[name].shape[1], axis=1) for name in ("query", "key"))
    op = NativeOp(library, memory)
    shared = op.select(**(given | {"query": query, "key": key}))
    each = op.select(**(given | {"query": query, "key": key, "settings": replace(OWN, heads="each")}))
    for head in range(2):
        np.testing.assert_array_equal(each[0][:, head], shared[0])


CLASSES = replace(
    OWN,
    budget_split="classes",
    num_kv_heads=4,
    reading_heads=((0, 2), (), (1,), (0, 1, 2, 3)),
    reading_share_per_10k=16_000,
    local_share_per_10k=5_333,
    local_policy="chunks",
)


def test_class_lengths_are_pythons(library: NativeLibrary) -> None:
    rng = np.random.default_rng(1)
    partitions = [((0, 2), (), (1,), (0, 1, 2, 3)), ((0,), ()), ((), ()), ((0, 1, 2, 3),) * 2]
    for partition in partitions:
        heads, reading = 4 * len(partition), sum(map(len, partition))
        for share in (10_000, 12_345, 16_000, 80_000):
            local = 10_000 if reading in (0, heads) else max(0, (heads * 10_000 - reading * share) // (heads - reading))
            if abs(reading * share + (heads - reading) * local - heads * 10_000) >= 10_000:
                continue
            for _ in range(200):
                values = {"reading_heads": partition, "reading_share_per_10k": share, "local_share_per_10k": local}
                values |= {"keep_per_10k": int(rng.integers(1, 10_001)), "min_tokens": int(rng.integers(29, 300))}
                values["budget_tokens"] = int(rng.choice([0, 0, values["min_tokens"] + rng.integers(0, 9_000)]))
                settings, length = (
                    replace(CLASSES, **values),
                    int(rng.choice([rng.integers(0, 600), 4_194_304, 131_072])),
                )
                native = tuple(library.kept_tokens(settings, length, name) for name in ("reading", "local"))
                assert native == settings.class_lengths(length), (settings, length)


@pytest.mark.parametrize("policy", ["chunks", "recent"])
@pytest.mark.parametrize("heads", ["shared", "each"])
def test_classes_choose_their_own_lengths(library: NativeLibrary, memory: Memory, heads: str, policy: str) -> None:
    settings = replace(CLASSES, heads=heads, local_policy=policy)
    for packed in (False, True):
        op = NativeOp(library, memory, packed_rows=packed, layout="paged")
        lengths = [op.select(**arrays(settings), head_class=name)[1] for name in ("reading", "local")]
        for name in ("reading", "local"):
            check(op, arrays(settings) | {"head_class": name})
    for row, length in enumerate(LENGTHS):
        reading, all_heads = 7, 16
        assert reading * lengths[0][row] + (all_heads - reading) * lengths[1][row] <= all_heads * OWN.kept_tokens(
            length
        )


def test_a_call_may_be_about_some_heads(library: NativeLibrary, memory: Memory) -> None:
    """Scores and indices of heads 2 and 0 of four are those of a cache that holds only these."""
    settings = replace(OWN, heads="each", value_norm="on")
    given = arrays(settings, heads=(8, 4))
    numbers = np.array([2, 0], np.int32)
    queries = np.concatenate([given["query"][:, 2 * n : 2 * n + 2] for n in numbers], axis=1)
    op = NativeOp(library, memory)
    rows = op.rows(given["lengths"], given["key"].shape[2], window=given["window"])
    cache = make_cache(memory, given["key"], "paged", value=given["value"])
    width = library.max_chunks(settings, rows.max_length)
    outputs = {"chunk_scores": memory.empty((len(LENGTHS), 2, width), "float32")}
    outputs["token_scores"] = memory.empty((len(LENGTHS), 2, rows.max_length), "float32")
    query, placed = memory.put(given["query"]), memory.put(numbers)
    size = library.score_workspace(settings, rows, query, cache, kv_head_numbers=placed, **outputs)
    workspace = memory.empty((size,), "uint8")
    library.score(settings, rows, query, cache, workspace=workspace, kv_head_numbers=placed, **outputs)
    alone = op.select(
        **(given | {"query": queries, "key": given["key"][:, numbers], "value": given["value"][:, numbers]})
    )
    assert memory.get(outputs["token_scores"]).tobytes() == alone[2].tobytes()


@pytest.mark.parametrize("in_place", [False, True])
def test_compaction_per_head_and_of_some_heads(library: NativeLibrary, memory: Memory, in_place: bool) -> None:
    rng = np.random.default_rng(9)
    key = rng.integers(0, 256, (2, 4, 50, 64), np.uint8)
    kept, numbers = 20, np.array([3, 1], np.int32)
    indices = np.stack([[np.sort(rng.choice(50, kept, replace=False)) for _ in numbers] for _ in range(2)])
    cache = memory.put(key.view(np.int8))
    rows, listed = BatchRows(memory.put(np.array([50, 50], np.int32)), 50), memory.put(indices.astype(np.int32))
    counts, placed = memory.put(np.full(2, kept, np.int32)), memory.put(numbers)
    wanted = reference.compact_batch(key[:, numbers], indices)
    outputs, target = None, None
    if not in_place:
        target = memory.put(np.zeros((2, 2, kept, 64), np.int8))
        outputs = [contiguous_kv(target, memory.put(np.zeros((2, 2, kept, 64), np.int8)))]
    values = memory.put(key.view(np.int8))
    library.compact(rows, listed, counts, [contiguous_kv(cache, values)], outputs, kv_head_numbers=placed)
    if target is not None:
        np.testing.assert_array_equal(memory.get(target).view(np.uint8), wanted)
        return
    moved = memory.get(cache).view(np.uint8)
    np.testing.assert_array_equal(moved[:, numbers, :kept], wanted)
    np.testing.assert_array_equal(moved[:, [0, 2]], key[:, [0, 2]])
    np.testing.assert_array_equal(moved[:, numbers, kept:], key[:, numbers, kept:])


@pytest.mark.parametrize(
    ("gap", "everywhere"),
    [(gap, everywhere) for gap in (8, 16, 20, 24, 28, 32, 60, 80) for everywhere in (True, False)],
)
def test_any_spread_of_logits(library: NativeLibrary, memory: Memory, gap: float, everywhere: bool) -> None:
    """A token `gap` nats above the rest, in every tile or as a sink in the first, changes no chunk beyond rounding."""
    settings = replace(OWN, window=8, pooling=1)
    rng = np.random.default_rng(int(gap))
    key = rng.normal(size=(1, 1, 1500, 64))
    query = np.tile(np.eye(64)[0] * 8.0, (1, 4, 8, 1))
    key[..., 0] = rng.normal(size=1500) * 0.5
    key[0, 0, 1 : 1480 if everywhere else 2 : 64, 0] += gap
    given = {"query": query.astype(np.float16), "key": key.astype(np.float16), "lengths": np.array([1500], np.int32)}
    scores = NativeOp(library, memory).select(**given, settings=settings)[2]
    wanted = reference.select_batch(**given, settings=settings).token_scores
    starts = reference.chunk_starts(1500, settings)
    chunks, right = (reference.chunk_scores(x[0], starts, 1492) for x in (scores, wanted))
    normal = right > np.finfo(np.float32).tiny * 1e3
    assert np.abs(chunks[normal] / right[normal] - 1).max(initial=0.0) < TOLERANCE
    check(NativeOp(library, memory), given | {"settings": settings})


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (8, 1)])
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_equal_scores_keep_the_lowest_across_tiles(
    library: NativeLibrary, memory: Memory, reduce: str, heads: tuple[int, int]
) -> None:
    for window, chunk, sinks, length in ((32, 10, 4, 696), (8, 5, 0, 1508), (1, 20, 3, 704)):
        least = window + chunk + sinks
        settings = replace(
            OWN, window=window, chunk_size=chunk, sinks=sinks, min_tokens=least, pooling=1, window_reduce=reduce
        )
        given = {"query": np.ones((1, heads[0], window, 64), np.float16), "lengths": np.array([length], np.int32)}
        given["key"] = np.zeros((1, heads[1], length + 3, 64), np.float16)
        indices, lengths, _ = NativeOp(library, memory, chunks_alone=True).select(**given, settings=settings)
        front = np.arange(lengths[0] - window)
        np.testing.assert_array_equal(indices[0], np.concatenate([front, np.arange(length - window, length)]))


def test_contradictions_are_named(library: NativeLibrary, memory: Memory) -> None:
    given = arrays(OWN)
    op = NativeOp(library, memory)
    rows = op.rows(given["lengths"], given["key"].shape[2])
    with pytest.raises(NativeArgumentError, match="head_class is 'none'"):
        library.kept_tokens(OWN, 100, "none")
    with pytest.raises(NativeArgumentError, match="no axis of KV heads"):
        kept, counts = memory.empty((5, 40), "int32"), memory.empty((5,), "int32")
        library.select(replace(OWN, heads="each"), rows, memory.empty((5, 60), "float32"), kept, counts)
    with pytest.raises(NativeArgumentError, match=r"pass int32 \[5, 4, any\]"):
        cache = make_cache(memory, given["key"].repeat(2, axis=1), "contiguous")
        params_of = memory.empty((5, 2, 20), "int32")
        library.compact(rows, params_of, memory.empty((5,), "int32"), [cache])


def windows_of_garbage() -> NDArray[np.int32]:
    return np.array([-(2**31), -1, 0, 2**31 - 1, 21], np.int32)


@pytest.mark.parametrize("variant", ["as version 1", "each head by its largest"])
def test_garbage_stays_inside(library: NativeLibrary, memory: Memory, variant: str) -> None:
    """Windows and head numbers may be anything."""
    settings = replace(OWN, **VARIANTS[variant])
    given = arrays(settings) | {"window": windows_of_garbage()}
    rows = NativeOp(library, memory).rows(given["lengths"], given["key"].shape[2], window=given["window"])
    cache = make_cache(memory, given["key"], "contiguous", value=given.get("value"))
    numbers = memory.put(np.array([-5, 2**31 - 1], np.int32))
    width = library.max_chunks(settings, rows.max_length)
    each = (2,) if settings.heads == "each" else ()
    outputs = {"chunk_scores": memory.empty((len(LENGTHS), *each, width), "float32")}
    query = memory.put(given["query"])
    size = library.score_workspace(settings, rows, query, cache, kv_head_numbers=numbers, **outputs)
    workspace = memory.empty((size,), "uint8")
    library.score(settings, rows, query, cache, workspace=workspace, kv_head_numbers=numbers, **outputs)
