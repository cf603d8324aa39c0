"""The step graph for ONNX Runtime: merged projections, rotation inside the attention, and queries only on request."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper
from support import engines
from support.checkpoints import VARIANTS

from chunkkv.executors.onnxruntime.executor import OnnxRuntimeExecutor
from chunkkv_builder.backends.onnxruntime import step_weights
from chunkkv_builder.checkpoint.hugging_face import HuggingFaceCheckpoint
from chunkkv_builder.onnx_graph.merged_weights import with_merged_projections
from chunkkv_builder.onnx_graph.packed_weights import weight_sources
from chunkkv_builder.onnx_graph.projections import OFFSETS_SUFFIX, PACKED_SUFFIX, SCALES_SUFFIX
from chunkkv_builder.onnx_graph.rotary_tables import rotary_tables
from chunkkv_builder.onnx_graph.scaled_queries import with_scaled_queries
from chunkkv_builder.onnx_graph.weights import WeightSource

ROTATED_OUTSIDE = ("phi3",)  # 12 of 16 numbers of a head turn, of which GroupQueryAttention takes multiples of 16
QKV = "model.layers.1.self_attn.qkv_proj.weight"


@pytest.mark.parametrize("precision", [None, "int8", "int4", "w8a8"])
def test_a_merged_weight_holds_the_numbers_of_the_three(precision: str | None) -> None:
    checkpoint = HuggingFaceCheckpoint.open(engines.checkpoint_dir("llama_bias"))
    apart = {source.name: source for source in weight_sources(checkpoint, precision)}
    merged = with_merged_projections(weight_sources(checkpoint, precision))
    names = [source.name for source in merged]
    assert len(set(names)) == len(names) and not any(".q_proj" in name for name in names)
    of_layer = [source for source in merged if source.name.startswith("model.layers.1.self_attn.qkv_proj")]
    assert len(of_layer) == (2 if precision is None else 3)  # bias and weight, or bias, codes and scales
    for source in of_layer:
        pieces = [apart[source.name.replace("qkv_proj", piece)].load() for piece in ("q_proj", "k_proj", "v_proj")]
        axis = 1 if source.name.endswith(".channels") else 0
        loaded = source.load()
        assert loaded.shape == source.shape and loaded.dtype == np.dtype(source.dtype)
        assert np.array_equal(loaded, np.concatenate(pieces, axis=axis))
    untouched = [source for source in merged if "qkv_proj" not in source.name]
    assert all(source.name in apart for source in untouched)


def test_offsets_that_only_some_blocks_have_are_zero_for_the_others() -> None:
    def source(name: str, values: np.ndarray) -> WeightSource:
        return WeightSource(name, values.shape, str(values.dtype), lambda: values)

    sources = []
    for number, piece in enumerate(("q_proj", "k_proj", "v_proj")):
        name = QKV.replace("qkv_proj", piece)
        sources += [
            source(name + PACKED_SUFFIX, np.full((2, 1, 16), number, np.uint8)),
            source(name + SCALES_SUFFIX, np.full((2, 1), number, np.float32)),
        ]
        if piece == "k_proj":
            sources.append(source(name + OFFSETS_SUFFIX, np.full((2, 1), 7, np.float32)))
    merged = {source.name: source for source in with_merged_projections(sources)}
    assert list(merged) == [QKV + suffix for suffix in (PACKED_SUFFIX, SCALES_SUFFIX, OFFSETS_SUFFIX)]
    assert merged[QKV + OFFSETS_SUFFIX].load()[:, 0].tolist() == [0, 0, 7, 7, 0, 0]
    assert merged[QKV + PACKED_SUFFIX].shape == (6, 1, 16)


@pytest.mark.parametrize("precision", [None, "int8", "int4", "w8a8"])
@pytest.mark.parametrize("variant", ["llama_bias", "qwen3", "granite"])
def test_queries_get_the_scale_of_attention_from_weights_that_keep_their_precision(
    variant: str, precision: str | None
) -> None:
    checkpoint = HuggingFaceCheckpoint.open(engines.checkpoint_dir(variant))
    model = checkpoint.config
    sources = weight_sources(checkpoint, precision)
    scale = np.float32(model.attention_scale or model.head_dim**-0.5)
    changed = set()
    for source, given in zip(with_scaled_queries(sources, model), sources, strict=True):
        assert (source.name, source.shape, source.dtype) == (given.name, given.shape, given.dtype)
        found, before = source.load(), given.load()
        assert found.dtype == before.dtype
        if not np.array_equal(found, before):
            assert np.array_equal(found, before * scale)
            changed.add(source.name.removeprefix("model.layers.1.self_attn."))
    wanted = {None: {"q_proj.weight"}, "w8a8": {"q_proj.weight.channel_scales"}}
    of_projection = wanted.get(precision, {"q_proj.weight.scales"})
    of_projection |= {"q_proj.bias"} if model.attention_bias else set()
    assert {name for name in changed if "layers" not in name} == ({"q_norm.weight"} if model.qk_norm else of_projection)
    graph = onnx.load(engines.engine_dir(variant) / "step.onnx", load_external_data=False).graph
    scales = [helper.get_node_attr_value(node, "scale") for node in graph.node if node.op_type == "GroupQueryAttention"]
    assert scales == [1.0] * model.num_layers


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_heads_are_rotated_inside_the_attention_where_it_can(variant: str) -> None:
    checkpoint = HuggingFaceCheckpoint.open(engines.checkpoint_dir(variant))
    tables = rotary_tables(checkpoint.config, 40)
    assert bool(tables) == (variant not in ROTATED_OUTSIDE)
    for table in tables:
        loaded = table.load()
        assert loaded.shape == table.shape == (40, checkpoint.config.rotated_dims // 2)
        assert loaded.dtype == np.float32
    model = onnx.load(engines.engine_dir(variant) / "step.onnx", load_external_data=False)
    outside = [node for node in model.graph.node if node.op_type == "RotaryEmbedding"]
    assert bool(outside) == (variant in ROTATED_OUTSIDE)
    products = [node for node in model.graph.node if node.op_type == "Gemm" and "qkv_proj" in node.name]
    assert len(products) == checkpoint.config.num_layers
    packed = [node for node in model.graph.node if node.op_type == "GroupQueryAttention" and not node.input[1]]
    takes_one = not checkpoint.config.qk_norm and variant not in ROTATED_OUTSIDE
    assert len(packed) == (checkpoint.config.num_layers if takes_one else 0)


def test_the_tables_have_every_position_of_the_engine() -> None:
    checkpoint = HuggingFaceCheckpoint.open(engines.checkpoint_dir("gemma3"))
    names = {source.name: source.shape for source in step_weights(checkpoint, None, 123) if "rope" in source.name}
    assert len(names) == 4 and {shape[0] for shape in names.values()} == {123}  # two kinds of layers


@pytest.mark.parametrize("count", [0, 1, 3, 9])
def test_the_graph_gives_as_many_queries_as_it_is_asked_for(count: int) -> None:
    executor = engines.session("llama3", chunkkv_layer_reuse=2).executor
    assert isinstance(executor, OnnxRuntimeExecutor)
    session, layout = executor.step.session, executor.step.layout
    cache = executor.new_cache(1, 8)
    caches = {
        f"past_{kind}.{number}": array
        for kind, arrays in (("key", cache.keys), ("value", cache.values))
        for number, array in enumerate(arrays)
    }
    inputs = {
        "input_ids": np.arange(3, 8, dtype=np.int64)[None],
        "position_ids": np.arange(5, dtype=np.int64)[None],
        "cache_lengths": np.zeros((layout.length_classes, 1), np.int32),
        "logit_indices": np.array([[4]], np.int64),
    }
    names = [f"query.{part}" for part in executor.step.query_heads]
    assert names
    every = session.run(names, {**inputs, **caches, "query_count": np.array([5], np.int64)})
    found = session.run(names, {**inputs, **caches, "query_count": np.array([count], np.int64)})
    for some, all_five in zip(found, every, strict=True):
        assert some.shape[2] == min(count, 5)
        if count:
            assert np.array_equal(some, all_five[:, :, 5 - some.shape[2] :])
