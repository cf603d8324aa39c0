"""ChunkKV in recorded TensorRT-LLM networks: what gpt_attention is told, which plugins stand where, on every rank.

TensorRT-LLM is a contract as read (support/tensorrt_llm_double); these tests prove nothing about the real one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import engines
from support.messages import naming
from support.plugin_tables import input_names, output_names
from support.tensorrt_llm_builds import LlmBuild, build_config, doubles, llm_checkpoint, llm_model
from support.tensorrt_llm_double import Machine
from support.tensorrt_llm_double.graph import Graph, Node

from chunkkv.engine.tensorrt_llm_side_file import SideFile
from chunkkv.errors import BackendUnavailableError, BuildError, ConfigError
from chunkkv.settings import ChunkKVSettings
from chunkkv.text.tokenizer import Tokenizer
from chunkkv_builder.backends.tensorrt_llm.engine_build import rank_layers
from chunkkv_builder.backends.tensorrt_llm.library import delimiter_words
from chunkkv_builder.backends.tensorrt_llm.wrapper import WrappedLayers

pytestmark = pytest.mark.contract_as_read

SETTINGS = ChunkKVSettings(keep_per_10k=4000, window=4, chunk_size=3, sinks=2, min_tokens=10)
ROPED = {"rope_gpt_neox": 2, "learned_absolute": 0}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    with doubles(tmp_path, monkeypatch) as machine:
        yield machine


@pytest.fixture
def build(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> LlmBuild:
    return LlmBuild(capsys, tmp_path / "engine")


def built(build: LlmBuild, machine: Machine, **flags: Any) -> list[Graph]:
    outcome = build(**flags)
    assert outcome.code == 0, outcome
    return machine.networks


def attention(graph: Graph) -> list[Node]:
    return graph.of("gpt_attention")


def named_outputs(node: Node) -> dict[str, str]:
    """Return what a plugin's node gives, by the names in the plugin's source."""
    return dict(zip(output_names(node.plugin or ""), node.outputs, strict=False))


def test_gpt_attention_sees_no_positions_and_the_compacted_length(machine: Machine, build: LlmBuild) -> None:
    (graph,) = built(build, machine)
    (prepare,) = graph.of("ChunkKVPrepare")
    ropes = graph.of("ChunkKVRope")
    assert len(attention(graph)) == len(ropes) == 4
    for node, rope in zip(attention(graph), ropes, strict=True):
        settings, tensors = node.attributes, node.attributes["keywords"]
        assert settings["position_embedding_type"] == ROPED["learned_absolute"]
        assert settings["rotary_embedding_dim"] == 0 and settings["rotary_embedding_scale_type"] == 0
        assert "rotary_cos_sin" not in tensors and "rotary_inv_freq" not in tensors
        assert tensors["sequence_length"] == named_outputs(prepare)["attention_lengths"]
        assert tensors["qkv"] == rope.outputs[0]
        assert tensors["context_lengths"] == "context_lengths"


def test_rope_turns_the_packed_queries_and_keys_by_logical_positions(machine: Machine, build: LlmBuild) -> None:
    (graph,) = built(build, machine)
    (prepare,) = graph.of("ChunkKVPrepare")
    before = [None, *graph.of("ChunkKVCompress")]
    for rope, compress in zip(graph.of("ChunkKVRope"), before, strict=False):
        qkv, positions, table, *done = rope.inputs
        assert done == ([] if compress is None else [compress.outputs[0]]), "caches are compacted layer by layer"
        assert graph.producer(qkv).op == "linear" and positions == named_outputs(prepare)["positions"]
        assert graph.constants[table].dtype == np.float32 and graph.constants[table].shape == (1, 512 * 64)
        assert rope.fields() == {
            **{"num_heads": 4, "num_kv_heads": 2, "head_size": 64},
            **{"rotary_dim": 64, "neox": 1, "max_positions": 512, "behind": len(done)},
        }


def test_prepare_stands_once_with_the_inputs_of_the_plugins_table(machine: Machine, build: LlmBuild) -> None:
    (graph,) = built(build, machine)
    (prepare,) = graph.of("ChunkKVPrepare")
    *network_inputs, qkv, input_ids = input_names("ChunkKVPrepare")
    assert (qkv, input_ids) == ("qkv", "input_ids") and prepare.inputs[:-1] == network_inputs
    assert set(network_inputs) <= set(graph.inputs) and graph.values[prepare.inputs[-1]].dtype == "float16"
    assert prepare.fields() == {
        **{"window": 4, "sinks": 2, "chunk_size": 3, "boundaries": "fixed", "pooling": 5, "score": "softmax"},
        **{"keep_per_10k": 4000, "budget_tokens": 0, "min_tokens": 10, "max_length": 256},
        **{"window_reduce": "mean", "head_reduce": "max", "value_norm": "off"},
        "tokens_per_block": 32,
    }


@pytest.mark.parametrize("leader", ["first", "last"])
def test_compress_stands_behind_attention_with_the_inputs_of_the_plugins_table(
    machine: Machine, build: LlmBuild, leader: str
) -> None:
    (graph,) = built(build, machine, chunkkv_layer_reuse="0-2,3", chunkkv_leader=leader)
    (prepare,) = graph.of("ChunkKVPrepare")
    nodes, layers = graph.of("ChunkKVCompress"), attention(graph)
    roles = [(node.fields()["role"], node.fields()["layers"]) for node in nodes]
    expected = {
        "first": [("leader", 0), ("follower", 1), ("follower", 2), ("leader", 3)],
        "last": [("leader", [0, 1, 2]), ("leader", 3)],
    }
    assert roles == expected[leader]
    owners = {"first": layers, "last": layers[2:]}[leader]
    for node, layer in zip(nodes, owners, strict=True):
        fields, tensors = node.fields(), layer.attributes["keywords"]
        source = nodes[0].outputs[1] if fields["role"] == "follower" else tensors["qkv"]
        computed = {"context": layer.outputs[0], "": source, **named_outputs(prepare)}
        *names, is_delimiter = input_names("ChunkKVCompress")
        assert is_delimiter == "is_delimiter" and node.inputs == [computed.get(name, name) for name in names]
        assert fields["layer_in_pool"] == fields["layers"] and fields["kv_bytes"] == 2
        assert fields["mapping_rank"] == len(graph.values["host_kv_cache_pool_mapping"].shape)
        assert fields["mapping_rank"] == 2
        # Somebody waits for the node, so that compaction is never cut away: the next Rope, at last the network itself.
        users = [user.plugin or user.op for user in graph.nodes if node.outputs[0] in user.inputs]
        is_last = layer is layers[-1]
        assert users == (["linear"] if is_last else ["ChunkKVRope"]) and fields["order_only"] == (not is_last)
        behind = [user.plugin or user.op for user in graph.nodes if layer.outputs[0] in user.inputs]
        assert behind == (["ChunkKVCompress"] if is_last else ["ChunkKVCompress", "linear"])


@pytest.mark.parametrize(("kv_cache", "name", "size"), [(None, "bfloat16", 2), ("INT8", "int8", 1), ("FP8", "fp8", 1)])
def test_cache_types(machine: Machine, build: LlmBuild, kv_cache: str | None, name: str, size: int) -> None:
    checkpoint = llm_checkpoint(dtype="bfloat16", kv_cache=kv_cache)
    (graph,) = built(build, machine, checkpoint_dir=checkpoint, use_paged_context_fmha="disable")
    assert {node.fields()["kv_bytes"] for node in graph.of("ChunkKVCompress")} == {size}
    side = SideFile.read(build.output)
    assert (side.kv_dtype, side.kv_bytes) == (name, size)


def test_delimiter_boundaries_come_from_input_ids_and_a_bitmap_of_the_tokenizer(
    machine: Machine, build: LlmBuild
) -> None:
    source = engines.checkpoint_dir("llama3", head_dim=64, num_hidden_layers=4)
    flags = {"chunkkv_boundaries": "delimiter", "tokenizer_dir": source, "chunkkv_layer_reuse": 2}
    (graph,) = built(build, machine, **flags, chunkkv_leader="first")
    (prepare,) = graph.of("ChunkKVPrepare")
    assert prepare.inputs[-1] == input_names("ChunkKVPrepare")[-1] == "input_ids"
    assert len(prepare.inputs) == len(input_names("ChunkKVPrepare"))
    assert len(prepare.outputs) == len(output_names("ChunkKVPrepare"))
    table = Tokenizer.from_dir(source).delimiter_token_table(384)
    words = np.array(prepare.fields()["delimiter_bitmap"], np.int32).view(np.uint32)
    assert [bool(words[t // 32] >> (t % 32) & 1) for t in range(384)] == table.tolist() and table.any()
    assert prepare.fields()["vocab_size"] == 384
    for node in graph.of("ChunkKVCompress"):
        follows = node.fields()["role"] == "follower"
        place = input_names("ChunkKVCompress").index("is_delimiter")
        assert node.inputs[place:] == ([] if follows else [named_outputs(prepare)["is_delimiter"]])
    assert SideFile.read(build.output).delimiters["source"] == "tokenizer.json"


@pytest.mark.parametrize("vocabulary", [1, 31, 32, 33, 100])
def test_bitmap_words(vocabulary: int) -> None:
    table = np.random.default_rng(vocabulary).random(vocabulary) < 0.5
    words = delimiter_words(table)
    assert words.dtype == np.int32 and len(words) == -(-vocabulary // 32)
    assert [bool(int(words[t // 32]) >> (t % 32) & 1) for t in range(vocabulary)] == table.tolist()


def test_a_model_with_learned_positions_needs_no_rope(machine: Machine) -> None:
    """Such a model's own classes are not doubled: gpt_attention is called as its layers would."""
    import tensorrt_llm.functional as f
    from tensorrt_llm.layers import attention as layers

    calls = []
    plain = layers.gpt_attention

    def unroped(**given: Any) -> Any:
        kind = f.PositionEmbeddingType.learned_absolute
        given |= {"position_embedding_type": kind, "rotary_embedding_dim": 0}
        calls.append(given["layer_idx"])
        return wrapped(**{**given, "rotary_cos_sin": None, "rotary_inv_freq": None})

    from tensorrt_llm.builder import build

    from chunkkv_builder.backends.tensorrt_llm import EngineBuild

    def with_unroped(model: Any, config: Any) -> Any:
        nonlocal wrapped
        wrapped, layers.gpt_attention = layers.gpt_attention, unroped
        return build(model, config)

    wrapped = None
    EngineBuild(SETTINGS).engine(llm_model(), build_config(), with_unroped)
    (graph,) = machine.networks
    assert calls == [0, 1, 2, 3] and layers.gpt_attention is plain
    assert not graph.of("ChunkKVRope") and len(graph.of("ChunkKVCompress")) == 4
    (prepare,) = graph.of("ChunkKVPrepare")
    for node in attention(graph):
        assert node.attributes["keywords"]["sequence_length"] == prepare.outputs[0]
        assert graph.producer(node.attributes["keywords"]["qkv"]).op == "linear"


