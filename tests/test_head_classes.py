"""Engines whose heads keep unequal numbers of tokens, against a NumPy model that hides what each head dropped."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import class_engines, engines
from support.checkpoints import random_tensors, variant_config
from support.class_engines import CLASSES, KV_HEADS, LAYERS, READING, session, settings_of
from support.forced_tokens import forced_logits
from support.masked_forward import Kept, masked_forward
from support.messages import naming
from support.tensorrt_double import Double, machine_of

from chunkkv import SamplingParams, reference_layers
from chunkkv.batching import BatchingLimits, ContinuousBatcher
from chunkkv.engine.backends import TRAITS
from chunkkv.engine.recipe import write_recipe
from chunkkv.errors import ConfigError
from chunkkv.evaluation.lm_eval.continuations import CompressedPrompt
from chunkkv.requests import make_requests
from chunkkv.session import ChunkKVSession
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder import build as build_engine
from chunkkv_builder.backends import graph_build

TOLERANCE = 2e-4
machine = pytest.fixture(machine_of)
ATTENTIONS = ("fused", "standard")
CHANGES: dict[str, dict[str, Any]] = {
    "recent local heads": {},
    "local heads choose chunks": {"local_policy": "chunks"},
    "no local heads": {
        "reading_heads": ((0, 1, 2),) * LAYERS,
        "reading_share_per_10k": 10_000,
        "local_share_per_10k": 10_000,
    },
    "no reading heads": {
        "reading_heads": ((),) * LAYERS,
        "reading_share_per_10k": 10_000,
        "local_share_per_10k": 10_000,
    },
    "groups": {
        "reading_heads": ((0, 2), (0, 2), (1,)),
        "layer_groups": ((0, 1), (2,)),
        "local_policy": "chunks",
        "leader": "last",
        "reading_share_per_10k": 14_000,
        "local_share_per_10k": 5_000,
    },
    "budget": {"budget_tokens": 24},
    "a choice per head": {"heads": "each", "local_policy": "chunks"},
    "a choice per reading head": {
        "heads": "each",
        "window_reduce": "max",
        "head_reduce": "max",
        "value_norm": "on",
    },
}


def settings_for(name: str) -> ChunkKVSettings:
    if name == "ranked":
        return settings_of(budget_split="ranked")
    if name == "ranked heads":
        return settings_of(**class_engines.RANKED_HEADS)
    if name == "each without classes":
        return settings_of(heads="each")
    return settings_of(**{**CLASSES, **CHANGES[name]})


def tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 300, count).tolist()


@cache
def model() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    config = variant_config(class_engines.VARIANT, **class_engines.SIZES)
    return config, random_tensors(config)


def kept_of(settings: ChunkKVSettings, prompt: Sequence[int]) -> Kept:
    """Return per layer and KV head what the reference keeps, from the NumPy model's own queries and keys."""
    forward = masked_forward(*model(), prompt, len(prompt))
    selections = reference_layers.select_layers(
        {layer: query[None, :, -settings.window :] for layer, query in enumerate(forward.queries)},
        [key[None] for key in forward.keys],
        np.array([len(prompt)]),
        settings,
        values=[value[None] for value in forward.values],
    )
    parts = class_engines.plan_of(settings).parts
    kept: list[list[np.ndarray]] = [[np.empty(0)] * KV_HEADS for _ in range(LAYERS)]
    for part, selection in zip(parts, selections, strict=True):
        for place, head in enumerate(part.kv_heads):
            indices = selection.kept_indices[0]
            kept[part.layer][head] = indices if indices.ndim == 1 else indices[place]
    return kept


