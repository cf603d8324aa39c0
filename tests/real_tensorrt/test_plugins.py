"""Every plugin in a network of its own: what TensorRT builds, which shapes it computes, and what it refuses."""

from __future__ import annotations

import re

import pytest
from support.messages import naming

from chunkkv.gpu.tensorrt_library import TensorRT

from .plugin_nodes import (
    HEAD_SIZE,
    HEADS,
    QKV_WIDTH,
    Node,
    compact,
    compress,
    prepare,
    rope,
    score,
    select,
    select_each,
)
from .small_networks import SmallNetworks

FLOATS = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
TYPES = {**FLOATS, "fp8": "FP8", "int32": "INT32"}
ROLES = ("leader", "ranker", "follower")


@pytest.fixture
def networks(rtx: TensorRT, plugins: None) -> SmallNetworks:
    return SmallNetworks(rtx)


def working_nodes() -> dict[str, Node]:
    """Return one node for each combination of type, boundaries, role and rank of the mapping that there is."""
    nodes = {}
    for dtype in FLOATS:
        nodes |= {f"compact {dtype}": compact(dtype), f"rope {dtype}": rope(dtype)}
        nodes |= {f"compact each {dtype}": compact(dtype, each=True), f"select each {dtype}": select_each(dtype)}
        for delimited in (False, True):
            name = f"{dtype} {'delimiter' if delimited else 'fixed'}"
            nodes |= {f"select {name}": select(dtype, delimited), f"score {name}": score(dtype, delimited)}
            nodes[f"prepare {name}"] = prepare(dtype, delimited)
            for role in ROLES:
                mapping_rank = 1 if delimited else 2
                nodes[f"{role} {name}"] = compress(role, dtype, delimited, mapping_rank=mapping_rank)
    return nodes | {"select given": select_each(given=True)}


@pytest.mark.parametrize("node", working_nodes().values(), ids=working_nodes().keys())
def test_a_node_is_built_with_the_shapes_and_types_it_is_said_to_have(networks: SmallNetworks, node: Node) -> None:
    outcome = networks.build(node)
    assert outcome.errors == () and outcome.engine
    assert outcome.layers.count("PLUGIN_V3") == 1 and outcome.layers.count("ELEMENTWISE") == len(node.outputs)
    assert {t.name: TYPES[t.dtype] for t in node.outputs}.items() <= outcome.output_types.items()


@pytest.mark.parametrize("role", ROLES)
def test_the_output_of_fp8_attention_is_passed_on(networks: SmallNetworks, role: str) -> None:
    outcome = networks.build(compress(role, context="fp8"), check_shapes=False)
    assert outcome.errors == () and outcome.engine and outcome.output_types["context_out"] == "FP8"


def test_a_bound_on_the_kept_tokens_bounds_the_output(networks: SmallNetworks) -> None:
    """min(S, max_kept), where TensorRT looks at S = 40."""
    bounded = select().with_fields(max_kept=20)
    assert re.search(naming("20 != 40"), networks.build(bounded).refusal())
    assert networks.build(bounded.with_output("kept_indices", ("B", 20))).errors == ()
    assert networks.build(select().with_fields(max_kept=64)).errors == ()


WRONG_SHAPES = {
    "select indices": (select(), "kept_indices", ("B", "T")),
    "select lengths": (select(), "kept_lengths", ("R",)),
    "select scores": (select(), "token_scores", ("R", "S")),
    "compact": (compact(), "y", ("B", 2, "S", HEAD_SIZE)),
    "select each indices": (select_each(), "kept_indices", ("B", 2, "T")),
    "select each scores": (select_each(given=True), "token_scores", ("B", "S", 2)),
    "prepare lengths": (prepare(), "kept_lengths", ("R",)),
    "prepare positions": (prepare(), "positions", ("U",)),
    "rope": (rope(), "rotated", ("U", QKV_WIDTH)),
    "score": (score(), "chunk_scores", ("U",)),
    "context": (compress("follower"), "context_out", ("U", HEADS * HEAD_SIZE)),
    "leader": (compress("leader"), "kept_indices_out", ("U",)),
}


@pytest.mark.parametrize(("node", "output", "dims"), WRONG_SHAPES.values(), ids=WRONG_SHAPES)
def test_another_shape_of_an_output_would_be_noticed(networks: SmallNetworks, node, output, dims) -> None:
    assert "not compatible for elementwise" in networks.build(node.with_output(output, dims)).refusal()