def test_build_chunkkv_returns_an_engine_and_leaves_the_package_as_it_was(machine: Machine) -> None:
    from tensorrt_llm.layers import attention as layers

    from chunkkv_builder.backends.tensorrt_llm import build_chunkkv

    before = layers.gpt_attention
    engine = build_chunkkv(llm_model(), build_config(), SETTINGS)
    assert len(Graph.from_bytes(engine.engine).of("ChunkKVCompress")) == 4 and layers.gpt_attention is before


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_the_patch_is_taken_back_whatever_happens(machine: Machine, failure: type[BaseException]) -> None:
    from tensorrt_llm.layers import attention as layers

    from chunkkv_builder.backends.tensorrt_llm import EngineBuild

    before = layers.gpt_attention

    def fails(model: Any, config: Any) -> Any:
        assert layers.gpt_attention is not before
        raise failure("stop")

    with pytest.raises(failure, match="stop"):
        EngineBuild(SETTINGS).engine(llm_model(), build_config(), fails)
    assert layers.gpt_attention is before


def test_a_leader_in_the_middle_compacts_the_layers_before_it(machine: Machine) -> None:
    from tensorrt_llm.builder import build

    from chunkkv_builder.backends.tensorrt_llm import EngineBuild

    settings = dataclasses.replace(SETTINGS, layer_groups=((0, 1, 2), (3,)), leaders=(1, 3))
    EngineBuild(settings).engine(llm_model(), build_config(), build)
    nodes = machine.networks[0].of("ChunkKVCompress")
    found = [(node.fields()["role"], node.fields()["layers"]) for node in nodes]
    assert found == [("leader", [0, 1]), ("follower", 2), ("leader", 3)]


