"""The limits of an engine: what a model allows, what fits together, and what config.json keeps of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support import engines
from support.messages import naming

from chunkkv.errors import ConfigError
from chunkkv.limits import RANGES
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.checkpoint.hugging_face import HuggingFaceCheckpoint
from chunkkv_builder.config import BuildConfig, longest_context

MODEL = HuggingFaceCheckpoint.open(engines.checkpoint_dir("llama2")).config  # plain RoPE, 512 positions


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (512, 512)),
        ({"max_seq_len": 100}, (100, 100)),
        ({"max_seq_len": 512, "max_input_len": 1}, (1, 512)),
        ({"max_input_len": 300}, (300, 512)),
    ],
)
def test_lengths_default_to_the_models_context(given: dict[str, int], expected: tuple[int, int]) -> None:
    found = BuildConfig.for_model(MODEL, **given)
    assert (found.max_input_len, found.max_seq_len) == expected


@pytest.mark.parametrize(
    ("variant", "overrides", "longest"),
    [
        ("llama2", {}, 512),
        ("llama_linear", {}, 512),  # linear scaling is part of what the model was trained for
        ("llama3", {}, 512),
        ("llama3", {"max_position_embeddings": 256}, 256),  # as Llama 3.2 publishes it: 8 times 64 is not what counts
        ("llama_yarn", {}, 512),  # 4 times 128
        ("llama_yarn", {"max_position_embeddings": 128}, 512),  # as Qwen publishes it: positions before scaling
        ("qwen3", {"max_position_embeddings": 40960}, 40960),
    ],
)
def test_the_longest_context_is_what_it_was_trained_for(variant: str, overrides: dict[str, int], longest: int) -> None:
    model = HuggingFaceCheckpoint.open(engines.checkpoint_dir(variant, **overrides)).config
    assert longest_context(model) == longest
    assert BuildConfig.for_model(model).max_seq_len == longest
    with pytest.raises(ConfigError, match=naming("max_seq_len", longest + 1, longest)):
        BuildConfig.for_model(model, max_seq_len=longest + 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size 0 1 4096"),
        ({"max_batch_size": 4097}, "max_batch_size 4097"),
        ({"max_num_tokens": 2**20 + 1}, "max_num_tokens 1048577 1 1048576"),
        ({"max_input_len": 0}, "max_input_len 0"),
        ({"max_seq_len": -1, "max_input_len": 5}, "max_seq_len -1"),
        ({"max_num_tokens": True}, "max_num_tokens True"),
        ({"max_num_tokens": 5.0}, "max_num_tokens 5.0"),
        ({"max_input_len": 9, "max_seq_len": 8}, "max_input_len 9 max_seq_len 8"),
        ({"backend": "cuda"}, "backend 'cuda' onnxruntime tensorrt tensorrt_llm"),
        ({"dtype": "int8"}, "dtype 'int8' float32 float16 bfloat16"),
        ({"dtype": "float16"}, "dtype 'float16' onnxruntime float32"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype 'fp8' onnxruntime float32 float16 int8"),
        ({"kv_cache_dtype": "float16", "backend": "tensorrt", "dtype": "bfloat16"}, "kv_cache_dtype tensorrt bfloat16"),
        ({"weight_only_precision": "int2"}, "weight_only_precision 'int2' int8 int4"),
        ({"weight_only_activations": "int4"}, "weight_only_activations 'int4' int8 float32"),
        (
            {"weight_only_precision": "w8a8", "weight_only_activations": "float32"},
            "weight_only_activations 'float32' w8a8 int4",
        ),
        ({"prefill_precision": "int8"}, "prefill_precision 'int8' w8a8"),
        (
            {"prefill_precision": "w8a8", "weight_only_precision": "w8a8", "weight_only_activations": "int8"},
            "prefill_precision 'w8a8' weight_only_precision",
        ),
        (
            {"prefill_precision": "w8a8", "backend": "tensorrt", "dtype": "bfloat16"},
            "prefill_precision 'w8a8' tensorrt bfloat16",
        ),
        ({"weight_only_activations": "int8"}, "weight_only_precision None weight_only_activations 'int8'"),
    ],
)
def test_what_cannot_be_built_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=naming(message)):
        BuildConfig.for_model(MODEL, **values)


def test_a_gpu_backend_may_compute_in_a_half_type() -> None:
    assert BuildConfig.for_model(MODEL, dtype="bfloat16", backend="tensorrt").dtype == "bfloat16"


@pytest.mark.parametrize(
    ("block", "window", "fits"), [(31, 32, False), (32, 32, True), (1, 1, True), (127, 128, False)]
)
def test_a_prefill_block_must_hold_the_window(block: int, window: int, fits: bool) -> None:
    config = BuildConfig.for_model(MODEL, max_num_tokens=block)
    settings = ChunkKVSettings(window=window, min_tokens=200)
    config.check_window(None)
    if fits:
        config.check_window(settings)
    else:
        with pytest.raises(ConfigError, match=naming("max_num_tokens", block, "window", window)):
            config.check_window(settings)


@pytest.mark.parametrize(("backend", "block"), [("onnxruntime", 128), ("tensorrt", 512)])
def test_the_block_that_is_taken_where_none_is_given_holds_every_window(backend: str, block: int) -> None:
    assert BuildConfig.default_max_num_tokens(backend) == block
    largest = ChunkKVSettings(window=RANGES["window"][1], min_tokens=1000)
    BuildConfig.for_model(MODEL, max_num_tokens=block).check_window(largest)


def test_what_is_written_reads_back_the_same_and_only_that() -> None:
    weights = {"weight_only_precision": "int4", "weight_only_activations": "float32"}
    config = replace(BuildConfig.for_model(MODEL, max_seq_len=100, max_batch_size=3), **weights)
    values = config.to_dict()
    assert BuildConfig.from_dict(values) == config
    assert values["max_beam_width"] == 1 and values["kv_cache_type"] == "continuous"
    for change, message in (
        ({"paged": True}, "build_config 'paged'"),
        ({"max_beam_width": 4}, "'max_beam_width' 4 1"),
        ({"kv_cache_type": "paged"}, "'kv_cache_type' 'paged' 'continuous'"),
        ({"max_batch_size": 0}, "max_batch_size 0"),
        ({"weight_only_activations": None}, "weight_only_precision 'int4' weight_only_activations None"),
    ):
        with pytest.raises(ConfigError, match=naming(message)):
            BuildConfig.from_dict({**values, **change})
    with pytest.raises(ConfigError, match=naming("'dtype' missing")):
        BuildConfig.from_dict({name: value for name, value in values.items() if name != "dtype"})