WRONG_TYPES = {
    "select query": (select(), "query", "int8"),
    "select key": (select("float16"), "key", "float32"),
    "select lengths": (select(), "lengths", "int64"),
    "compact": (compact(), "x", "int64"),
    "select value": (select_each("float16"), "value", "float32"),
    "select window": (select_each(), "window", "int64"),
    "select scores": (select_each(given=True), "scores", "float16"),
    "compact indices": (compact(), "kept_indices", "int64"),
    "prepare qkv": (prepare(), "qkv", "fp8"),
    "prepare lengths": (prepare(), "host_context_lengths", "int64"),
    "rope qkv": (rope(), "qkv", "int8"),
    "rope table": (rope(), "rotary_cos_sin", "float16"),
    "score qkv": (score(), "qkv", "int8"),
    "score flags": (score(delimited=True), "is_delimiter", "bool"),
    "leader qkv": (compress("leader"), "qkv", "fp8"),
    "ranker scores": (compress("ranker"), "chunk_scores", "float16"),
    "follower indices": (compress("follower"), "kept_indices", "int64"),
    "pool pointers": (compress("follower"), "host_kv_cache_pool_pointers", "int32"),
    "context": (compress("follower"), "context", "int8"),
}


@pytest.mark.parametrize(("node", "tensor", "dtype"), WRONG_TYPES.values(), ids=WRONG_TYPES)
def test_a_type_that_the_plugin_does_not_take_is_refused(networks: SmallNetworks, node, tensor, dtype) -> None:
    refused = networks.build(node.with_input(tensor, dtype), check_shapes=False).refusal()
    assert "Failed to find any supported plugin/custom tactic format" in refused


WRONG_INPUTS = {
    "rank": (score(), "qkv", ("T", QKV_WIDTH, 1), "ChunkKVScore input 0 3 2"),
    "width": (score(), "qkv", ("T", QKV_WIDTH + 2), "ChunkKVScore qkv 514 512"),
    "rows": (score(), "row_starts", ("R",), "ChunkKVScore row_starts 5 4"),
    "window": (select(), "query", ("B", HEADS, 5, HEAD_SIZE), "ChunkKVSelect query 5 4"),
    "value": (select_each(), "value", ("B", 3, "S", HEAD_SIZE), "ChunkKVSelect value 3 2"),
    "heads of indices": (compact(each=True), "kept_indices", ("B", 3, "K"), "ChunkKVCompact kept_indices 3 2"),
    "no kernel": (
        select().with_input("query", dims=("B", HEADS, 4, 48)),
        "key",
        ("B", 2, "S", 48),
        "ChunkKVSelect head_dim 48 64 80 96 128 256",
    ),
    "table": (rope(), "rotary_cos_sin", (1, 70), "ChunkKVRope rotary_cos_sin 70 4480"),
    "blocks": (prepare(), "host_kv_cache_block_offsets", ("P", "B", 3, "M"), "ChunkKVPrepare 3 2"),
    "mapping": (compress("leader"), "host_kv_cache_pool_mapping", (1, 2), "ChunkKVCompress layers 1"),
}


@pytest.mark.parametrize(("node", "tensor", "dims", "names"), WRONG_INPUTS.values(), ids=WRONG_INPUTS)
def test_a_wrong_shape_is_refused_in_the_plugins_words(networks, node, tensor, dims, names) -> None:
    refused = networks.build(node.with_input(tensor, dims=dims), check_shapes=False).refusal()
    assert re.search(naming(names), refused), refused


WRONG_FIELDS = {
    "out of range": (select().with_fields(window=129), "ChunkKVSelect window 129 1 128"),
    "missing": (select().with_fields(chunk_size=None), "ChunkKVSelect chunk_size missing"),
    "of another kind": (score().with_fields(window="4"), "ChunkKVScore window"),
    "unknown word": (compress("leader").with_fields(role="lead"), "ChunkKVCompress role lead leader ranker follower"),
    "between fields": (prepare().with_fields(tokens_per_block=24), "ChunkKVPrepare tokens_per_block 24"),
    "norms of logits": (select().with_fields(score="logits", value_norm="on"), "ChunkKVSelect value_norm logits"),
    "no kernel": (score().with_fields(head_size=48), "ChunkKVScore head_dim 48 64 80 96 128 256"),
    "odd rotary_dim": (rope().with_fields(rotary_dim=33), "ChunkKVRope rotary_dim 33"),
    "lists of two lengths": (
        compress("follower", mapping_rank=1).with_fields(layer_in_pool=[0]),
        "ChunkKVCompress layers 2 layer_in_pool 1",
    ),
}


@pytest.mark.parametrize(("node", "names"), WRONG_FIELDS.values(), ids=WRONG_FIELDS)
def test_wrong_fields_are_refused_in_the_plugins_words(networks: SmallNetworks, node: Node, names: str) -> None:
    outcome = networks.build(node, check_shapes=False)
    assert re.search(naming(names), outcome.errors[0]), outcome.errors
    assert outcome.layers == () and not outcome.engine


def test_builders_come_and_go(rtx: TensorRT, plugins: None) -> None:
    """TensorRT keeps a pointer to the first logger that it gets, and the plugins write there."""
    first, node = SmallNetworks(rtx), select().with_fields(window=129)
    second = SmallNetworks(rtx)
    del first
    assert re.search(naming("ChunkKVSelect window 129"), second.build(node).refusal())
    del second
    assert re.search(naming("ChunkKVSelect window 129"), SmallNetworks(rtx).build(node).refusal())
