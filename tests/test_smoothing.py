"""Evened out inputs of w8a8: the model stays the same, and channels far larger than others cost little."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import engines
from support.builds import tree
from support.checkpoints import VARIANTS, random_tensors, variant_config, write_checkpoint, write_tensors

from chunkkv.session import ChunkKVSession
from chunkkv_builder import build as build_engine
from chunkkv_builder.backends import input_calibration
from chunkkv_builder.backends.calibration import run_prompts
from chunkkv_builder.backends.onnxruntime import step_weights
from chunkkv_builder.checkpoint.hugging_face import HuggingFaceCheckpoint
from chunkkv_builder.checkpoint.interface import Checkpoint
from chunkkv_builder.checkpoint.tensor_shapes import expected_shapes
from chunkkv_builder.onnx_graph.fused_step import FusedStepGraph
from chunkkv_builder.onnx_graph.merged_weights import MERGED
from chunkkv_builder.onnx_graph.observed_step import OBSERVED_SUFFIX, ObservedStepGraph
from chunkkv_builder.onnx_graph.smoothing import SMALLEST_SHARE, SmoothedCheckpoint, shared_inputs, smoothing_scales
from chunkkv_builder.onnx_graph.weights import write_weights
from chunkkv_builder.plan import make_plan

W8A8 = {"use_weight_only": True, "weight_only_precision": "w8a8"}
IDS = np.array([(7 * i) % 380 + 3 for i in range(48)], np.int64)
LOUD = 30.0  # how much larger the planted channels are


def opened(variant: str) -> HuggingFaceCheckpoint:
    return HuggingFaceCheckpoint.open(engines.checkpoint_dir(variant))


def scales_of(checkpoint: Checkpoint, powers: bool) -> dict[str, np.ndarray]:
    """Return other scales for every channel, from 1/8 to 8, as powers of two or anything."""
    rng, shapes = np.random.default_rng(4), expected_shapes(checkpoint.config)
    found = {}
    for shared in shared_inputs(checkpoint.config):
        logarithms = rng.uniform(-3, 3, shapes[shared.divided[0]][0])
        found[shared.projection] = 2 ** (np.rint(logarithms) if powers else logarithms).astype(np.float32)
    return found


def float_caches(checkpoint: Checkpoint, folder: Path) -> list[np.ndarray]:
    """Return the logits of IDS and what they leave in the cache, with weights in float32."""
    folder.mkdir()
    plan = make_plan(checkpoint.config, None)
    locations = write_weights(folder / "weights.safetensors", step_weights(checkpoint, None, 64))
    outputs = ["logits", *(f"present_{kind}.{part.number}" for part in plan.parts for kind in ("key", "value"))]
    (found,) = run_prompts(FusedStepGraph(plan, locations).build(), folder, plan, [IDS], outputs)
    return [found[name] for name in outputs]


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_scaled_channels_leave_every_family_as_it_is(variant: str, tmp_path: Path) -> None:
    """Powers of two change exponents alone, so that not one bit of a result differs."""
    checkpoint = opened(variant)
    plain = float_caches(checkpoint, tmp_path / "plain")
    exact = float_caches(SmoothedCheckpoint(checkpoint, scales_of(checkpoint, powers=True)), tmp_path / "exact")
    close = float_caches(SmoothedCheckpoint(checkpoint, scales_of(checkpoint, powers=False)), tmp_path / "close")
    for first, second, third in zip(plain, exact, close, strict=True):
        assert np.array_equal(first, second)
        assert np.abs(first - third).max() < 1e-4 * np.abs(first).max()


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_every_projection_but_that_behind_attention_reads_a_scaled_input(variant: str) -> None:
    checkpoint = opened(variant)
    shapes = expected_shapes(checkpoint.config)
    shared = shared_inputs(checkpoint.config)
    read = [name for one in shared for name in one.multiplied]
    assert len(set(read)) == len(read) == 6 * checkpoint.config.num_layers
    assert not [name for name in shapes if name.endswith("_proj.weight") and name not in read and "o_proj" not in name]
    made = [name for one in shared for name in one.divided]
    assert len(set(made)) == len(made)
    for one in shared:
        assert {shapes[name][0] for name in one.divided} == {shapes[name][1] for name in one.multiplied}


def test_a_scaled_checkpoint_is_otherwise_the_given_one() -> None:
    given = opened("llama_bias")
    smoothed = SmoothedCheckpoint(given, scales_of(given, powers=False))
    scaled = {name for one in shared_inputs(given.config) for name in (*one.divided, *one.multiplied)}
    assert smoothed.names() == given.names() and smoothed.config == given.config
    for name in given.names():
        first, second = given.converted(name, "float32"), smoothed.converted(name, "float32")
        assert second.dtype == np.float32 and second.shape == smoothed.shape(name)
        assert np.array_equal(first, second) == (name not in scaled)
    down = "model.layers.1.mlp.down_proj"
    (scales,) = (values for name, values in scales_of(given, powers=False).items() if name == down)
    only = SmoothedCheckpoint(given, {down: scales})
    for kind in ("weight", "bias"):
        ours, theirs = (one.converted(f"model.layers.1.mlp.up_proj.{kind}", "float32") for one in (only, given))
        assert np.allclose((ours.T * scales).T, theirs, rtol=1e-6, atol=0)


def test_blocks_of_a_file_are_no_longer_those_of_a_scaled_weight() -> None:
    class Stored(HuggingFaceCheckpoint):
        def stored_blocks(self, name: str, bits: int) -> None:
            raise LookupError(name)

    given = Stored.open(engines.checkpoint_dir("llama3"))
    smoothed = SmoothedCheckpoint(given, scales_of(given, powers=True))
    assert smoothed.stored_blocks("model.layers.0.mlp.up_proj.weight", 8) is None
    with pytest.raises(LookupError):
        smoothed.stored_blocks("model.layers.0.self_attn.o_proj.weight", 8)


def test_a_scale_is_half_of_what_a_channel_is_larger() -> None:
    found = smoothing_scales(np.array([1.0, 16.0, 1 / 16, 0.0, np.inf, np.nan]))
    assert found.dtype == np.float32
    assert np.allclose(found, [1, 2, 0.5, SMALLEST_SHARE**0.5, 1, 1])


@pytest.mark.parametrize("precision", [None, "w8a8"])
def test_the_observed_sizes_are_those_of_the_inputs(precision: str | None, tmp_path: Path) -> None:
    checkpoint = opened("llama3")
    plan, first = make_plan(checkpoint.config, None), f"model.layers.0.self_attn.{MERGED}"
    locations = write_weights(tmp_path / "weights.safetensors", step_weights(checkpoint, precision, 64))
    graph = ObservedStepGraph(plan, locations, "int8", {first}).build()
    (found,) = run_prompts(graph, tmp_path, plan, [IDS], [first + OBSERVED_SUFFIX])
    assert not (tmp_path / "calibration.onnx").exists()
    table, norm = (
        checkpoint.converted(f"model.{name}.weight", "float32") for name in ("embed_tokens", "layers.0.input_layernorm")
    )
    inputs = table[IDS].astype(np.float64)
    inputs = inputs / np.sqrt((inputs**2).mean(axis=1, keepdims=True)) * norm
    expected = (inputs**2 / (inputs**2).mean(axis=1, keepdims=True)).sum(axis=0)
    assert np.allclose(found[first + OBSERVED_SUFFIX], expected, rtol=1e-4 if precision is None else 0.05, atol=0.05)


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which some channels in every input are far larger than the others."""
    folder = write_checkpoint(tmp_path_factory.mktemp("loud") / "checkpoint", "llama3")
    tensors = random_tensors(variant_config("llama3"))
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        for norm, readers in (("input", ("q", "k", "v")), ("post_attention", ("gate", "up"))):
            tensors[f"{prefix}.{norm}_layernorm.weight"][[5, 40]] *= LOUD
            part = "self_attn" if norm == "input" else "mlp"
            for reader in readers:
                tensors[f"{prefix}.{part}.{reader}_proj.weight"][:, [5, 40]] /= LOUD
        tensors[f"{prefix}.mlp.up_proj.weight"][7] *= LOUD
        tensors[f"{prefix}.mlp.down_proj.weight"][:, 7] /= LOUD
    write_tensors(folder, tensors)
    return folder


