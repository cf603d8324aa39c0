"""GGUF files: an engine made of one computes what an engine of the same weights in safetensors does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from support import engines
from support.checkpoints import as_read, variant_config
from support.gguf_files import DRAWN, GGUF_VARIANTS, K_SIZES, QUANTISED, random_blocks, write_gguf, write_twin
from support.messages import naming

from chunkkv.errors import CheckpointError, ConfigError
from chunkkv.requests import make_requests
from chunkkv.session import ChunkKVSession
from chunkkv_builder import build
from chunkkv_builder.checkpoint.formats import open_checkpoint
from chunkkv_builder.checkpoint.gguf_file import TYPES
from chunkkv_builder.checkpoint.gguf_quants import BLOCK_FORMATS, to_blocks
from chunkkv_builder.checkpoint.model_config import ModelConfig, rope_frequencies
from chunkkv_builder.config import longest_context
from chunkkv_builder.onnx_graph import quantize

PROMPT = np.random.default_rng(0).integers(3, 300, 40)
LIMITS = {"max_seq_len": 128, "max_num_tokens": 16, "max_batch_size": 1}


def engine(checkpoint: Path, output: Path, **flags: Any) -> Path:
    named = {"checkpoint_dir": checkpoint, "output_dir": output, "log_level": "error", **LIMITS, **flags}
    build.main(engines.command_line(named))
    return output


PHI3 = {"rope_scaling": None, "partial_rotary_factor": 1.0, "max_position_embeddings": 512}


def logits(engine_dir: Path) -> np.ndarray:
    """Return the logits after PROMPT, with the whole cache."""
    session = ChunkKVSession.from_dir(engine_dir, threads=1)
    request = make_requests([PROMPT], None, session.limits, session.settings, None, None, 1)[0]
    cache = session.executor.new_cache(1, request.kept_tokens + 1)
    (prefilled,) = session.executor.prefiller().run([request], cache, threading.Event())
    return prefilled.logits


def assert_same_engine(tmp_path: Path, variant: str, kind: str, tolerance: float = 0.0, **overrides: Any) -> None:
    weights = write_gguf(tmp_path / "model.gguf", variant, kind, **overrides)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    parts = as_read(variant_config(variant, **overrides), weights)
    assert sorted(checkpoint.names()) == sorted(parts)
    for name, weight in parts.items():
        assert checkpoint.shape(name) == weight.shape
        assert np.array_equal(checkpoint.converted(name, "float32"), weight), name
    twin = write_twin(tmp_path / "twin", variant, weights, **overrides)
    ours = logits(engine(tmp_path / "model.gguf", tmp_path / "ours"))
    expected = logits(engine(twin, tmp_path / "expected"))
    assert np.ptp(expected) > 1
    assert np.abs(ours - expected).max() <= tolerance


# Llama 3's scaling is stored as divisors, which are rounded to float32: its angles differ in the last bit.
@pytest.mark.parametrize("variant", GGUF_VARIANTS)
def test_every_family_equals_its_safetensors_twin(tmp_path: Path, variant: str) -> None:
    assert_same_engine(tmp_path, variant, "Q8_0", tolerance=1e-4 if variant == "llama3" else 0.0)


@pytest.mark.parametrize("kind", ["F32", "Q4_0", "Q8_0"])
@pytest.mark.parametrize("partial", [0.5, 1.0])
def test_fused_projections_equal_their_safetensors_twin(tmp_path: Path, kind: str, partial: float) -> None:
    assert_same_engine(tmp_path, "phi3", kind, **{**PHI3, "partial_rotary_factor": partial})


def test_a_window_of_phi3_limits_the_sequences_and_longrope_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "phi3", **{**PHI3, "sliding_window": 100})
    model = open_checkpoint(tmp_path / "model.gguf").config
    assert model.sliding_window == 100 and longest_context(model) == 100
    write_gguf(tmp_path / "model.gguf", "phi3", metadata={"phi3.rope.scaling.attn_factor": 1.25}, **PHI3)
    with pytest.raises(ConfigError, match=naming("'phi3.rope.scaling.attn_factor' is 1.25")):
        open_checkpoint(tmp_path / "model.gguf")
    for count, words in ((11, "'rope.dimension_count' is 11 even 16"), (18, "'rope.dimension_count' is 18 even 16")):
        write_gguf(tmp_path / "model.gguf", "phi3", metadata={"phi3.rope.dimension_count": count}, **PHI3)
        with pytest.raises(ConfigError, match=naming(words)):
            open_checkpoint(tmp_path / "model.gguf")


def test_kept_blocks_of_fused_projections(tmp_path: Path) -> None:
    sizes = {**PHI3, "intermediate_size": 128}
    weights = write_gguf(tmp_path / "model.gguf", "phi3", "Q4_0", **sizes)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    parts = as_read(variant_config("phi3", **sizes), weights)
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.layers.2.mlp.up_proj.weight"):
        blocks = checkpoint.stored_blocks(name, 4).load()
        packed = quantize.pack(blocks.codes, 4)
        assert np.array_equal(quantize.dequantize(packed, blocks.scales, 64), parts[name])


@pytest.mark.parametrize("kind", ["F32", *QUANTISED])
def test_every_type_equals_its_dequantised_twin(tmp_path: Path, kind: str) -> None:
    assert_same_engine(tmp_path, "llama_bias", kind)


@pytest.mark.parametrize("kind", DRAWN)
def test_every_k_type_equals_its_dequantised_twin(tmp_path: Path, kind: str) -> None:
    assert_same_engine(tmp_path, "llama_tied", kind, head_dim=64, **K_SIZES)


def test_the_config_is_that_of_the_twin(tmp_path: Path) -> None:
    for variant in GGUF_VARIANTS:
        weights = write_gguf(tmp_path / f"{variant}.gguf", variant)
        ours = open_checkpoint(tmp_path / f"{variant}.gguf").config.to_dict()
        twin = open_checkpoint(write_twin(tmp_path / variant, variant, weights)).config.to_dict()
        if variant == "mistral":
            assert (ours.pop("architecture"), twin.pop("architecture")) == ("LlamaForCausalLM", "MistralForCausalLM")
        if variant == "llama3":
            assert ours.pop("rotary_scaling")["rope_type"] == "factors"
            assert twin.pop("rotary_scaling")["rope_type"] == "llama3"
        assert ours.pop("norm_epsilon") == np.float32(twin.pop("norm_epsilon"))
        assert ours == twin


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_rope_factors_and_a_linear_factor_go_together(tmp_path: Path, key: str) -> None:
    for variant in ("llama2", "llama3"):
        write_gguf(tmp_path / "plain.gguf", variant)
        write_gguf(tmp_path / "scaled.gguf", variant, metadata={f"llama.{key}": 2.0})
        plain, scaled = (open_checkpoint(tmp_path / f"{name}.gguf").config for name in ("plain", "scaled"))
        assert np.array_equal(rope_frequencies(scaled)[0], rope_frequencies(plain)[0] / 2)
        assert ModelConfig.from_dict(json.loads(json.dumps(scaled.to_dict()))) == scaled


def test_rope_factors_and_yarn_do_not(tmp_path: Path) -> None:
    scaling = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}
    write_gguf(tmp_path / "model.gguf", "llama3", metadata=scaling)
    with pytest.raises(ConfigError, match=naming("'rope.scaling.type' is 'yarn' 'rope_freqs.weight'")):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("kind", "bits"), [(kind, bits) for kind in BLOCK_FORMATS for bits in (4, 8) if BLOCK_FORMATS[kind].bits <= bits]
)
def test_blocks_stand_for_the_same_values(kind: str, bits: int) -> None:
    tensor_type = next(entry for entry in TYPES.values() if entry.name == kind)
    if kind in DRAWN:
        data = random_blocks((24, 512), kind)
    else:
        weight = np.random.default_rng(1).normal(0.1, 1, (24, 512)).astype(np.float32)
        data = gguf.quantize(weight, gguf.GGMLQuantizationType[kind])
    expected = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
    blocks = to_blocks(data, tensor_type, bits)
    values = quantize.dequantize(quantize.pack(blocks.codes, bits), blocks.scales, 512, blocks.offsets)
    assert blocks.codes.max() < 2**bits and (blocks.offsets is not None) == BLOCK_FORMATS[kind].has_minimum
    # Without a minimum not a bit differs. With one, two sums are rounded in another order.
    tolerance = 0 if blocks.offsets is None else 4 * np.finfo(np.float32).eps * np.abs(expected).max()
    assert np.abs(values - expected).max() <= tolerance


PACKED = [("Q4_0", "int4"), ("Q4_1", "int4"), ("Q4_K", "int4"), ("Q8_0", "int8"), ("Q5_0", "int8"), ("Q5_1", "int8")]


@pytest.mark.parametrize(("kind", "precision"), [*PACKED, ("Q5_K", "int8"), ("Q4_1", "int8")])
def test_weight_only_engines_keep_the_blocks(tmp_path: Path, kind: str, precision: str, capsys: Any) -> None:
    sizes = {"head_dim": 64, **K_SIZES} if kind in DRAWN else {}
    weights = write_gguf(tmp_path / "model.gguf", "llama_tied", kind, **sizes)
    flags = {"use_weight_only": True, "weight_only_precision": precision, "log_level": "info"}
    flags["weight_only_activations"] = "float32"  # so that only the weights can differ
    packed = engine(tmp_path / "model.gguf", tmp_path / "packed", **flags)
    names = [name for name in weights if name.endswith(("_proj.weight", "embed_tokens.weight"))]
    assert f"{len(names)} weights in {kind}: blocks kept as {precision}\n" in capsys.readouterr().err
    exact = logits(engine(tmp_path / "model.gguf", tmp_path / "exact"))
    assert np.abs(logits(packed) - exact).max() <= 1e-4
    stored = load_file(packed / "weights.safetensors")
    scale = open_checkpoint(tmp_path / "model.gguf").config.head_dim ** -0.5  # of attention, which queries bring along
    for name in {re.sub("[qkv]_proj", "qkv_proj", name) for name in names}:
        parts = (stored[f"{name}.packed"], stored[f"{name}.scales"])
        pieces = [name.replace("qkv_proj", f"{piece}_proj") for piece in "qkv"] if "qkv_proj" in name else [name]
        expected = np.concatenate([weights[piece] * (scale if "q_proj" in piece else 1) for piece in pieces])
        values = quantize.dequantize(*parts, expected.shape[1], stored.get(f"{name}.offsets"))
        assert np.abs(values - expected).max() <= 1e-6 * np.abs(expected).max()


def test_weight_only_says_what_is_rounded_again(tmp_path: Path, capsys: Any) -> None:
    flags = {"use_weight_only": True, "log_level": "info"}
    for kind, precision in (("Q8_0", "int4"), ("Q6_K", "int8")):
        write_gguf(tmp_path / "model.gguf", "llama_tied", kind, head_dim=64, **K_SIZES)
        engine(tmp_path / "model.gguf", tmp_path / kind, weight_only_precision=precision, **flags)
        said = capsys.readouterr().err
        counts = [(14, "rounded again, to int4"), (1, "kept as int8")] if kind == "Q8_0" else [(15, "again, to int8")]
        assert all(re.search(rf"^{count} weights in {kind}: .*{what}$", said, re.MULTILINE) for count, what in counts)
    write_gguf(tmp_path / "model.gguf", "llama_tied", "F16")
    engine(tmp_path / "model.gguf", tmp_path / "F16", **flags)
    assert "weights in" not in capsys.readouterr().err
    write_gguf(tmp_path / "model.gguf", "llama_tied", "Q4_1")
    engine(tmp_path / "model.gguf", tmp_path / "float32", log_level="info")
    assert "weights in" not in capsys.readouterr().err


def test_a_folder_with_one_model_is_taken(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "qwen3")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.path == tmp_path and checkpoint.config.family == "qwen3"
    (tmp_path / "renamed").write_bytes((tmp_path / "model.gguf").read_bytes())
    assert open_checkpoint(tmp_path / "renamed").config.family == "qwen3"
    write_gguf(tmp_path / "other.gguf", "qwen2")
    with pytest.raises(CheckpointError, match=naming("2 GGUF models", "model.gguf, other.gguf")):
        open_checkpoint(tmp_path)


def test_split_files_are_one_model(tmp_path: Path) -> None:
    weights = write_gguf(tmp_path / "big.gguf", "qwen2", "Q4_0", parts=3)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts] == [f"big-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for path in (parts[0], tmp_path):
        checkpoint = open_checkpoint(path)
        assert all(np.array_equal(checkpoint.converted(name, "float32"), weights[name]) for name in weights)
    with pytest.raises(CheckpointError, match=naming("big-00002-of-00003.gguf", "the first")):
        open_checkpoint(parts[1])
    swapped = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(CheckpointError, match=naming("part 3 of 3", "part 2 of 3")):
        open_checkpoint(tmp_path)
    parts[1].write_bytes(swapped)
    parts[2].unlink()
    with pytest.raises(CheckpointError, match=naming("big-00003-of-00003.gguf is missing")):
        open_checkpoint(tmp_path)


def test_reading_one_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "llama3", "Q4_0")
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'safetensors', 'sentencepiece']))\n"
        "from chunkkv_builder.checkpoint.formats import open_checkpoint\n"
        "c = open_checkpoint(sys.argv[1]); print(sum(float(c.converted(n, 'float32').sum()) for n in c.names()) != 0)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    output = subprocess.run(command, env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "True"


REFUSED = [
    ({"general.architecture": "gemma3"}, ConfigError, "architecture 'gemma3' is not supported llama qwen2 qwen3 phi3"),
    ({"llama.expert_count": 8}, ConfigError, "'llama.expert_count' is 8"),
    ({"llama.attention.sliding_window": 4096}, ConfigError, "'llama.attention.sliding_window' is 4096"),
    ({"llama.final_logit_softcapping": 30.0}, ConfigError, "'llama.final_logit_softcapping' is 30.0"),
    ({"llama.rope.scaling.type": "longrope"}, ConfigError, "'rope.scaling.type' is 'longrope'"),
    ({"llama.rope.dimension_count": 8}, ConfigError, "'rope.dimension_count' is 8 only 16"),
    ({"llama.block_count": 4}, CheckpointError, "'model.layers.3.input_layernorm.weight' is missing 4 layers"),
    ({"llama.block_count": 2}, CheckpointError, "'blk.2.attn_q.weight' is extra"),
    ({"llama.feed_forward_length": 64}, CheckpointError, "'blk.0.ffn_gate.weight' [96, 64] [64, 64]"),
]


@pytest.mark.parametrize(("metadata", "error", "words"), REFUSED)
def test_what_is_not_computed_is_refused_by_name(
    tmp_path: Path, metadata: dict[str, Any], error: type, words: str
) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama_linear", metadata=metadata)
    with pytest.raises(error, match=naming(*words.split())) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
