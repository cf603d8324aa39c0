"""Every precondition of a TensorRT-LLM engine: what is given, what is allowed, what to change, before anything slow.

TensorRT-LLM is a contract as read (support/tensorrt_llm_double); these tests prove nothing about the real one.
"""

from __future__ import annotations

import inspect
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.messages import naming
from support.tensorrt_llm_builds import LlmBuild, build_config, doubles, llm_checkpoint, llm_model
from support.tensorrt_llm_double import Machine

from chunkkv.engine.preconditions import BUILD_PRECONDITIONS as BUILD
from chunkkv.engine.preconditions import build_values, check
from chunkkv.errors import BuildError, ConfigError
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.backends.tensorrt_llm.model import POSITION_TYPES, ROPE_SCALINGS, LlmModel
from chunkkv_builder.backends.tensorrt_llm.preconditions import LAYER_PRECONDITIONS as LAYER
from chunkkv_builder.backends.tensorrt_llm.trtllm_flags import read_flags
from chunkkv_builder.flags import parse

pytestmark = pytest.mark.contract_as_read

SETTINGS = ChunkKVSettings(keep_per_10k=4000, window=4, chunk_size=3, sinks=2, min_tokens=10)
FLAGS = {
    ("gpt_attention_plugin", "disable"): "give --gpt_attention_plugin auto",
    ("gpt_attention_plugin", "float32"): "allowed is float16 or bfloat16",
    ("remove_input_padding", "disable"): "give --remove_input_padding enable",
    ("kv_cache_type", "continuous"): "give --kv_cache_type paged",
    ("kv_cache_type", "disabled"): "give --kv_cache_type paged",
    ("paged_kv_cache", "disable"): "give --paged_kv_cache enable",
    ("context_fmha", "disable"): "give --context_fmha enable",
    ("max_beam_width", 4): "give --max_beam_width 1",
    ("multiple_profiles", "enable"): "give --multiple_profiles disable",
    ("streamingllm", "enable"): "give --streamingllm disable",
    ("fuse_fp4_quant", "enable"): "give --fuse_fp4_quant disable",
    ("speculative_decoding_mode", "medusa"): "leave --speculative_decoding_mode out",
    ("max_draft_len", 3): "leave --max_draft_len out",
    ("tokens_per_block", 48): "give --tokens_per_block 32 or 64",
    ("workers", 2): "give --workers 1",
    ("auto_parallel", 2): "convert the checkpoint with --tp_size instead",
    ("lora_dir", "adapters"): "leave --lora_dir out",
    ("max_num_tokens", 100): "give --max_num_tokens 200 or more",
    ("max_seq_len", 1024): "give --max_seq_len 512 or less",
}
OLDER = ("streamingllm", "auto_parallel")  # flags that the double's line no longer has