def expected_logits(settings: ChunkKVSettings, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
    """Return the logits after the prompt and after every token of the answer but the last."""
    sequence = [*prompt, *answer[:-1]]
    return masked_forward(*model(), sequence, len(prompt), kept_of(settings, prompt)).logits[len(prompt) - 1 :]


@pytest.mark.parametrize("attention", ["fused", "standard"])
@pytest.mark.parametrize("name", [*CHANGES, "ranked", "ranked heads", "each without classes"])
def test_answers_are_those_of_a_model_that_hides_what_was_dropped(name: str, attention: str) -> None:
    """Two prompts of unequal length in one batch; the second one has fewer blocks than the first."""
    settings = settings_for(name)
    prompts, answers = [tokens(90, 1), tokens(41, 2)], [tokens(6, 3), tokens(6, 4)]
    found = forced_logits(session(settings, attention), prompts, answers)
    for prompt, answer, logits in zip(prompts, answers, found, strict=True):
        assert np.abs(logits - expected_logits(settings, prompt, answer)).max() <= TOLERANCE


def test_a_hidden_token_would_be_seen() -> None:
    """One more dropped token of one head moves the logits far beyond the tolerance, so the check above can fail."""
    settings, prompt, answer = settings_for("recent local heads"), tokens(90, 1), tokens(6, 3)
    kept = [list(heads) for heads in kept_of(settings, prompt)]
    kept[2][1] = kept[2][1][1:]
    wrong = masked_forward(*model(), [*prompt, *answer[:-1]], len(prompt), kept).logits[len(prompt) :]
    assert np.abs(wrong - expected_logits(settings, prompt, answer)[1:]).max() > 20 * TOLERANCE


@pytest.mark.parametrize("name", [*CHANGES, "ranked", "ranked heads", "each without classes"])
def test_keeping_everything_equals_no_compression_bit_for_bit(name: str) -> None:
    params, prompts = SamplingParams(8, logprobs=True), [tokens(90, 1), tokens(41, 2)]
    found = session(settings_for(name)).generate(prompts, params, keep_ratio=1.0)
    expected = session(None).generate(prompts, params)
    for mine, plain in zip(found, expected, strict=True):
        assert (mine.token_ids, mine.logprobs) == (plain.token_ids, plain.logprobs)
        assert mine.statistics.cache_bytes == plain.statistics.cache_bytes


@pytest.mark.parametrize(("name", "parts"), [("ranked", LAYERS), ("ranked heads", LAYERS * KV_HEADS)])
def test_what_is_ranked_together_keeps_what_was_requested_in_total(name: str, parts: int) -> None:
    settings = settings_for(name)
    engine, prompt = session(settings), tokens(150, 5)
    (request,) = make_requests([prompt], None, engine.limits, settings, None, None, 4)
    cache = engine.executor.new_cache(1, engine.executor.capacity_for(request.class_lengths))
    (prefilled,) = engine.executor.prefiller().run([request], cache, threading.Event())
    lengths = prefilled.kept_lengths
    assert lengths is not None and len(set(lengths)) > 1
    assert sum(lengths) == parts * request.kept_tokens and min(lengths) >= settings.layer_floor
    assert prefilled.choice is not None
    assert tuple(len(prefilled.choice.kept_indices[part]) for part in range(parts)) == lengths
    result = engine.generate(prompt, SamplingParams(4))
    assert result.statistics.cache_bytes == request.kept_tokens * engine.executor.kv_bytes_per_token
    with ContinuousBatcher(engine, BatchingLimits(slots=2)) as batcher:
        (last,) = [event.finished for event in batcher.stream(prompt, SamplingParams(4)) if event.finished]
    assert last.token_ids == result.token_ids


@pytest.mark.parametrize("keep_ratio", [0.15, 0.4, 0.8])
def test_the_total_over_the_classes_is_what_was_requested(keep_ratio: float) -> None:
    settings = settings_for("recent local heads")
    engine, prompt = session(settings), tokens(150, 5)
    statistics = engine.generate(prompt, SamplingParams(2), keep_ratio=keep_ratio).statistics
    head_bytes = engine.executor.kv_bytes_per_token // (LAYERS * KV_HEADS)
    wanted = statistics.kept_tokens * LAYERS * KV_HEADS
    local = LAYERS * KV_HEADS - sum(map(len, READING))
    assert wanted - local < statistics.cache_bytes // head_bytes <= wanted
    assert statistics.cache_bytes % head_bytes == 0
    reading, recent = settings.class_lengths(150, round(keep_ratio * 10_000))
    assert statistics.allocated_cache_bytes == head_bytes * (3 * (reading + 2) + local * (recent + 2))


def test_the_choice_names_every_leading_part_and_is_the_references() -> None:
    settings, prompt = settings_for("recent local heads"), tokens(90, 1)
    engine = session(settings)
    (request,) = make_requests([prompt], None, engine.limits, settings, None, None, 0)
    cache = engine.executor.new_cache(1, engine.executor.capacity_for(request.class_lengths))
    (prefilled,) = engine.executor.prefiller().run([request], cache, threading.Event())
    choice = prefilled.choice
    assert choice is not None and prefilled.kept_lengths == request.class_lengths == settings.class_lengths(90)
    layout = engine.executor.cache_layout
    assert [(part.layer, part.head_class, part.kv_heads) for part in layout.parts] == [
        (0, "reading", (0, 2)),
        (0, "local", (1,)),
        (1, "local", (0, 1, 2)),
        (2, "reading", (1,)),
        (2, "local", (0, 2)),
    ]
    assert set(choice.token_scores) == {0, 3} and set(choice.kept_indices) == set(range(len(layout.parts)))
    kept, forward = kept_of(settings, prompt), masked_forward(*model(), prompt, len(prompt))
    for number, part in enumerate(layout.parts):
        indices = choice.kept_indices[number]
        assert np.array_equal(indices, kept[part.layer][part.kv_heads[0]])
        expected = forward.keys[part.layer][list(part.kv_heads)][:, indices]
        assert np.abs(cache.keys[number][0, :, : len(indices)] - expected).max() <= TOLERANCE


def test_a_permuted_batch_gives_permuted_answers() -> None:
    engine = session(settings_for("recent local heads"))
    prompts, params = [tokens(90, 1), tokens(41, 2), tokens(12, 6), tokens(9, 7)], SamplingParams(8)
    answers = [result.token_ids for result in engine.generate(prompts, params)]
    order = [2, 0, 3, 1]
    permuted = engine.generate([prompts[row] for row in order], params)
    assert [result.token_ids for result in permuted] == [answers[row] for row in order]
    assert [engine.generate(prompt, params).token_ids for prompt in prompts] == answers


@pytest.mark.parametrize("name", [*CHANGES, "each without classes"])
def test_tensorrt_answers_as_onnx_runtime_does(
    machine: Double, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, params = settings_for(name), SamplingParams(8, logprobs=True)
    monkeypatch.setattr(graph_build, "chunkkv_settings", lambda flags, *sizes: settings)
    prompts, ratios = [tokens(90, 1), tokens(41, 2), tokens(120, 9), tokens(9, 7)], [None, 0.3, 1.0, 0.5]
    expected = session(settings).generate(prompts, params, keep_ratio=ratios)
    flags = {"checkpoint_dir": class_engines.checkpoint(), "output_dir": tmp_path / "engine", "backend": "tensorrt"}
    limits = {"max_batch_size": 4, "max_input_len": 192, "max_seq_len": 256, "max_num_tokens": 192 * 2}
    options = {"dtype": "float32", "chunkkv": True, "chunkkv_ops": "functions", "log_level": "error"}
    build_engine.main(engines.command_line({**flags, **limits, **options}))
    engine = ChunkKVSession.from_dir(tmp_path / "engine")
    assert engine.executor.cache_layout == session(settings).executor.cache_layout
    found = engine.generate(prompts, params, keep_ratio=ratios)
    for mine, other in zip(found, expected, strict=True):
        assert mine.token_ids == other.token_ids
        assert np.allclose(mine.logprobs, other.logprobs, atol=TOLERANCE)
        assert mine.statistics.cache_bytes == other.statistics.cache_bytes
    assert machine.registry.loaded == []


def test_layers_of_both_classes_can_be_read_as_a_whole() -> None:
    engine, prompt = session(settings_for("recent local heads")), tokens(40, 8)
    prefiller = engine.executor.blockwise_prefiller()
    cache = prefiller.new_cache(1, len(prompt))
    prefiller.fill(np.array(prompt), cache, threading.Event())
    forward = masked_forward(*model(), prompt, len(prompt))
    for layer in range(LAYERS):
        keys, values = cache.layer(layer)
        assert np.abs(keys[0] - forward.keys[layer]).max() <= TOLERANCE
        assert np.abs(values[0] - forward.values[layer]).max() <= TOLERANCE


def test_a_batcher_and_a_continuation_keep_the_lengths_of_the_classes() -> None:
    engine = session(settings_for("recent local heads"))
    prompts, params = [tokens(90, 1), tokens(41, 2), tokens(120, 9)], SamplingParams(8, logprobs=True)
    expected = engine.generate(prompts, params)
    with ContinuousBatcher(engine, BatchingLimits(slots=2)) as batcher:
        streams = [batcher.stream(prompt, params) for prompt in prompts]
        found = [[event for event in stream][-1].finished for stream in streams]
    assert [result.token_ids for result in found if result] == [result.token_ids for result in expected]
    for prompt, result in zip(prompts, expected, strict=True):
        assert result.logprobs is not None
        total, greedy = CompressedPrompt(engine, prompt, 8).score(result.token_ids)
        assert total == pytest.approx(sum(result.logprobs), abs=1e-3) and greedy


def test_an_inspection_shows_every_class() -> None:
    settings, prompt = settings_for("recent local heads"), tokens(90, 1)
    shown = session(settings).inspect(prompt).groups
    assert [(group.layers, group.head_class, group.kv_heads) for group in shown] == [
        ((0,), "reading", (0, 2)),
        ((0,), "local", (1,)),
        ((1,), "local", (0, 1, 2)),
        ((2,), "reading", (1,)),
        ((2,), "local", (0, 2)),
    ]
    kept = kept_of(settings, prompt)
    for group in shown:
        assert np.array_equal(group.kept_indices, kept[group.leader][group.kv_heads[0]])
        assert (group.token_scores.max() > 0) == (group.head_class == "reading")
    assert all(len(group.kept_indices) == 90 for group in session(settings).inspect(prompt, keep_ratio=1.0).groups)


@pytest.mark.parametrize("variant", ["gemma2", "gemma3", "granite", "phi3", "smollm3"])
def test_families_unlike_llama_have_head_classes_with_both_attentions(variant: str) -> None:
    """Soft caps and scales of attention, partly rotated heads and layers without rotation, in caches of two lengths."""
    prompts = [tokens(length, seed=length) for length in (61, 33)]
    params = SamplingParams(max_new_tokens=6, ignore_eos=True, logprobs=True)
    settings = settings_for("local heads choose chunks")
    fused, standard = (session(settings, attention, variant).generate(prompts, params) for attention in ATTENTIONS)
    for one, other in zip(fused, standard, strict=True):
        assert one.statistics.kept_tokens == other.statistics.kept_tokens
        assert one.token_ids == other.token_ids
        assert np.abs(np.array(one.logprobs) - np.array(other.logprobs)).max() <= TOLERANCE


RECIPE: dict[str, Any] = {
    "budget_split": "classes",
    "reading_heads": [list(heads) for heads in READING],
    "reading_share_per_10k": 18_000,
    "local_share_per_10k": 6_000,
    "boundaries": "fixed",
}


def build_from_recipe(tmp_path: Path, changes: dict[str, Any]) -> Path:
    """Build an engine from a recipe with the command line and return its directory."""
    write_recipe(tmp_path / "recipe.json", {**RECIPE, **changes}, LAYERS, {})
    flags = {"checkpoint_dir": class_engines.checkpoint(), "output_dir": tmp_path / "engine", "log_level": "error"}
    limits = {"max_batch_size": 4, "max_input_len": 192, "max_seq_len": 256, "max_num_tokens": 192}
    recipe = {"chunkkv": True, "chunkkv_recipe": tmp_path / "recipe.json", **engines.SMALL_CHUNKKV}
    build_engine.main(engines.command_line({**flags, **limits, **recipe}))
    return tmp_path / "engine"


def test_a_recipe_lists_the_reading_heads_of_an_engine(tmp_path: Path) -> None:
    engine = ChunkKVSession.from_dir(build_from_recipe(tmp_path, {}), threads=1)
    assert engine.settings is not None and engine.settings.reading_heads == READING
    assert engine.executor.cache_layout == session(settings_for("recent local heads")).executor.cache_layout
    assert engine.generate(tokens(90, 1), SamplingParams(4)).statistics.kept_tokens == 36


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"reading_heads": [[0, 3], [], [1]]}, "reading_heads of layer 0 | (0, 3) | 0 to 2"),
        ({"reading_heads": [[2, 0], [], [1]]}, "reading_heads of layer 0 | (2, 0) | ascending"),
        ({"reading_heads": [[0, 0], [], [1]]}, "reading_heads of layer 0 | (0, 0) | once"),
        ({"reading_heads": [[0], [1]]}, "reading_heads lists 2 layers | 3"),
        ({"local_share_per_10k": 9_000}, "reading_share_per_10k 18000 | local_share_per_10k 9000 | 10000"),
        ({"layer_reuse": "0-1,2"}, "(0, 1) | same reading_heads"),
    ],
)
def test_partitions_that_do_not_fit_are_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(SystemExit):
        build_from_recipe(tmp_path, changes)
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and all(part in message for part in named.split(" | ")), message
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize(
    ("backend", "name", "changes"),
    [
        ("tensorrt", "budget_split", {"budget_split": "ranked"}),
        ("tensorrt_llm", "budget_split", {"budget_split": "ranked"}),
        ("tensorrt_llm", "budget_split", CLASSES),
        ("tensorrt_llm", "heads", {"heads": "each"}),
        ("tensorrt", "score", {"score": "given"}),
    ],
)
def test_settings_that_no_engine_of_a_backend_takes_are_named(backend: str, name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=naming(name, repr(changes[name]), "onnxruntime")):
        TRAITS[backend].check_settings(settings_of(**changes))
    TRAITS["onnxruntime"].check_settings(settings_of(**changes))