def test_layers_of_quantised_models_are_wrapped_too(machine: Machine) -> None:
    from tensorrt_llm import builder
    from tensorrt_llm.layers import attention
    from tensorrt_llm.quantization import layers as quantized

    from chunkkv_builder.backends.tensorrt_llm import EngineBuild

    plain = attention.gpt_attention

    def quantised(model: Any, config: Any) -> Any:
        attention.gpt_attention = quantized.gpt_attention  # as if the model had layers of that module
        return builder.build(model, config)

    EngineBuild(SETTINGS).engine(llm_model(), build_config(), quantised)
    assert len(machine.networks[0].of("ChunkKVCompress")) == 4
    assert quantized.gpt_attention is plain is attention.gpt_attention


def test_a_network_with_fewer_or_other_layers_than_the_model_is_refused(machine: Machine) -> None:
    from chunkkv_builder.backends.tensorrt_llm import EngineBuild

    with pytest.raises(BuildError, match=naming("0 layers ChunkKV 4")):
        EngineBuild(SETTINGS).engine(llm_model(), build_config(), lambda model, config: None)
    from tensorrt_llm import builder
    from tensorrt_llm.layers import attention

    def skips_one(model: Any, config: Any) -> Any:
        wrapped = attention.gpt_attention
        attention.gpt_attention = lambda **given: (plain if given["layer_idx"] == 3 else wrapped)(**given)
        return builder.build(model, config)

    plain = attention.gpt_attention
    with pytest.raises(BuildError, match=naming("3 layers ChunkKV 4")):
        EngineBuild(SETTINGS).engine(llm_model(), build_config(), skips_one)
    assert machine.networks == [], "it is noticed before an engine is compiled"
    layers = rank_layers(ChunkKVSettings(layer_groups=((0,), (1,))), [0, 1], 0, 0, 0)
    with pytest.raises(BuildError, match=naming("1 layers ChunkKV 2")):
        WrappedLayers([0]).check_complete(layers)


