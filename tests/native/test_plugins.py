"""The TensorRT plugins in the plugin host: results against the reference, and everything that may go wrong."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from support import op_properties
from support.choice_properties import CHOICE_PROPERTIES
from support.messages import naming
from support.op_cases import KERNEL_CASES, STORAGE_TYPES, OpCase

from chunkkv import reference
from chunkkv.native import BatchRows, NativeLibrary, RawArray, contiguous_kv
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.onnx_graph import functions
from native.memory import Memory
from native.plugin_host import (
    CHAR,
    INT32,
    Field,
    HostError,
    PluginHost,
    Range,
    int_field,
    node_fields,
    run_node,
    text_field,
)
from native.plugin_op import COMPACT, DEFAULTS, SELECT, PluginOp, open_host, profile, select_values
from native.tensorrt_headers import Headers, own_headers, real_headers

SMALL = ChunkKVSettings(window=4, chunk_size=3, sinks=2, min_tokens=9, keep_per_10k=4_000)
EVERY_HEADERS = [own_headers(10), own_headers(11), *real_headers()]
FIELD_TYPES = range(-1, 14)


@pytest.fixture(scope="module")
def shared_host() -> PluginHost:
    return open_host(own_headers(11))


@pytest.fixture
def host(shared_host: PluginHost) -> PluginHost:
    shared_host.take_log()
    return shared_host


@pytest.fixture
def op(host: PluginHost, memory: Memory) -> PluginOp:
    return PluginOp(host, memory)


def case(lengths: tuple[int, ...] = (50, 33), settings: ChunkKVSettings = SMALL, **others: Any) -> OpCase:
    return OpCase("plugin", settings, lengths, head_dim=64, extra_padding=2, **others)


def small_values() -> list[NDArray[Any]]:
    inputs = case().inputs()
    return select_values(inputs.query, inputs.key, inputs.lengths, SMALL)


def select_fields(**changes: Any) -> list[Field]:
    return node_fields(functions.select_attributes(SMALL) | changes)


def stored_fields(**changes: Any) -> list[Field]:
    """Return the fields as an engine stores them."""
    attributes = functions.select_attributes(SMALL)
    told = {name: attributes.pop(name) for name in DEFAULTS if name in attributes}
    return node_fields(attributes | DEFAULTS | told | changes)


def test_creators_and_fields_are_those_of_the_nodes(host: PluginHost) -> None:
    different = replace(SMALL, window_reduce="max", head_reduce="max", value_norm="on", heads="each")
    attributes = functions.select_attributes(different, request_window=True) | {"head_class": "local"}
    wanted = {field.name: field.type for field in node_fields(attributes)}
    wanted |= dict.fromkeys(("max_kept", "all_heads", "all_reading_heads", "reading_share_per_10k"), INT32)
    fields = {key: names for key, *names in (line.split() for line in host.creators())}
    packed = [f"chunkkv::ChunkKV{name}:1" for name in ("Prepare", "Rope", "Score", "Compress")]
    assert sorted(fields) == sorted([SELECT, COMPACT, *packed])
    assert dict(name.split(":") for name in fields[SELECT]) == {name: str(number) for name, number in wanted.items()}
    named = node_fields(functions.compact_attributes(different))
    assert fields[COMPACT] == [f"{field.name}:{field.type}" for field in named]


@pytest.mark.parametrize("headers", EVERY_HEADERS, ids=[headers.name for headers in EVERY_HEADERS])
def test_every_set_of_headers(headers: Headers, memory: Memory) -> None:
    host = open_host(headers)
    assert host.lib.host_tensorrt_major() == headers.major
    op = PluginOp(host, memory)
    tried = case(settings=replace(SMALL, boundaries="delimiter"))
    assert op_properties.check_matches_reference(op.select, tried) == 0
    op_properties.check_compaction(op.select, op.compact, tried)
    with pytest.raises(HostError, match=naming("createPlugin ChunkKVSelect window 129 1")):
        host.attach(SELECT, stored_fields(window=129))


@pytest.mark.parametrize("tried", KERNEL_CASES, ids=lambda tried: tried.name)
def test_case_table(op: PluginOp, tried: OpCase) -> None:
    assert op_properties.check_matches_reference(op.select, replace(tried, head_dim=max(tried.head_dim, 64))) == 0


@pytest.mark.parametrize("check", (*op_properties.PROPERTIES, *CHOICE_PROPERTIES), ids=lambda check: check.__name__)
def test_properties(op: PluginOp, check: op_properties.Check) -> None:
    for settings in (replace(SMALL, pooling=3), replace(SMALL, boundaries="delimiter")):
        assert check(op.select, case((60, 12, 41), settings)) == 0


@pytest.mark.parametrize("storage", STORAGE_TYPES)
def test_storage_types(op: PluginOp, storage: str) -> None:
    inputs = case().inputs(storage)
    given = op.select(inputs.query, inputs.key, inputs.lengths, SMALL)
    wanted = reference.select_batch(inputs.query, inputs.key, inputs.lengths, SMALL)
    np.testing.assert_array_equal(given[0], wanted.kept_indices)
    np.testing.assert_array_equal(given[1], wanted.kept_lengths)
    np.testing.assert_allclose(given[2], wanted.token_scores, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("head_dim", [2, 64, 80])
def test_compaction_moves_bytes(op: PluginOp, dtype: str, head_dim: int) -> None:
    rng = np.random.default_rng(7)
    type_ = np.dtype(getattr(ml_dtypes, dtype, dtype))
    x = rng.integers(0, 256, (3, 5, 21, head_dim * type_.itemsize), np.uint8).view(type_)
    indices = np.full((3, 30), -1, np.int32)  # more slots than tokens: the capacity of a cache
    for row, kept in enumerate((21, 8, 1)):
        indices[row, :kept] = np.sort(rng.choice(21, kept, replace=False))
    given = op.compact(x, indices)
    np.testing.assert_array_equal(given.view(np.uint8), reference.compact_batch(x, indices).view(np.uint8))


def test_max_kept_is_the_width_of_the_list(host: PluginHost, memory: Memory) -> None:
    op = PluginOp(host, memory, max_kept=20)
    assert op_properties.check_matches_reference(op.select, case()) == 0
    inputs = case((50, 9)).inputs()
    keep_all = op.select(inputs.query, inputs.key, inputs.lengths, replace(SMALL, keep_per_10k=10_000))
    np.testing.assert_array_equal(keep_all[1], [20, 9])  # cut, as documented; never written beyond
    np.testing.assert_array_equal(keep_all[0][0], np.arange(20))


def test_garbage_contents_stay_inside(op: PluginOp) -> None:
    """TensorRT times plugins on whatever lies in memory; memory.release() looks for stray writes."""
    settings = replace(SMALL, boundaries="delimiter", pooling=3)
    rng = np.random.default_rng(3)
    inputs = case((40, 40, 40), settings).inputs()
    for _ in range(4):
        wild = rng.integers(-(2**31), 2**31 - 1, (3, 3 + 42), np.int64).astype(np.int32)
        values = select_values(inputs.query, inputs.key, inputs.lengths, settings, is_delimiter=wild[:, 3:])
        values[2:5] = wild[:, 0], wild[:, 1], wild[:, 2]
        run_node(*op.node(settings, values), op.memory, values)
        indices = rng.integers(-(2**31), 2**31 - 1, (3, 17), np.int64).astype(np.int32)
        op.compact(inputs.key, indices)


def test_workspace_of_the_profile_suffices_below_it(host: PluginHost, library: NativeLibrary) -> None:
    """Rows run in waves under a cap; a larger batch of shorter rows must not want more than the largest tensors."""
    batch, tokens, settings = 64, 100_000, replace(SMALL, window=128, min_tokens=140)
    row, query, key = (1,), (1, 64, 128, 64), (1, 8, 1, 64)
    ranges = [
        Range("float32", query, query, (batch, 64, 128, 64)),
        Range("float32", key, key, (batch, 8, tokens, 64)),
        *[Range("int32", row, row, (batch,))] * 3,
    ]
    given = host.build(SELECT, node_fields(functions.select_attributes(settings)), ranges).workspace

    def wanted(rows: int, length: int) -> int:
        def array(dtype: str, *shape: int) -> RawArray:
            return RawArray(4096, dtype, shape)  # only sizes are looked at

        cache = contiguous_kv(*[array("float32", rows, 8, length, 64)] * 2)
        scores = {"chunk_scores": array("float32", rows, library.max_chunks(settings, length))}
        scores["token_scores"] = array("float32", rows, length)
        queries = array("float32", rows, 64, 128, 64)
        return library.score_workspace(settings, BatchRows(array("int32", rows), length), queries, cache, **scores)

    sizes = [wanted(rows, length) for rows in (1, 2, 3, 8, 33, batch) for length in (1, 4096, 30_000, 60_000, tokens)]
    assert max(sizes) == wanted(batch, tokens) <= given


BAD_FIELDS = {
    "unknown": ([int_field("widow", 4)], "unknown 'widow' window chunk_size sinks boundaries"),
    "twice": ([int_field("window", 4)], "window twice"),
    "budget of another plugin": ([int_field("keep_per_10k", 1)], "unknown 'keep_per_10k'"),
    "no name": ([Field("", INT32, b"\0\0\0\0", 1)], "unknown ''"),
}
BAD_VALUES = {
    "window too small": ({"window": 0}, "window is 0; allowed is 1 to 128"),
    "window too large": ({"window": 129}, "window is 129; allowed is 1 to 128"),
    "chunk_size": ({"chunk_size": 257}, "chunk_size is 257; allowed is 1 to 256"),
    "sinks": ({"sinks": -1}, "sinks is -1; allowed is 0 to 65536"),
    "even pooling": ({"pooling": 2}, "pooling is 2; allowed are odd values"),
    "min_tokens": ({"min_tokens": 8}, "min_tokens is 8; it must be at least 9, window + sinks + chunk_size"),
    "boundaries": ({"boundaries": "fix"}, "boundaries is 'fix'; allowed are fixed, delimiter"),
    "score": ({"score": "softmaxx"}, "score is 'softmaxx'; allowed are softmax, logits"),
    "max_kept": ({"max_kept": 8}, "max_kept is 8; it must be 0 or at least min_tokens = 9"),
}


@pytest.mark.parametrize("extra, message", BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_extra_fields_are_refused(host: PluginHost, extra: list[Field], message: str) -> None:
    with pytest.raises(HostError, match=naming("createPlugin ChunkKVSelect", message)):
        host.build(SELECT, [*select_fields(), *extra], profile(small_values()))
    with pytest.raises(HostError, match=naming("ChunkKVCompact unknown field")):
        host.build(COMPACT, extra, [])


def test_a_plugin_without_fields_needs_no_collection(host: PluginHost) -> None:
    host.create_bare(COMPACT)
    with pytest.raises(HostError, match=naming("createPlugin ChunkKVSelect fields")):
        host.create_bare(SELECT)


@pytest.mark.parametrize("changes, message", BAD_VALUES.values(), ids=BAD_VALUES)
def test_bad_values_are_refused(host: PluginHost, changes: dict[str, Any], message: str) -> None:
    for attempt in (
        lambda: host.build(SELECT, select_fields(**changes), profile(small_values())),
        lambda: host.attach(SELECT, stored_fields(**changes)),
    ):
        with pytest.raises(HostError) as failure:
            attempt()
        step, line = str(failure.value).split("\n")
        assert step == "createPlugin returned nullptr"
        assert line.startswith("1 ChunkKVSelect: ") and message in line


@pytest.mark.parametrize("name", [field.name for field in stored_fields()])
def test_missing_and_mistyped_fields_are_refused(host: PluginHost, name: str) -> None:
    whole = {field.name: field for field in stored_fields()}
    del_one = [field for field in whole.values() if field.name != name]
    with pytest.raises(HostError, match=naming(name, "missing engine")):
        host.attach(SELECT, del_one)
    if name in DEFAULTS:
        host.build(SELECT, del_one, profile(small_values()))
    else:
        with pytest.raises(HostError, match=naming(name, "missing attribute")):
            host.build(SELECT, del_one, profile(small_values()))
    right = whole[name]
    room = right._replace(data=bytes(1024))
    wrong = [room._replace(type=kind) for kind in FIELD_TYPES if kind != right.type]
    wrong += [right._replace(data=None), right._replace(length=0), right._replace(length=-1)]
    wrong += [room._replace(length=2)] if right.type == INT32 else []
    for field in wrong:
        with pytest.raises(HostError, match=naming(name, "type")):
            host.attach(SELECT, [*del_one, field])


def test_words_may_come_without_their_nul(host: PluginHost) -> None:
    fields = [field for field in stored_fields() if field.type != CHAR]
    words = [Field("boundaries", CHAR, b"fixed", 5), Field("score", CHAR, b"softmax", 7)]
    fields += [field for field in stored_fields() if field.type == CHAR and field.name not in ("boundaries", "score")]
    host.attach(SELECT, [*words, *fields])
    with pytest.raises(HostError, match=naming("score 'softma'")):
        host.attach(SELECT, [*fields, words[0], Field("score", CHAR, b"softmax", 6)])


def test_what_is_stored_is_what_was_given(host: PluginHost) -> None:
    built = host.build(SELECT, select_fields(max_kept=30), profile(small_values()))
    assert built.fields == stored_fields(max_kept=30)
    assert host.build(SELECT, built.fields[::-1], profile(small_values())).fields == built.fields


@pytest.mark.parametrize("seed", range(4))
def test_damaged_engines(host: PluginHost, seed: int) -> None:
    rounds = 3_000
    accepted = host.fuzz(SELECT, stored_fields(), seed, rounds)
    refused = len(host.take_log())
    assert accepted + refused == rounds, "every refusal logs one line"
    assert accepted > rounds // 50 and refused > rounds // 2
    assert host.fuzz(COMPACT, [text_field("note", "none of its own")], seed, 50) < 50


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "int8", "int64"])
def test_wrong_data_types(host: PluginHost, memory: Memory, place: int, dtype: str) -> None:
    values = small_values()
    if values[place].dtype == dtype:
        dtype = "bool"
    ranges = profile(values)
    ranges[place] = ranges[place]._replace(dtype=dtype)
    with pytest.raises(HostError, match="position"):
        host.build(SELECT, select_fields(), ranges)
    if dtype == "bool":
        return
    built = host.build(SELECT, select_fields(), profile(values))
    values[place] = values[place].astype(dtype)
    with pytest.raises(HostError, match=naming("onShapeChange ChunkKVSelect input type")):
        run_node(built, host.attach(SELECT, built.fields), memory, values)


WRONG_SHAPES = {
    "window": (0, np.s_[:, :, :3], "dimension 2 of query is 3; allowed is 4 to 4"),
    "batch": (1, np.s_[:1], "dimension 0 of key is 1; allowed is 2 to 2"),
    "head size": (1, np.s_[..., :32], "dimension 3 of key is 32; allowed is 64 to 64"),
    "both head sizes": (None, np.s_[..., :48], "head_dim is 48; there are kernels for 64, 80, 96, 128, 256"),
    "heads": (0, np.s_[:, :3], "heads is 3, kv_heads is 2; heads must be a multiple of kv_heads"),
    "rank": (1, np.s_[0], "key has 3 dimensions"),
    "lengths": (2, np.s_[:1], "dimension 0 of lengths is 1; allowed is 2 to 2"),
}


@pytest.mark.parametrize("place, part, message", WRONG_SHAPES.values(), ids=WRONG_SHAPES)
def test_wrong_shapes(op: PluginOp, place: int | None, part: Any, message: str) -> None:
    values = small_values()
    built, running = op.node(SMALL, values)
    outputs = [
        op.memory.empty(shape, dtype) for dtype, shape in built.output_shapes([op.memory.put(v) for v in values])
    ]
    for i in (0, 1) if place is None else (place,):
        values[i] = np.ascontiguousarray(values[i][part])
    with pytest.raises(HostError) as failure:
        running.run([op.memory.put(value) for value in values], outputs, op.memory.empty((built.workspace,), "int8"))
    assert message in str(failure.value)
    with pytest.raises(HostError, match=r"configurePlugin|getOutputShapes"):
        op.host.build(SELECT, select_fields(), [Range(v.dtype.name, v.shape, v.shape, v.shape) for v in values])


def test_corners_of_a_profile_are_bounds(host: PluginHost, memory: Memory) -> None:
    """TensorRT bounds each tensor by itself: sizes fit each other at kOPT alone; the workspace suits the largest."""
    values = small_values()
    room = profile(values, room=20)
    tight = host.build(SELECT, select_fields(), room)
    query, key, lengths, *others = profile(values)
    query = query._replace(min=(0, 0, 0, 0), max=(1, 9, 3, 48))
    key = key._replace(min=(-7, 0, -50, 1), max=(room[1].max[0], 9, room[1].max[2], 1000))
    loose = [query, key, lengths._replace(max=(-1,)), *others]
    built = host.build(SELECT, select_fields(), loose)
    assert built.workspace == tight.workspace > 0
    run_node(built, host.attach(SELECT, built.fields), memory, [np.repeat(value, 11, axis=0) for value in values])
    unbounded = [query, key._replace(max=(2**40,) * 4), *loose[2:]]
    assert host.build(SELECT, select_fields(), unbounded).workspace > tight.workspace
    wrong = ((0, (2, 4, 3, 64), "2 of query is 3"), (0, (3, 4, 4, 64), "0 of key is 2"), (2, (3,), "0 of lengths is 3"))
    for place, opt, message in wrong:
        ranges = [*loose[:place], loose[place]._replace(opt=opt), *loose[place + 1 :]]
        with pytest.raises(HostError, match=naming("configurePlugin ChunkKVSelect", message)):
            host.build(SELECT, select_fields(), ranges)


def test_outputs_that_do_not_follow_from_the_inputs(op: PluginOp) -> None:
    values = small_values()
    built, running = op.node(SMALL, values)
    inputs = [op.memory.put(value) for value in values]
    for place, wrong in enumerate([(2, 5), (1,), (2, 51)]):
        outputs = [op.memory.empty(shape, dtype) for dtype, shape in built.output_shapes(inputs)]
        outputs[place] = op.memory.empty(wrong, outputs[place].dtype)
        with pytest.raises(HostError, match=naming("shape output", place)):
            running.run(inputs, outputs, op.memory.empty((built.workspace,), "int8"))
    with pytest.raises(HostError, match=naming("enqueue ChunkKVSelect workspace NULL")):
        run_node(built, running, op.memory, values, workspace_bytes=0)
    with pytest.raises(HostError, match=naming("5 inputs 3 outputs 6")):
        op.host.build(SELECT, select_fields(boundaries="delimiter"), profile(values))


def test_zero_sized_tensors(op: PluginOp) -> None:
    for boundaries in ("fixed", "delimiter"):
        settings = replace(SMALL, boundaries=boundaries)
        for batch, tokens in ((0, 20), (2, 0), (0, 0)):
            key = np.zeros((batch, 2, tokens, 64), np.float32)
            flags = np.zeros((batch, tokens), np.bool_) if boundaries == "delimiter" else None
            lengths = np.full(batch, min(tokens, 5), np.int32)
            query = np.zeros((batch, 4, 4, 64), np.float32)
            indices, kept, scores = op.select(query, key, lengths, settings, is_delimiter=flags)
            values = select_values(query, key, lengths, settings, is_delimiter=flags)
            if batch == 0:  # nothing to do needs no workspace either
                run_node(*op.node(settings, values), op.memory, values, workspace_bytes=0)
            assert indices.shape == (batch, 0) and scores.shape == (batch, tokens) and not kept.any()
    for shape, slots in (((0, 2, 9, 64), 4), ((2, 2, 9, 64), 0), ((2, 0, 9, 64), 4), ((2, 2, 0, 64), 0)):
        given = op.compact(np.ones(shape, np.float32), np.full((shape[0], slots), -1, np.int32))
        assert given.shape == (*shape[:2], slots, 64)
    with pytest.raises(HostError, match=naming("x kept_indices")):
        op.compact(np.ones((1, 2, 0, 64), np.float32), np.full((1, 3), -1, np.int32))


def test_two_contexts_in_two_threads(host: PluginHost, library: NativeLibrary) -> None:
    """The contexts attach to one plugin, each in its thread, and have their own lengths, shapes and failures."""
    cases = [case((60, 31)), case((44,), seed=5)]
    built = host.build(SELECT, select_fields(), profile(small_values(), room=20))
    engine, start = host.deserialise(SELECT, built.fields), threading.Barrier(2, timeout=60)

    def work(which: int) -> None:
        memory, context, inputs = Memory(library.device), engine.attach(), cases[which].inputs()
        values = select_values(inputs.query, inputs.key, inputs.lengths, SMALL)
        wanted = reference.select_batch(inputs.query, inputs.key, inputs.lengths, SMALL)
        start.wait()
        for _ in range(8):
            indices, kept, _ = run_node(built, context, memory, values)
            np.testing.assert_array_equal(kept, wanted.kept_lengths)
            np.testing.assert_array_equal(indices[:, : kept.max()], wanted.kept_indices)
            with pytest.raises(HostError):
                host.attach(SELECT, select_fields(window=1_000 + which))
        memory.release()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
