"""Engines that multiply the blocks of a prompt in fewer bits than the tokens of an answer."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support import class_engines, engines

from chunkkv import SamplingParams
from chunkkv.errors import EngineError
from chunkkv.executors.host_cache import HostKVCache
from chunkkv.executors.onnxruntime.graphs import OnnxRuntimeStep
from chunkkv.executors.onnxruntime.prompt_blocks import PromptBlocksGraph
from chunkkv.session import ChunkKVSession
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.backends.onnxruntime import step_weights
from chunkkv_builder.checkpoint.hugging_face import HuggingFaceCheckpoint
from chunkkv_builder.onnx_graph.fused_step import FusedStepGraph
from chunkkv_builder.onnx_graph.prefill_blocks import PrefillBlocksGraph
from chunkkv_builder.onnx_graph.weights import write_weights
from chunkkv_builder.plan import make_plan

INT4: dict[str, Any] = {"use_weight_only": True, "weight_only_precision": "int4"}
PREFILL: dict[str, Any] = {"prefill_precision": "w8a8"}
GREEDY = SamplingParams(max_new_tokens=4, ignore_eos=True, temperature=0.0)
WINDOW = engines.SMALL_CHUNKKV["chunkkv_window"]


def ids(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(3, 380, length)


def filled(session: ChunkKVSession, prompt: np.ndarray) -> tuple[HostKVCache, np.ndarray, dict[int, np.ndarray]]:
    prefiller = session.executor.blockwise_prefiller()
    cache = prefiller.new_cache(1, len(prompt))
    logits, queries = prefiller.fill(prompt, cache, threading.Event())
    assert logits is not None
    return cache, logits, queries


def relative(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.sqrt(((found - exact) ** 2).mean()) / exact.std())


@pytest.mark.parametrize("variant", ["llama3", "qwen2", "qwen3", "phi3", "granite", "smollm3", "gemma2", "gemma3"])
def test_a_prompt_s_cache_is_nearly_that_of_the_same_engine_without_it(variant: str) -> None:
    prompt = ids(150)
    exact, logits, queries = filled(engines.session(variant), prompt)
    found, other_logits, other_queries = filled(engines.session(variant, **PREFILL), prompt)
    assert not np.array_equal(found.keys[0], exact.keys[0])
    for one, two in zip((*found.keys, *found.values), (*exact.keys, *exact.values), strict=True):
        assert relative(one, two) < 0.1
    assert relative(other_logits, logits) < 0.2
    assert queries.keys() == other_queries.keys()
    assert all(relative(other_queries[part], queries[part]) < 0.2 for part in queries)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("variant", ["llama3", "qwen3", "phi3"])
def test_a_cache_of_fewer_bits_is_filled_to_the_last_layer(variant: str, dtype: str) -> None:
    prompt, flags = ids(150), {"kv_cache_dtype": dtype}
    exact, *_ = filled(engines.session(variant, **flags), prompt)
    found, *_ = filled(engines.session(variant, **flags, **PREFILL), prompt)
    for one, two in zip((*found.keys, *found.values), (*exact.keys, *exact.values), strict=True):
        assert one.dtype == two.dtype == dtype
        assert relative(one.astype(np.float32), two.astype(np.float32)) < 0.1


@pytest.mark.parametrize("flags", [{}, INT4, {**INT4, "kv_cache_dtype": "int8"}, {"kv_cache_dtype": "float16"}])
def test_short_prompts_and_answers_are_those_of_the_other_weights(flags: dict[str, Any]) -> None:
    plain, session = engines.session("llama3", **flags), engines.session("llama3", **flags, **PREFILL)
    short = ids(63 + WINDOW).tolist()
    assert session.generate(short, GREEDY).token_ids == plain.generate(short, GREEDY).token_ids
    long = ids(150).tolist()
    assert session.generate(long, GREEDY, keep_ratio=1.0).token_ids  # blocks of both graphs


def test_the_last_block_has_the_window_and_the_exact_weights() -> None:
    prompt = ids(150)
    session, plain = engines.session("llama3", **PREFILL), engines.session("llama3")
    cache, logits, _ = filled(session, prompt)
    again = plain.executor.new_cache(1, len(prompt))
    for target, source in zip((*again.keys, *again.values), (*cache.keys, *cache.values), strict=True):
        target[:, :, :-WINDOW] = source[:, :, :-WINDOW]
    start = len(prompt) - WINDOW
    exact = plain.executor.score_block(again, prompt[start:], start, start)
    np.testing.assert_allclose(logits, exact[-1], atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        None,
        class_engines.settings_of(**class_engines.CLASSES),
        class_engines.settings_of(**class_engines.RANKED_HEADS),
    ],
    ids=["plain", "classes", "ranked"],
)
def test_parts_of_several_lengths_are_filled(settings: ChunkKVSettings | None, tmp_path: Path) -> None:
    opened = HuggingFaceCheckpoint.open(class_engines.checkpoint())
    locations = write_weights(tmp_path / "weights.safetensors", step_weights(opened, None, 256, "float32", "w8a8"))
    exact = {name: place for name, place in locations.items() if ".channel" not in name}
    plan = make_plan(opened.config, settings)
    onnx.save_model(FusedStepGraph(plan, exact).build(), tmp_path / "step.onnx")
    onnx.save_model(PrefillBlocksGraph(plan, locations).build(), tmp_path / "prefill_blocks.onnx")
    step = OnnxRuntimeStep(tmp_path / "step.onnx", settings, threads=1)
    graph = PromptBlocksGraph(tmp_path / "prefill_blocks.onnx", step)
    prompt, caches = ids(100), [step.new_cache(1, 100), step.new_cache(1, 100)]
    for first in (0, 16, 32):
        step.append_prompt_block(caches[0], prompt[first : first + 16], first)
        graph.append(caches[1], prompt[first : first + 16], first, first, is_last=first == 32)
    for one, two in zip(*((*cache.keys, *cache.values) for cache in caches), strict=True):
        assert relative(two, one) < 0.1 and np.array_equal(one[:, :, 48:], two[:, :, 48:])


@pytest.fixture
def appended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the tokens of every block that the graph appends."""
    sizes: list[int] = []
    append = PromptBlocksGraph.append
    monkeypatch.setattr(
        PromptBlocksGraph, "append", lambda *given, **named: sizes.append(len(given[2])) or append(*given, **named)
    )
    return sizes