@pytest.fixture(params=["installed", "missing"])
def has_package(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Whether TensorRT-LLM is installed."""
    if request.param == "missing":
        yield False
        return
    with doubles(tmp_path, monkeypatch):
        yield True


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    with doubles(tmp_path, monkeypatch) as machine:
        yield machine


@pytest.fixture
def build(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> LlmBuild:
    return LlmBuild(capsys, tmp_path / "engine")


@pytest.mark.parametrize(("flag", "value"), FLAGS, ids=str)
def test_flags_are_refused_before_anything_is_built(has_package: bool, build: LlmBuild, flag: str, value: Any) -> None:
    said = build("--dry_run", **{flag: value}).error(2)
    if flag in OLDER and has_package:
        assert said == f"trtllm-build says: unrecognized arguments: --{flag} {value}"
        return
    assert f"{flag} is " in said and FLAGS[flag, value] in said
    assert not build.output.exists()


def test_every_flag_of_the_table_is_tried() -> None:
    assert {precondition.name for precondition in BUILD} <= {flag for flag, _ in FLAGS}


def test_the_page_names_every_precondition() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "tensorrt-llm.md").read_text(encoding="utf-8")
    assert [each.name for each in (*BUILD, *LAYER) if f"`{each.name}`" not in page] == []
    for name in (*POSITION_TYPES, *ROPE_SCALINGS):
        assert f"`{name}`" in page


def test_the_commands_of_the_page_are_understood() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "tensorrt-llm.md").read_text(encoding="utf-8")
    commands = re.findall(r"^ +(chunkkv-build --backend tensorrt_llm .*)$", page, re.MULTILINE)
    assert commands
    for command in commands:
        flags = parse(shlex.split(command)[1:])
        given, unknown = read_flags(flags.passed_on, None)
        assert unknown == []
        check(BUILD, build_values(given))


def config_with(tmp_path: Path, **values: Any) -> Path:
    config = json.loads((llm_checkpoint() / "config.json").read_text())
    for name, value in values.items():
        section, _, key = name.partition("__")
        if key:
            config[section][key] = value
        else:
            config[name] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("kind", ["long_rope", "alibi", "alibi_with_scale", "relative", "chatglm", "mrope"])
def test_position_embeddings_that_are_not_supported(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ConfigError, match=naming("rope_gpt_neox rope_gptj yarn learned_absolute")):
        LlmModel.read(config_with(tmp_path, position_embedding_type=kind))


@pytest.mark.parametrize("kind", ["rope_gpt_neox", "rope_gptj", "yarn", "learned_absolute"])
@pytest.mark.parametrize("scaling", [None, "linear", "llama3", "yarn", "default"])
def test_position_embeddings_that_are_supported(tmp_path: Path, kind: str, scaling: str | None) -> None:
    scaled = None if scaling is None else {"type": scaling, "factor": 2.0}
    LlmModel.read(config_with(tmp_path, position_embedding_type=kind, rotary_scaling=scaled))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rotary_scaling": {"rope_type": "dynamic"}}, "rotary scalings allowed are none, linear, llama3, yarn"),
        ({"rotary_scaling": {"type": "longrope"}}, "rotary scalings allowed are none, linear, llama3, yarn"),
        ({"rotary_scaling": {"type": "mrope"}}, "rotary scalings allowed are none, linear, llama3, yarn"),
        ({"dtype": "float32"}, "convert_checkpoint.py --dtype bfloat16"),
        ({"architecture": "DeepseekV2ForCausalLM"}, "multi-head latent attention"),
        ({"architecture": "DecoderModel"}, "cross attention"),
        ({"architecture": "RecurrentGemmaForCausalLM"}, "recurrent layers"),
        ({"layer_types": ["attention", "recurrent"]}, "recurrent layers have no KV cache"),
        ({"mapping__cp_size": 2}, "convert_checkpoint.py --cp_size 1"),
        ({"mapping__tp_size": 3}, "multiple of tp_size, 3"),
        ({"quantization__kv_cache_quant_algo": "NVFP4"}, "INT8 or FP8"),
        ({"quantization__kv_cache_quant_algo": ["FP8"]}, "INT8 or FP8"),
        ({"rotary_scaling": {"type": "linear", "factor": "2"}}, "'factor' is '2'"),
        ({"num_key_value_heads": 3}, "must divide num_attention_heads, 4"),
        ({"head_size": 72}, "kernels for 64, 80, 96, 128, 256"),
        ({"num_attention_heads": 17, "num_key_value_heads": 1}, "at most 16 query heads for one"),
        ({"attn_logit_softcapping": 50.0}, "cap no logits"),
        ({"query_pre_attn_scalar": 144}, "scale by head_size, 64, only"),
        ({"num_hidden_layers": 0}, "give a whole number from 1"),
        ({"vocab_size": None}, "give a whole number from 1"),
    ],
)
def test_models_that_are_not_supported(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        LlmModel.read(config_with(tmp_path, **values))
    assert (said in str(refused.value) and "config.json" in str(refused.value)) or said in str(refused.value)


def test_a_sliding_window_is_refused_unless_it_sees_everything(tmp_path: Path, build: LlmBuild) -> None:
    checkpoint = config_with(tmp_path, sliding_window=128)
    assert "give --max_seq_len 128 or less" in build("--dry_run", checkpoint_dir=checkpoint).error(2)
    assert build("--dry_run", checkpoint_dir=checkpoint, max_seq_len=128, max_input_len=100).code == 0
    config_with(tmp_path, sliding_window=128, use_sliding_window=False)
    assert build("--dry_run", checkpoint_dir=checkpoint).code == 0


@pytest.mark.parametrize(
    ("limits", "longest"),
    [
        ({"max_input_len": 64, "max_seq_len": 256, "max_num_tokens": 200}, 200),
        ({"max_input_len": 64, "max_seq_len": 256, "max_num_tokens": 8192}, 256),
        ({"max_input_len": 64, "max_seq_len": None, "max_num_tokens": 8192}, 512),
    ],
)
def test_prompts_may_be_as_long_as_the_cpp_runtime_admits(
    machine: Machine, build: LlmBuild, limits: dict[str, Any], longest: int
) -> None:
    assert build("--dry_run", **limits).code == 0
    (network,) = machine.networks
    nodes = [*network.of("ChunkKVPrepare"), *network.of("ChunkKVCompress")]
    assert {node.fields()["max_length"] for node in nodes} == {longest}


def test_missing_ranks_are_noticed_before_the_first_one_is_built(
    machine: Machine, build: LlmBuild, tmp_path: Path
) -> None:
    checkpoint = config_with(tmp_path, mapping__tp_size=2, mapping__world_size=2)
    (checkpoint / "rank0.safetensors").write_bytes(b"")
    (checkpoint / "rank1.safetensors").unlink(missing_ok=True)
    assert "rank1.safetensors is missing of 2 ranks (tp_size 2" in build(checkpoint_dir=checkpoint).error(1)
    assert machine.networks == []


def test_a_hugging_face_checkpoint_is_told_apart(tmp_path: Path, build: LlmBuild) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    assert "convert it with convert_checkpoint.py first" in build("--dry_run", checkpoint_dir=tmp_path).error(1)
    assert "give the output directory of convert_checkpoint.py" in build(
        "--dry_run", checkpoint_dir=tmp_path / "nothing"
    ).error(1)


TENSOR = SimpleNamespace(is_network_input=False)
KEYWORDS = {
    "use_cache": False,
    "qkv": [TENSOR, TENSOR, TENSOR],
    "kv_cache_block_offsets": None,
    "host_context_lengths": None,
    "max_context_length": None,
    "do_cross_attention": True,
    "cross_kv": TENSOR,
    "is_mla_enabled_flag": True,
    "cp_size": 2,
    "vision_start": 0,
    "skip_attn": TENSOR,
    "logn_scaling": TENSOR,
    "relative_attention_bias": TENSOR,
    "qkv_bias": TENSOR,
    "alibi_slopes": TENSOR,
    "attention_mask": TENSOR,
    "attention_packed_mask": TENSOR,
    "spec_decoding_packed_mask": TENSOR,
    "spec_decoding_generation_lengths": TENSOR,
    "attention_output_sf_scale": TENSOR,
    "long_rope_rotary_cos_sin": TENSOR,
    "mrope_rotary_cos_sin": TENSOR,
    "mrope_rotary_sin_cos": TENSOR,
    "mask_type": "sliding_window_causal",
    "q_scaling": 2.0,
    "attn_logit_softcapping_scale": 30.0,
    "position_embedding_type": "long_rope",
    "rotary_embedding_scale_type": "dynamic",
}


def test_every_keyword_of_the_table_is_tried() -> None:
    assert [precondition.name for precondition in LAYER] == list(KEYWORDS)


@pytest.mark.parametrize("name", [name for name in KEYWORDS if name != "mrope_rotary_sin_cos"])  # 0.16's name
def test_layers_are_refused_while_the_network_is_made(machine: Machine, build: LlmBuild, name: str) -> None:
    """A layer that calls with this keyword ends the build before an engine is compiled."""
    from tensorrt_llm import functional
    from tensorrt_llm.layers import attention as layers

    assert name in inspect.signature(functional.gpt_attention).parameters
    kinds = {
        "mask_type": functional.AttentionMaskType,
        "position_embedding_type": functional.PositionEmbeddingType,
        "rotary_embedding_scale_type": functional.RotaryScalingType,
    }
    value = kinds[name][KEYWORDS[name]] if name in kinds else KEYWORDS[name]
    forward = layers.Attention.forward

    def other(self: Any, *positional: Any, **named: Any) -> Any:
        wrapped = layers.gpt_attention
        layers.gpt_attention = lambda **given: wrapped(**{**given, name: value})
        try:
            return forward(self, *positional, **named)
        finally:
            layers.gpt_attention = wrapped

    layers.Attention.forward = other
    said = build().error(1)
    assert said.startswith(f"{name} is ") and "; allowed is " in said and ": " in said.partition("allowed is ")[2]
    assert not build.output.exists()


def test_a_network_configured_otherwise_than_asked_is_refused(machine: Machine, build: LlmBuild) -> None:
    """What the build itself changed in its plugin configuration is seen by the first layer."""
    from tensorrt_llm import builder

    real = builder.PretrainedModel.prepare_inputs

    def changes(self: Any, **given: Any) -> Any:
        from tensorrt_llm._common import default_net

        found = real(self, **given)
        default_net().plugin_config.context_fmha = False
        return found

    builder.PretrainedModel.prepare_inputs = changes
    assert "context_fmha is disable; allowed is enable" in build().error(1)


def test_host_tensors_must_be_network_inputs(machine: Machine, build: LlmBuild) -> None:
    from tensorrt_llm.layers import attention as layers

    forward = layers.Attention.forward

    def other(self: Any, *positional: Any, **named: Any) -> Any:
        bound = inspect.signature(forward).bind(self, *positional, **named)
        bound.arguments["attention_params"].host_request_types.is_network_input = False
        return forward(self, *positional, **named)

    layers.Attention.forward = other
    assert "host_request_types is computed in the network" in build().error(1)


def test_more_lengths_than_rotary_rows(machine: Machine, build: LlmBuild, tmp_path: Path) -> None:
    """Where max_seq_len is TensorRT-LLM's own choice, it is compared when it is known."""
    from tensorrt_llm import builder

    from chunkkv_builder.backends.tensorrt_llm import EngineBuild

    def longer(model: Any, config: Any) -> Any:
        engine = builder.build(model, config)
        engine.config.build_config.max_seq_len = 4096
        return engine

    with pytest.raises(ConfigError, match=naming("max_seq_len 4096 512 rotary")):
        EngineBuild(SETTINGS).engine(llm_model(), build_config(max_seq_len=None), longer)


def test_attention_with_two_outputs_is_refused(machine: Machine) -> None:
    from tensorrt_llm import builder
    from tensorrt_llm.layers import attention as layers

    from chunkkv_builder.backends.tensorrt_llm import EngineBuild

    plain = layers.gpt_attention

    def two(**given: Any) -> Any:
        return (plain(**given)[0], None), None

    two.__signature__ = plain.__signature__
    layers.gpt_attention = two
    with pytest.raises(BuildError, match=naming("--kv_cache_type paged")):
        EngineBuild(SETTINGS).engine(llm_model(), build_config(), builder.build)


def test_values_are_read_from_flags_configurations_and_enums(machine: Machine) -> None:
    from tensorrt_llm.builder import BuildConfig, KVCacheType
    from tensorrt_llm.plugin import PluginConfig

    config = BuildConfig(kv_cache_type=KVCacheType.CONTINUOUS, max_beam_width=2)
    plugins = PluginConfig(gpt_attention_plugin=None, context_fmha=False)
    found = build_values(config, plugins)
    assert (found["kv_cache_type"], found["max_beam_width"]) == ("continuous", 2)
    assert found["gpt_attention_plugin"] is None and found["context_fmha"] is False
    assert build_values(SimpleNamespace(remove_input_padding="disable")) == {"remove_input_padding": False}