def built(checkpoint: Path, output: Path, **flags: Any) -> Path:
    limits = {"max_seq_len": 64, "log_level": "error"}
    build_engine.main(engines.command_line({"checkpoint_dir": checkpoint, "output_dir": output, **limits, **flags}))
    return output


def logits(engine: Path) -> np.ndarray:
    executor = ChunkKVSession.from_dir(engine, threads=1).executor
    return executor.score_block(executor.new_cache(1, len(IDS)), IDS, 0, 0)


def test_loud_channels_cost_a_fraction_of_what_they_would(
    loud: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = logits(built(loud, tmp_path / "exact"))
    smoothed = logits(built(loud, tmp_path / "smoothed", **W8A8))
    monkeypatch.setattr(input_calibration, "smoothing_scales", lambda shares: np.ones_like(shares, np.float32))
    plain = logits(built(loud, tmp_path / "plain", **W8A8))
    before, after = (np.sqrt(((found - exact) ** 2).mean()) / exact.std() for found in (plain, smoothed))
    assert before > 0.1 and after < 0.4 * before


@pytest.mark.parametrize("precision", ["int4", None])
def test_blocks_of_a_prompt_are_evened_out_beside_weights_that_are_not(
    precision: str | None, loud: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {} if precision is None else {"use_weight_only": True, "weight_only_precision": precision}
    flags |= {"max_seq_len": 200}
    alone, exact = built(loud, tmp_path / "alone", **flags), built(loud, tmp_path / "exact", max_seq_len=200)
    both = built(loud, tmp_path / "both", **flags, prefill_precision="w8a8")
    monkeypatch.setattr(input_calibration, "smoothing_scales", lambda shares: np.ones_like(shares, np.float32))
    plain = built(loud, tmp_path / "plain", **flags, prefill_precision="w8a8")
    assert np.array_equal(logits(alone), logits(both))
    keys, rough, smoothed = (prompt_keys(engine) for engine in (exact, plain, both))
    before, after = (np.sqrt(((found - keys) ** 2).mean()) / keys.std() for found in (rough, smoothed))
    assert before > 0.03 and after < 0.4 * before


def prompt_keys(engine: Path) -> np.ndarray:
    """Return the last layer's keys of a prompt whose blocks all but the last are those of prefill_blocks.onnx."""
    prefiller = ChunkKVSession.from_dir(engine, threads=1).executor.blockwise_prefiller()
    prompt = np.tile(IDS, 3)
    cache = prefiller.new_cache(1, len(prompt))
    prefiller.fill(prompt, cache, threading.Event())
    return cache.keys[-1]


def test_two_builds_are_alike_and_only_their_numbers_differ_from_those_without(
    loud: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (tree(built(loud, tmp_path / name, **W8A8)) for name in ("first", "second"))
    assert first == second
    monkeypatch.setattr(input_calibration, "smoothing_scales", lambda shares: np.ones_like(shares, np.float32))
    plain = tree(built(loud, tmp_path / "plain", **W8A8))
    assert {name for name in plain if plain[name] != first[name]} == {"weights.safetensors", "manifest.json"}
    assert len(plain["weights.safetensors"]) == len(first["weights.safetensors"])


def test_both_calibrations_follow_each_other(loud: Path, tmp_path: Path) -> None:
    """The cache's scales are those of the weights that the engine has."""
    float_cache = logits(built(loud, tmp_path / "float", **W8A8))
    eight = logits(built(loud, tmp_path / "eight", **W8A8, kv_cache_dtype="int8"))
    assert 0 < np.sqrt(((eight - float_cache) ** 2).mean()) < 0.2 * float_cache.std()
