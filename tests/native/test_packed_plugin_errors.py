"""What the packed plugins refuse: fields, types, shapes, damaged engines, and batches that must not be compacted."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from chunkkv.native import NativeLibrary, RawArray
from native.memory import Memory
from native.packed_batch import SETTINGS, PackedBatch, Pools
from native.plugin_host import CHAR, INT32, Field, HostError, Range, node_fields
from native.plugin_op import FLAVOUR, HOST_INPUTS, PluginNode, open_host
from native.test_boundaries import DELIMITERS
from native.test_packed_plugins import DELIMITED, prepare_fields, prepare_inputs

Arrays = list[NDArray[Any]]
ROLES = ("leader", "ranker", "follower")
NODES = ("prepare", "rope", "score", *ROLES)


def node_of(name: str, memory: Memory, batch: PackedBatch | None = None) -> tuple[str, dict[str, Any], Arrays]:
    """Return plugin, fields and inputs of a node that works, with delimiter boundaries unless `batch` says else."""
    batch = batch or PackedBatch(settings=DELIMITED)
    pools = Pools(batch, memory, pool_of_layer=(0, 1, 0), mapping_rank=1)
    if name == "prepare":
        ids = np.full(batch.tokens, 5, np.int32) if batch.settings.boundaries == "delimiter" else None
        return "ChunkKVPrepare", prepare_fields(batch), prepare_inputs(batch, pools, ids)
    if name == "rope":
        fields = batch.head_fields() | {"rotary_dim": 64, "neox": 1, "max_positions": 70, "behind": 0}
        positions = np.zeros(batch.tokens, np.int32)
        return "ChunkKVRope", fields, [batch.qkv, positions, np.zeros((1, 70 * 64), np.float32)]
    if name == "score":
        return "ChunkKVScore", batch.score_fields(), batch.score_inputs()
    source = {"leader": batch.qkv, "ranker": np.zeros(batch.tokens, np.float32), "follower": batch.indices()}[name]
    return "ChunkKVCompress", pools.fields(name, [0, 1]), pools.inputs(name, pools.context(), source)


def refusal(attempt: Callable[[], Any]) -> str:
    with pytest.raises(HostError) as failure:
        attempt()
    return str(failure.value)


def refused(name: str, fields: dict[str, Any], inputs: Arrays, memory: Memory) -> str:
    return refusal(lambda: PluginNode(name, fields, memory=memory).run(inputs))


def placed(name: str, inputs: Arrays, memory: Memory) -> list[RawArray]:
    """Return where the inputs lie: host tensors where they are, the others in `memory`."""
    host = HOST_INPUTS.get(name, ())
    return [
        RawArray(value.ctypes.data, value.dtype.name, value.shape) if i in host else memory.put(value)
        for i, value in enumerate(inputs)
    ]


BAD_VALUES: dict[str, tuple[str, dict[str, Any], str]] = {
    "window": ("prepare", {"window": 129}, "window is 129; allowed is 1 to 128"),
    "chunk_size": ("score", {"chunk_size": 0}, "chunk_size is 0; allowed is 1 to 256"),
    "sinks": ("leader", {"sinks": -1}, "sinks is -1; allowed is 0 to 65536"),
    "boundaries": ("score", {"boundaries": "fix"}, "boundaries is 'fix'; allowed are fixed, delimiter"),
    "score": ("score", {"score": "soft"}, "score is 'soft'; allowed are softmax, logits"),
    "pooling": ("score", {"pooling": 4}, "pooling is 4; allowed are odd values"),
    "keep_per_10k": ("prepare", {"keep_per_10k": 10_001}, "keep_per_10k is 10001; allowed is 1 to 10000"),
    "budget_tokens": ("follower", {"budget_tokens": -1}, "budget_tokens is -1; allowed is 0 to"),
    "min_tokens": ("follower", {"min_tokens": 8}, "min_tokens is 8; it must be at least 9"),
    "max_length": ("prepare", {"max_length": 2**22 + 1}, "max_length is 4194305; allowed is 1 to 4194304"),
    "block size": ("prepare", {"tokens_per_block": 24}, "tokens_per_block is 24; it must be a power of two"),
    "block size of pool": ("ranker", {"tokens_per_block": 24}, "tokens_per_block is 24; it must be a power of two"),
    "no vocabulary": ("prepare", {"vocab_size": 0}, "vocab_size is 0, but boundaries is delimiter"),
    "vocabulary": ("prepare", {"vocab_size": 2**22 + 1}, "vocab_size is 4194305; allowed is 0 to 4194304"),
    "bitmap": ("prepare", {"vocab_size": 9_999}, "words; vocab_size 9999 takes 313"),
    "unused bitmap": ("prepare", {"boundaries": "fixed"}, "delimiter_bitmap is given, but boundaries is fixed"),
    "role": ("leader", {"role": "lead"}, "role is 'lead'; allowed are leader, ranker, follower"),
    "layers": ("follower", {"layers": [0, -1]}, "layers is -1; allowed is 0 to 65535"),
    "too many layers": ("follower", {"layers": [0] * 257}, "layers has field type 5 and length 257"),
    "places": (
        "follower",
        {"layer_in_pool": [0]},
        "layers has 2 entries, layer_in_pool has 1; give one for each layer",
    ),
    "kv_bytes": ("follower", {"kv_bytes": 3}, "kv_bytes is 3; it must be a power of two"),
    "large kv_bytes": ("follower", {"kv_bytes": 8}, "kv_bytes is 8; allowed is 1 to 4"),
    "mapping_rank": ("leader", {"mapping_rank": 3}, "mapping_rank is 3; allowed is 1 to 2"),
    "heads": ("leader", {"num_heads": 3}, "heads is 3, kv_heads is 2; heads must be a multiple of kv_heads"),
    "head size": ("score", {"head_size": 48}, "head_dim is 48; there are kernels for 64, 80, 96, 128, 256"),
    "rope's head size": ("rope", {"head_size": 512}, "head_dim is 512; allowed are even values from 2 to 256"),
    "rotary_dim": ("rope", {"rotary_dim": 33}, "rotary_dim is 33; it must be even"),
    "large rotary_dim": ("rope", {"rotary_dim": 66}, "rotary_dim is 66; allowed is 2 to 64"),
    "style": ("rope", {"neox": 2}, "neox is 2; allowed is 0 to 1"),
    "positions": ("rope", {"max_positions": 0}, "max_positions is 0; allowed is 1 to"),
}


@pytest.mark.parametrize("node, changes, message", BAD_VALUES.values(), ids=BAD_VALUES)
def test_bad_values(memory: Memory, node: str, changes: dict[str, Any], message: str) -> None:
    name, fields, inputs = node_of(node, memory)
    text = refused(name, fields | changes, inputs, memory)
    assert text.startswith(f"createPlugin returned nullptr\n1 {name}: ") and message in text
    key = PluginNode(name, fields).key
    assert message in refusal(lambda: open_host().attach(key, node_fields(fields | changes)))


@pytest.mark.parametrize("node", NODES)
def test_missing_and_mistyped_fields(memory: Memory, node: str) -> None:
    name, fields, inputs = node_of(node, memory)
    key, host, whole = PluginNode(name, fields).key, open_host(), node_fields(fields)
    PluginNode(name, fields, memory=memory).run(inputs)
    optional = {
        "vocab_size": "vocab_size is 0",
        "delimiter_bitmap": "has 0 words",
        "layer_in_pool": "layer_in_pool has 0",
    }
    for field in whole:
        others = [other for other in whole if other is not field]
        missing = {other: value for other, value in fields.items() if other != field.name}
        wanted = optional.get(field.name, f"{field.name} is missing; set it as an attribute of the node")
        if field.name in ("window_reduce", "head_reduce", "value_norm", "order_only", "behind"):
            PluginNode(name, missing, memory=memory).run(inputs)
        else:
            assert wanted in refused(name, missing, inputs, memory)
        wanted = optional.get(field.name, "")
        wanted = wanted if "has 0" in wanted else f"{field.name} is missing; the engine is damaged"
        assert wanted in refusal(lambda given=others, text=wanted: host.attach(key, given))
        wrong = [field._replace(type=kind, data=bytes(2**16)) for kind in range(-1, 14) if kind != field.type]
        wrong += [field._replace(data=None), field._replace(length=0), field._replace(length=-1)]
        for bad in wrong:
            text = refusal(lambda given=[*others, bad]: host.attach(key, given))
            assert f"{field.name} has field type" in text
        assert "is given twice" in refusal(lambda given=[*whole, field]: host.attach(key, given))
    unknown = Field("widow", INT32, bytes(4), 1)
    assert "unknown field 'widow'; known are" in refusal(lambda: host.attach(key, [*whole, unknown]))


@pytest.mark.parametrize("node", NODES)
def test_what_is_stored_is_what_was_given(memory: Memory, node: str) -> None:
    name, fields, inputs = node_of(node, memory)
    made = PluginNode(name, fields, memory=memory)
    first = made.run(inputs)
    assert {field.name: field for field in made.built.fields} == {field.name: field for field in node_fields(fields)}
    ranges = [Range(value.dtype.name, value.shape, value.shape, value.shape) for value in inputs]
    again = made.host.build(made.key, made.built.fields[::-1], ranges)
    assert again.fields == made.built.fields
    copy = PluginNode(name, dict(reversed(fields.items())), memory=memory).run(inputs)
    assert [value.shape for value in copy] == [value.shape for value in first]


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("seed", range(2))
def test_damaged_engines(memory: Memory, node: str, seed: int) -> None:
    name, fields, inputs = node_of(node, memory)
    host, rounds = open_host(), 1_000
    made = PluginNode(name, fields, memory=memory)
    made.run(inputs)
    host.take_log()
    accepted = host.fuzz(made.key, made.built.fields, seed, rounds)
    assert accepted + len(host.take_log()) == rounds, "every refusal logs one line"
    assert rounds // 100 < accepted < rounds // 2


# Sizes that follow from nothing else: input, axis.
FREE = {"prepare": {(5, 0), (5, 3), (6, 1)}, "rope": set(), "score": set()} | {role: {(7, 3), (9, 0)} for role in ROLES}


@pytest.mark.parametrize("node", NODES)
def test_wrong_shapes_and_types(memory: Memory, node: str) -> None:
    name, fields, inputs = node_of(node, memory)
    made = PluginNode(name, fields, memory=memory)
    outputs = [memory.put(value) for value in made.run(inputs)]
    raw = placed(name, inputs, memory)
    workspace = memory.empty((made.built.workspace,), "int8") if made.built.workspace else None

    def run(ins: list[RawArray], outs: list[RawArray]) -> None:
        made.running.run(ins, outs, workspace)

    run(raw, outputs)
    for place, array in enumerate(raw):
        changed = [replace(array, shape=(*array.shape, 1), strides=None)]
        changed += [replace(array, dtype="int8", strides=None)]
        for axis, size in enumerate(array.shape):
            if (place, axis) not in FREE[node]:
                changed += [
                    replace(array, shape=(*array.shape[:axis], size + d, *array.shape[axis + 1 :]), strides=None)
                    for d in (-1, 1)
                ]
        for bad in changed:
            assert refusal(lambda at=place, new=bad: run([*raw[:at], new, *raw[at + 1 :]], outputs)).startswith(
                "onShape"
            )
    for place, array in enumerate(outputs):
        bad = replace(array, shape=(array.shape[0] + 1, *array.shape[1:]), strides=None)
        text = refusal(lambda at=place, new=bad: run(raw, [*outputs[:at], new, *outputs[at + 1 :]]))
        assert f"the shape of output {place} does not follow" in text
    for place, value in enumerate(inputs):
        ranges = [Range(v.dtype.name, v.shape, v.shape, v.shape) for v in inputs]
        ranges[place] = ranges[place]._replace(dtype="bool")
        text = refusal(lambda given=ranges: made.host.build(made.key, node_fields(fields), given))
        assert f"position {place}" in text or "data type" in text, value


def with_value(array: NDArray[Any], place: Any, value: int) -> NDArray[Any]:
    changed = array.copy()
    changed[place] = value
    return changed


BAD_BATCHES: dict[str, tuple[int, Any, int, str]] = {
    "type": (2, 1, 2, "host_request_types of row 1 is 2; allowed are 0 (context) and 1 (generation)"),
    "order": (2, 0, 1, "row 1 is a context row behind a generation row; put context rows first"),
    "no prompt": (3, 1, 0, "row 1 has a prompt of 0 tokens; allowed is 1 to 64, the max_length of the plugin"),
    "long prompt": (3, 0, 65, "row 0 has a prompt of 65 tokens; allowed is 1 to 64"),
    "sum": (3, 0, 51, "the rows have 93 tokens, the packed tensors 92; use remove_input_padding"),
}


@pytest.mark.parametrize("node", ["prepare", "score", *ROLES])
@pytest.mark.parametrize("offset, place, value, message", BAD_BATCHES.values(), ids=BAD_BATCHES)
def test_bad_batches(memory: Memory, node: str, offset: int, place: Any, value: int, message: str) -> None:
    name, fields, inputs = node_of(node, memory)
    host = HOST_INPUTS[name][offset - 2]
    text = refused(name, fields, [*inputs[:host], with_value(inputs[host], place, value), *inputs[host + 1 :]], memory)
    assert text.startswith(f"enqueue\n1 {name}: ") and message in text


BAD_CACHES: dict[str, tuple[str, int, Any, int, str]] = {
    "chunked": ("prepare", 4, 2, 34, "context row 2 has 33 tokens, but 34 in its cache; switch off chunked context"),
    "host K": (
        "prepare",
        5,
        (0, 0, 0, 6),
        -(2**31),
        "block 6 of context row 0 is in host memory; switch off offloading",
    ),
    "host V": ("prepare", 5, (1, 2, 1, 4), -5, "block 4 of context row 2 is in host memory"),
    "pool": ("leader", 9, 1, 2, "host_kv_cache_pool_mapping puts layer 1 at place 0 of pool 2; there are 2 pools"),
    "negative pool": ("follower", 9, 0, -1, "puts layer 0 at place 0 of pool -1"),
    "address": ("ranker", 8, (1, 0), 0, "the address of pool 1 is 0"),
}


@pytest.mark.parametrize("node, host, place, value, message", BAD_CACHES.values(), ids=BAD_CACHES)
def test_bad_caches(memory: Memory, node: str, host: int, place: Any, value: int, message: str) -> None:
    name, fields, inputs = node_of(node, memory)
    text = refused(name, fields, [*inputs[:host], with_value(inputs[host], place, value), *inputs[host + 1 :]], memory)
    assert text.startswith(f"enqueue\n1 {name}: ") and message in text


def test_caches_that_are_none_of_prepares_business(memory: Memory) -> None:
    """Blocks behind a prompt, blocks of generation rows and the past of generation rows may be anything."""
    name, fields, inputs = node_of("prepare", memory)
    inputs[5] = with_value(with_value(inputs[5], (0, 0, 0, slice(7, None)), -1), (1, 3), -1)
    inputs[4] = with_value(inputs[4], slice(3, None), -9)
    PluginNode(name, fields, memory=memory).run(inputs)


def test_tables_that_are_too_small(memory: Memory) -> None:
    name, fields, inputs = node_of("prepare", memory)
    inputs[5] = inputs[5][..., :6].copy()
    assert "row 0 has 50 tokens, which take 7 blocks; the block table has 6" in refused(name, fields, inputs, memory)
    name, fields, inputs = node_of("follower", memory)
    inputs[7] = inputs[7][..., :6].copy()
    assert "max_blocks * tokens_per_block is 48; it must be at least 50" in refused(name, fields, inputs, memory)


def test_mappings(memory: Memory) -> None:
    name, fields, inputs = node_of("leader", memory)
    text = refused(name, fields | {"layers": [0, 3]}, inputs, memory)
    assert "layers holds 3, but host_kv_cache_pool_mapping has 3 layers; use numbers of this pipeline stage" in text
    text = refused(name, fields | {"mapping_rank": 2}, inputs, memory)
    assert "input 9 has 1 dimensions; it must have 2" in text
    wide = [*inputs[:9], np.array([[0, -1], [0, 1], [0, 2]], np.int32), *inputs[10:]]
    two = {key: value for key, value in fields.items() if key != "layer_in_pool"} | {"mapping_rank": 2}
    assert "puts layer 0 at place -1 of pool 0" in refused(name, two, wide, memory)
    text = refused(name, fields | {"layers": [0, 2], "layer_in_pool": [1, 1]}, inputs, memory)
    assert "layers 0 and 2 have the same place in pool 0; give each its own in layer_in_pool" in text
    assert "layers 1 and 1 have the same place" in refused(name, fields | {"layers": [1, 1]}, inputs, memory)


@pytest.mark.parametrize("node", ["prepare", "score", *ROLES])
def test_null_host_tensors_and_workspace(memory: Memory, node: str) -> None:
    name, fields, inputs = node_of(node, memory)
    made = PluginNode(name, fields, memory=memory)
    outputs = [memory.put(value) for value in made.run(inputs)]
    raw = placed(name, inputs, memory)
    workspace = memory.empty((made.built.workspace,), "int8") if made.built.workspace else None
    for place in HOST_INPUTS[name]:
        given = [*raw[:place], replace(raw[place], pointer=0), *raw[place + 1 :]]
        assert "is NULL" in refusal(lambda ins=given: made.running.run(ins, outputs, workspace))
    if workspace:
        assert "the workspace is NULL" in refusal(lambda: made.running.run(raw, outputs, None))


def test_number_of_inputs(memory: Memory) -> None:
    for node, counts in (("prepare", "7 inputs and 5"), ("score", "5 inputs and 1"), ("leader", "10 inputs and 2")):
        name, fields, inputs = node_of(node, memory)
        assert f"{counts} outputs; with these fields it has" in refused(name, fields, inputs[:-1], memory)
        batch = PackedBatch(settings=SETTINGS)
        name, fields, inputs = node_of(node, memory, batch)
        extra = [*inputs, np.zeros(batch.tokens, np.int32)]
        assert "outputs; with these fields it has" in refused(name, fields, extra, memory)
    name, fields, inputs = node_of("follower", memory)
    assert "11 inputs and 1 outputs" in refused(name, fields, [*inputs, inputs[1]], memory)


def test_contexts_have_bitmaps_of_their_own(library: NativeLibrary, memory: Memory) -> None:
    """Contexts attach to one engine, come and go in any order, and run at once."""
    name, fields, inputs = node_of("prepare", memory)
    made = PluginNode(name, fields, memory=memory)
    made.run(inputs)
    engine, start = made.host.deserialise(made.key, made.built.fields), threading.Barrier(3, timeout=60)
    ids = np.resize(np.array([*DELIMITERS, 5], np.int32), len(inputs[7]))

    def work(_: int) -> None:
        own = Memory(library.device)
        start.wait()
        for _ in range(20):
            context = engine.attach()
            raw = placed(name, [*inputs[:7], ids], own)
            outputs = [own.empty(shape, dtype) for dtype, shape in made.built.output_shapes(raw)]
            context.run(raw, outputs, None)
            np.testing.assert_array_equal(own.get(outputs[4]), np.isin(ids, DELIMITERS))
        own.release()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))


def test_contexts_take_their_bitmaps_with_them(memory: Memory) -> None:
    if memory.on_device or FLAVOUR == "asan":
        pytest.skip("the size of the process shows what host memory alone has lost")
    name, fields, _ = node_of("prepare", memory)
    fields |= {"vocab_size": 2**22, "delimiter_bitmap": np.ones(2**17, np.int32)}
    engine = open_host().deserialise(PluginNode(name, fields).key, node_fields(fields))

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()

    engine.attach()
    before = resident()
    for _ in range(200):
        engine.attach()
    assert resident() - before < 50 * 2**19, "half a megabyte each"


def test_words_come_as_text(memory: Memory) -> None:
    name, fields, _ = node_of("follower", memory)
    kinds = {field.name: field.type for field in node_fields(fields)}
    listed = next(line for line in open_host().creators() if line.startswith(f"chunkkv::{name}:1 "))
    assert dict(entry.split(":") for entry in listed.split()[1:]) == {key: str(kind) for key, kind in kinds.items()}
    assert kinds["role"] == CHAR and kinds["layers"] == INT32