def test_layers_must_be_alike(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorrt_llm.builder import build
    from tensorrt_llm.layers import attention as layers

    from chunkkv_builder.backends.tensorrt_llm import EngineBuild

    def with_other_heads(model: Any, config: Any) -> Any:
        wrapped = layers.gpt_attention
        layers.gpt_attention = lambda **g: wrapped(**{**g, "num_heads": 2 if g["layer_idx"] == 2 else g["num_heads"]})
        return build(model, config)

    with pytest.raises(ConfigError, match=naming("layer 2 num_heads=2")):
        EngineBuild(SETTINGS).engine(llm_model(), build_config(), with_other_heads)


def test_a_library_of_another_version_is_refused(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorrt as trt

    from chunkkv_builder.backends.tensorrt_llm import build_chunkkv

    monkeypatch.setattr(trt.PluginCreator, "create_plugin", lambda *_: None)
    with pytest.raises(BackendUnavailableError, match=naming("ChunkKVPrepare libchunkkv_tensorrt.so.10")):
        build_chunkkv(llm_model(), build_config(), SETTINGS)


def test_tensor_parallel_ranks_choose_by_their_own_heads(machine: Machine, build: LlmBuild) -> None:
    graphs = built(build, machine, checkpoint_dir=llm_checkpoint(tp_size=2), chunkkv_layer_reuse=2)
    assert len(graphs) == 2
    for graph in graphs:
        assert {node.fields()["num_heads"] for node in graph.of("ChunkKVCompress")} == {2}
        assert {node.fields()["num_kv_heads"] for node in graph.of("ChunkKVCompress")} == {1}
        assert not graph.of("ChunkKVScore")
    side = SideFile.read(build.output)
    assert [(rank.rank, rank.tp_rank, rank.groups) for rank in side.ranks] == [
        (0, 0, ((0, 1), (2, 3))),
        (1, 1, ((0, 1), (2, 3))),
    ]
    assert (side.num_heads, side.num_kv_heads, side.tp_agree) == (2, 1, False)


def test_tensor_parallel_ranks_that_agree_add_up_their_scores(machine: Machine, build: LlmBuild) -> None:
    flags = {"chunkkv_tp_agree": True, "chunkkv_layer_reuse": 2, "chunkkv_leader": "first"}
    graphs = built(build, machine, checkpoint_dir=llm_checkpoint(tp_size=2), **flags)
    for graph in graphs:
        (prepare,) = graph.of("ChunkKVPrepare")
        scores, sums = graph.of("ChunkKVScore"), [n for n in graph.of("allreduce") if "Score" in produced_by(graph, n)]
        rankers = [node for node in graph.of("ChunkKVCompress") if node.fields()["role"] == "ranker"]
        assert len(scores) == len(sums) == len(rankers) == 2
        assert len(graph.of("ChunkKVCompress")) == 4
        for score, total, ranker in zip(scores, sums, rankers, strict=True):
            _, *names, _ = input_names("ChunkKVScore")
            assert score.inputs[1:] == [named_outputs(prepare).get(name, name) for name in names]
            assert score.fields()["window"] == 4 and score.fields()["num_heads"] == 2
            assert total.attributes["group"] == [0, 1]
            assert (total.attributes["dtype"], total.attributes["strategy"]) == ("float32", "NCCL")
            assert ranker.inputs[1] == total.outputs[0] and graph.values[total.outputs[0]].dtype == "float32"
    others = [n for graph in graphs for n in graph.of("allreduce") if "Score" not in produced_by(graph, n)]
    assert {node.attributes["dtype"] for node in others} <= {"float16"}, "the model's own sums keep their type"
    assert SideFile.read(build.output).tp_agree


def produced_by(graph: Graph, node: Node) -> str:
    producer = graph.producer(node.inputs[0])
    return producer.plugin or producer.op


def test_pipeline_stages_number_their_layers_from_zero(machine: Machine, build: LlmBuild) -> None:
    graphs = built(build, machine, checkpoint_dir=llm_checkpoint(pp_size=2), chunkkv_layer_reuse=2)
    for graph in graphs:
        assert [node.fields()["layers"] for node in graph.of("ChunkKVCompress")] == [[0, 1]]
        assert len(graph.of("ChunkKVPrepare")) == 1
    assert "input_ids" in graphs[0].inputs and "input_ids" not in graphs[1].inputs
    side = SideFile.read(build.output)
    assert [(rank.pp_rank, rank.first_layer, rank.leaders) for rank in side.ranks] == [(0, 0, (1,)), (1, 2, (1,))]
    assert side.settings.layer_groups == ((0, 1), (2, 3))


def test_a_group_over_the_end_of_a_stage_is_refused(machine: Machine, build: LlmBuild) -> None:
    said = build(checkpoint_dir=llm_checkpoint(pp_size=2), chunkkv_layer_reuse="0,1-2,3").error(2)
    assert said.startswith(
        "--chunkkv_layer_reuse has layers 1 to 2 in one group, but pipeline stage 0 has the layers 0"
    )
    assert not machine.networks


def test_delimiters_and_pipeline_stages_do_not_go_together(machine: Machine, build: LlmBuild) -> None:
    source = engines.checkpoint_dir("llama3", head_dim=64, num_hidden_layers=4)
    flags = {"checkpoint_dir": llm_checkpoint(pp_size=2), "tokenizer_dir": source, "chunkkv_boundaries": "delimiter"}
    assert "give --chunkkv_boundaries fixed, or convert with --pp_size 1" in build(**flags).error(2)