def test_without_chunkkv_the_last_block_is_one_token(appended: list[int]) -> None:
    session = engines.session("llama3", chunkkv=False, **PREFILL)
    filled(session, ids(64))
    assert not appended
    filled(session, ids(65))
    assert sum(appended) == 64


def test_questions_and_second_readings_meet_the_other_weights(appended: list[int]) -> None:
    session = engines.session("llama3", **PREFILL)
    context = session.compress(ids(90).tolist(), scorer="reread")
    assert sum(appended) == 90 - WINDOW
    session.generate(ids(100).tolist(), GREEDY, context=context)
    assert sum(appended) == 90 - WINDOW


def test_a_context_goes_on_with_it(appended: list[int]) -> None:
    session = engines.session("llama3", **PREFILL)
    context = session.compress(ids(100).tolist())
    appended.clear()
    longer = context.extend(ids(120).tolist(), keep_ratio=0.4)
    assert sum(appended) == 120 - WINDOW
    assert session.generate([5, 6, 7], GREEDY, context=longer).token_ids


def test_the_graph_has_no_head_and_no_other_projections() -> None:
    folder = engines.engine_dir("llama3", **INT4, **PREFILL)
    model = onnx.load(folder / "prefill_blocks.onnx", load_external_data=False)
    assert {value.name.split(".")[0] for value in model.graph.output} == {"present_key", "present_value"}
    assert "logit_indices" not in {value.name for value in model.graph.input}
    assert {entry.key: entry.value for entry in model.metadata_props} == {"chunkkv.graph": "prefill_blocks"}
    kinds = [node.op_type for node in model.graph.node]
    attentions = [node.name for node in model.graph.node if node.name.endswith("/either")]
    assert attentions == [f"/layers.{layer}/attention/either" for layer in (0, 1)], "the last of three only stores"
    assert "MatMulNBits" not in kinds and kinds.count("MatMulIntegerToFloat") == 2 * 5 + 1, (
        "five of each layer, and of the last only what gives keys and values"
    )
    step = onnx.load(folder / "step.onnx", load_external_data=False)
    assert not any("channels" in weight.name for weight in step.graph.initializer)
    assert not (engines.engine_dir("llama3", **INT4) / "prefill_blocks.onnx").exists()


def test_a_damaged_graph_is_named() -> None:
    folder = engines.engine_dir("llama3", **INT4, **PREFILL, max_batch_size=2)
    (folder / "prefill_blocks.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"prefill_blocks\.onnx was changed"):
        ChunkKVSession.from_dir(folder)
