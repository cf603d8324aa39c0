"""TensorRT-LLM's own Python makes the network of every supported model and flag, with ChunkKV around attention.

TensorRT itself is a recorder (recording.py) over NVIDIA's enums and fields: nothing is compiled or run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chunkkv.executors.tensorrt_llm.paged_inputs import PagedGeometry, StepInputs, StepRow
from chunkkv.executors.tensorrt_llm.step_engine import StepTensor
from chunkkv_builder.backends.tensorrt_llm.trtllm_flags import read_flags
from tensorrt_llm_source.conftest import LIMITS, Built
from tensorrt_llm_source.recording import RecordedLayer, RecordedNetwork

Build = Callable[..., Built]


def quantised(algorithm: str | None, cache: str | None = None) -> dict[str, Any]:
    return {"quantization": {"quant_algo": algorithm, "kv_cache_quant_algo": cache}}


def scaled(kind: str, **values: Any) -> dict[str, Any]:
    return {"rotary_scaling": {"type": kind, "rope_type": kind, "factor": 4.0, **values}}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "bfloat16": {"dtype": "bfloat16"},
    "as many KV heads": {"num_key_value_heads": 8},
    "attention bias": {"attn_bias": True},
    "llama3 scaling": scaled("llama3", **LLAMA3),
    "linear scaling": {**scaled("linear"), "max_position_embeddings": 1024},
    "yarn scaling": {**scaled("yarn", original_max_position_embeddings=1024), "max_position_embeddings": 1024},
    "FP8": quantised("FP8"),
    "FP8 with its cache": quantised("FP8", "FP8"),
    "INT8 weights and cache": quantised("W8A16", "INT8"),
    "INT4 weights": quantised("W4A16"),
    "SmoothQuant": quantised("W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"),
    "SmoothQuant with its cache": quantised("W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", "INT8"),
    "FP8 by row": quantised("FP8_PER_CHANNEL_PER_TOKEN"),
    "QServe": quantised("W4A8_QSERVE_PER_GROUP"),
    "qwen2": {"architecture": "QWenForCausalLM", "qwen_type": "qwen2", "attn_bias": True, "seq_length": 4096},
    "mistral": {"architecture": "MistralForCausalLM", "sliding_window": 4096},
    "mixtral": {
        **{"architecture": "MixtralForCausalLM", "moe": {"num_experts": 4, "top_k": 2, "normalization_mode": 1}},
        **{"moe_num_experts": 4, "moe_top_k": 2, "moe_normalization_mode": 1},
    },
    "gemma": {"architecture": "GemmaForCausalLM", "head_size": 64, "hidden_act": "gelu", "share_embedding_table": True},
    "gpt2": {
        **{"architecture": "GPTForCausalLM", "position_embedding_type": "learned_absolute", "hidden_act": "gelu"},
        **{"num_key_value_heads": 8, "apply_query_key_layer_scaling": False, "bias": True, "dense_bias": True},
    },
    "gpt-j": {
        **{"architecture": "GPTJForCausalLM", "position_embedding_type": "rope_gptj", "rotary_dim": 32},
        **{"num_key_value_heads": 8, "hidden_act": "gelu"},
    },
    "falcon": {
        **{"architecture": "FalconForCausalLM", "new_decoder_architecture": True, "parallel_attention": True},
        **{"bias": False, "hidden_act": "gelu"},
    },
    "opt": {
        **{"architecture": "OPTForCausalLM", "position_embedding_type": "learned_absolute", "hidden_act": "relu"},
        **{"num_key_value_heads": 8, "do_layer_norm_before": True},
    },
}
FLAGS: dict[str, dict[str, Any]] = {
    "gemm_plugin": {"gemm_plugin": "auto"},
    "paged context attention": {"use_paged_context_fmha": "enable"},
    "kv_cache_type": {"kv_cache_type": "paged"},
    "paged_kv_cache": {"paged_kv_cache": "enable"},
    "fast_build": {"fast_build": True},
    "debug outputs": {"enable_debug_output": True},
    "context logits": {"gather_context_logits": True},
    "blocks of 128": {"tokens_per_block": 128},
    "LoRA": {"lora_plugin": "auto", "lora_target_modules": "attn_qkv"},
    "reuse": {"chunkkv_layer_reuse": 2},
    "reuse, last leads": {"chunkkv_layer_reuse": 2, "chunkkv_leader": "last"},
    "logits": {"chunkkv_score": "logits"},
}
# The inputs of GPTAttention with a paged cache, as its C++ counts them; ChunkKV replaces the first two.
ATTENTION_INPUTS = (
    *("sequence_length", "host_past_key_value_lengths", "host_max_attention_window_sizes", "host_sink_token_length"),
    *("context_lengths", "cache_indirection", "host_request_types", "kv_cache_block_offsets"),
    *("host_kv_cache_block_offsets", "host_kv_cache_pool_pointers", "host_kv_cache_pool_mapping"),
)


@pytest.mark.parametrize("model", MODELS)
def test_every_layer_of_every_model_has_chunkkv(build: Build, model: str) -> None:
    built = build(MODELS[model])
    assert built.outcome.code == 0, built.outcome
    network = built.network
    ropes = 0 if MODELS[model].get("position_embedding_type") == "learned_absolute" else 4
    assert [len(network.plugins(name)) for name in ("ChunkKVPrepare", "ChunkKVRope")] == [1, ropes]
    assert len(network.plugins("GPTAttention")) == len(network.plugins("ChunkKVCompress")) == 4
    check_attention(network)
    assert {path.name for path in built.folder.iterdir()} >= {"config.json", "rank0.engine", "chunkkv_config.json"}
    assert not Path("model.cache").exists(), "the timing cache stays nowhere"


@pytest.mark.parametrize("flags", FLAGS)
def test_every_flag_goes_with_chunkkv(build: Build, flags: str) -> None:
    built = build({}, **FLAGS[flags])
    assert built.outcome.code == 0, built.outcome
    check_attention(built.network)
    nodes = built.network.plugins("ChunkKVCompress")
    assert len(nodes) == (2 if FLAGS[flags].get("chunkkv_leader") == "last" else 4)
    dry = build({}, "--dry_run", **FLAGS[flags], output_dir="never")
    assert dry.outcome.code == 0, dry.outcome
    assert len(dry.network.plugins("ChunkKVCompress")) == len(nodes) and not Path("never").exists()


def check_attention(network: RecordedNetwork) -> None:
    """GPTAttention is told the compacted lengths and no positions; queries and keys come rotated."""
    (prepare,) = network.plugins("ChunkKVPrepare")
    inputs = {tensor.name for tensor in network.inputs}
    assert {tensor.name for tensor in prepare.inputs[:-1]} <= inputs
    lengths = prepare.outputs[0]
    for layer in network.plugins("GPTAttention"):
        fields = layer.plugin.fields
        assert fields["position_embedding_type"] == [0] and fields["rotary_embedding_dim"] == [0]
        names = [lengths.name if name == "sequence_length" else name for name in ATTENTION_INPUTS]
        assert [tensor.name for tensor in layer.inputs[1:12]] == names
        behind = [tensor.name for tensor in layer.inputs[12:] if tensor.name in inputs]
        assert behind == ["host_context_lengths", "host_runtime_perf_knobs", "host_context_progress"]
        producer = layer.inputs[0].producer
        roped = bool(network.plugins("ChunkKVRope"))
        assert producer is not None and (producer in network.plugins("ChunkKVRope")) == roped


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_a_stretched_table_is_that_of_a_longer_model(build: Build, llm: Any, kind: str) -> None:
    more = {"original_max_position_embeddings": 1024, "mscale": 1.2, "mscale_all_dim": 0.5} if kind == "yarn" else {}
    short = build({**scaled(kind, **more), "max_position_embeddings": 1024})
    ropes = short.network.plugins("ChunkKVRope")
    assert {node.inputs[2] for node in ropes} == {ropes[0].inputs[2]}, "one table for all layers"
    table = table_of(ropes[0])
    longer = build({**scaled(kind, **more), "max_position_embeddings": 2100}, overwrite=True)
    wanted = table_of(longer.network.plugins("ChunkKVRope")[0])
    np.testing.assert_array_equal(table, wanted)
    assert table.size == 2100 * 64 and short.side_file.max_positions == 2100


def table_of(rope: RecordedLayer) -> np.ndarray:
    producer = rope.inputs[2].producer
    assert producer is not None and producer.kind == "constant"
    return np.array(producer.weights.numpy() if hasattr(producer.weights, "numpy") else producer.weights)


RANKS = {
    "two ranks": ({"tp_size": 2}, {}),
    "two ranks that agree": ({"tp_size": 2}, {"chunkkv_tp_agree": True}),
    "two ranks with fused sums": ({"tp_size": 2}, {"chunkkv_tp_agree": True, "reduce_fusion": "enable"}),
    "two stages": ({"pp_size": 2}, {}),
    "two stages with reuse": ({"pp_size": 2}, {"chunkkv_layer_reuse": 2}),
    "two by two": ({"tp_size": 2, "pp_size": 2}, {"chunkkv_tp_agree": True}),
}


@pytest.mark.parametrize("ranks", RANKS)
def test_every_rank_has_chunkkv(build: Build, ranks: str) -> None:
    sizes, flags = RANKS[ranks]
    tp, pp = sizes.get("tp_size", 1), sizes.get("pp_size", 1)
    built = build({"mapping": {"tp_size": tp, "pp_size": pp, "world_size": tp * pp}}, **flags)
    assert built.outcome.code == 0, built.outcome
    assert len(built.networks) == tp * pp == len(built.side_file.ranks)
    for network, _ in built.networks:
        check_attention(network)
        assert len(network.plugins("ChunkKVCompress")) == 4 // pp
        scores = network.plugins("ChunkKVScore")
        assert len(scores) == (4 // pp if "chunkkv_tp_agree" in flags else 0)
        for score in scores:
            (total,) = [layer for layer in network.plugins("AllReduce") if layer.inputs[0] is score.outputs[0]]
            fields = total.plugin.fields
            assert fields["type_id"] == [0] and fields["strategy"] == [0], "float32, by NCCL"
            assert total.outputs[0] in [node.inputs[1] for node in network.plugins("ChunkKVCompress")]


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "continuous cache": ({}, {"kv_cache_type": "continuous"}, "give --kv_cache_type paged"),
    "beams": ({}, {"max_beam_width": 2}, "give --max_beam_width 1"),
    "no padding removed": ({}, {"remove_input_padding": "disable"}, "give --remove_input_padding enable"),
    "alibi": ({"position_embedding_type": "alibi"}, {}, "allowed is rope_gpt_neox, rope_gptj, yarn, learned_absolute"),
    "beyond its positions": ({"max_position_embeddings": 2048}, {}, "give --max_seq_len 2048 or less"),
    "a window": ({"architecture": "MistralForCausalLM", "sliding_window": 512}, {}, "give --max_seq_len 512 or less"),
    "capped logits": ({"attn_logit_softcapping": 50.0}, {}, "cap no logits"),
    "context parallel": ({"mapping": {"cp_size": 2, "world_size": 2}}, {}, "--cp_size 1"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_is_refused_before_a_network_is_made(build: Build, what: str) -> None:
    model, flags, said = REFUSED[what]
    built = build(model, **flags)
    assert built.outcome.code != 0 and said in built.outcome.err, built.outcome
    assert not built.networks and not built.folder.exists()


def test_layers_of_another_kind_end_the_build_before_it_compiles(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorrt_llm import functional
    from tensorrt_llm.layers import attention

    from tensorrt_llm_source.recording import RecordedBuilder

    forward = attention.Attention.forward

    def others(self: Any, *args: Any, **keywords: Any) -> Any:
        wrapped, attention.gpt_attention = attention.gpt_attention, functional.gpt_attention
        try:
            return forward(self, *args, **keywords)
        finally:
            attention.gpt_attention = wrapped

    monkeypatch.setattr(attention.Attention, "forward", others)
    monkeypatch.setattr(RecordedBuilder, "build_serialized_network", lambda *_: pytest.fail("it compiles"))
    assert "0 attention layers were given ChunkKV, rank 0 has 4" in build({}).outcome.err


def test_a_dry_run_without_tensorrt_llm_knows_every_flag_of_trtllm_build(llm: Any) -> None:
    from tensorrt_llm.commands import build as command

    flags = [
        (name, *([] if action.nargs == 0 else ["1"]))
        for action in command.parse_arguments()._actions
        for name in action.option_strings
        if name.startswith("--")
    ]
    assert len(flags) > 60 and [words for words in flags if read_flags(words, None)[1]] == [("--help",)]


def test_an_error_of_trtllm_build_says_where_it_was(build: Build) -> None:
    said = build(quantised("NO_SUCH_ALGORITHM")).outcome.err
    assert "trtllm-build failed with AssertionError at quantization/mode.py:" in said
    assert ": assert quant_algo is None or quant_algo in QUANT_ALGO_LIST (--log_level debug shows" in said


DTYPES = {"INT32": np.int32, "INT64": np.int64, "FLOAT": np.float32}
STEPS = {
    "prefill": [StepRow(np.ones(2000, np.int32), 2000, 0, 0)],
    "decode": [StepRow(np.ones(1, np.int32), 100, 100 + row, 40) for row in range(8)],
    "both": [StepRow(np.ones(1200, np.int32), 1200, 0, 0), StepRow(np.ones(1, np.int32), 100, 120, 40)],
}


@pytest.mark.parametrize("step", STEPS)
def test_our_runtime_feeds_every_input_within_the_profile(build: Build, step: str) -> None:
    built = build({})
    ((network, config),) = built.networks
    (profile,) = config.profiles
    inputs = {each.name: StepTensor(each.shape, np.dtype(DTYPES[each.dtype.name])) for each in network.inputs}
    outputs = {each.name: StepTensor(each.shape, np.dtype(DTYPES[each.dtype.name])) for each in network.outputs}
    side, rows = built.side_file, STEPS[step]
    geometry = PagedGeometry(
        num_layers=4,
        num_kv_heads=side.num_kv_heads,
        head_size=side.head_size,
        tokens_per_block=side.tokens_per_block,
        kv_bytes=side.kv_bytes,
        vocab_size=1000,
        max_batch_size=LIMITS["max_batch_size"],
        max_seq_len=LIMITS["max_seq_len"],
    )
    steps = StepInputs(inputs, outputs, geometry, pool_address=4096)
    offsets = np.zeros((1, len(rows), 2, geometry.max_blocks_per_sequence), np.int32)
    shapes = {name: array.shape for name, array in steps.arrays(rows, offsets).items()} | steps.zeros(len(rows))
    assert shapes.keys() == inputs.keys() == profile.shapes.keys() and len(shapes) == 17
    for name, shape in shapes.items():
        low, _, high = profile.shapes[name]
        assert all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)), (name, shape, low, high)
