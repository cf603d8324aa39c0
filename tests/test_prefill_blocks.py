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
from chunkkv.engine.directory import PREFILL_BLOCKS_FILES, PRODUCTS_KEY, WHOLE_NUMBERS
from chunkkv.errors import EngineError
from chunkkv.executors.host_cache import HostKVCache
from chunkkv.executors.onnxruntime import prompt_blocks
from chunkkv.executors.onnxruntime.graphs import OnnxRuntimeStep, load_graph
from chunkkv.executors.onnxruntime.prompt_blocks import BlocksStage, PromptBlocksGraph, TextAppender
from chunkkv.session import ChunkKVSession
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.backends.onnxruntime import prefill_graphs, step_weights
from chunkkv_builder.checkpoint.hugging_face import HuggingFaceCheckpoint
from chunkkv_builder.onnx_graph.fused_step import FusedStepGraph
from chunkkv_builder.onnx_graph.prefill_blocks import stages_of
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
@pytest.mark.parametrize("threads", [1, 2])
def test_parts_of_several_lengths_are_filled(settings: ChunkKVSettings | None, threads: int, tmp_path: Path) -> None:
    opened = HuggingFaceCheckpoint.open(class_engines.checkpoint())
    locations = write_weights(tmp_path / "weights.safetensors", step_weights(opened, None, 256, "float32", "w8a8"))
    exact = {name: place for name, place in locations.items() if ".channel" not in name}
    plan = make_plan(opened.config, settings)
    onnx.save_model(FusedStepGraph(plan, exact).build(), tmp_path / "step.onnx")
    graphs = prefill_graphs(plan, locations)
    for name, model in graphs.items():
        onnx.save_model(model, tmp_path / name)
    step = OnnxRuntimeStep(tmp_path / "step.onnx", settings, threads=threads)
    graph = PromptBlocksGraph([tmp_path / name for name in graphs], step)
    assert len(graph.stages) == 2 and graph.is_parallel == (threads == 2)
    prompt, caches = ids(100), [step.new_cache(1, 100), step.new_cache(1, 100)]
    with graph.text(caches[1]) as text:
        for first in (0, 16, 32):
            step.append_prompt_block(caches[0], prompt[first : first + 16], first)
            text.append(prompt[first : first + 16], first, first, is_last=first == 32)
    for one, two in zip(*((*cache.keys, *cache.values) for cache in caches), strict=True):
        assert relative(two, one) < 0.1 and np.array_equal(one[:, :, 48:], two[:, :, 48:])


@pytest.fixture
def appended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the tokens of every block that the graph appends."""
    sizes: list[int] = []
    append = TextAppender.append
    monkeypatch.setattr(
        TextAppender, "append", lambda self, *given: sizes.append(len(given[0])) or append(self, *given)
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


def test_the_graphs_have_no_head_and_no_other_projections() -> None:
    folder = engines.engine_dir("llama3", **INT4, **PREFILL)
    stages = [onnx.load(folder / name, load_external_data=False) for name in PREFILL_BLOCKS_FILES]
    outputs = [{value.name for value in model.graph.output} for model in stages]
    caches = [{f"present_{kind}.{layer}" for kind in ("key", "value") for layer in layers} for layers in ([0], [1, 2])]
    assert outputs == [caches[0] | {"next_hidden"}, caches[1]]
    attentions, products = [], []
    for model in stages:
        assert "logit_indices" not in {value.name for value in model.graph.input}
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        assert metadata == {"chunkkv.graph": "prefill_blocks", PRODUCTS_KEY: WHOLE_NUMBERS}
        attentions.append([node.name for node in model.graph.node if node.name.endswith("/either")])
        kinds = [node.op_type for node in model.graph.node]
        assert "MatMulNBits" not in kinds
        products.append(kinds.count("MatMulIntegerToFloat"))
    assert attentions == [["/layers.0/attention/either"], ["/layers.1/attention/either"]], "the last only stores"
    assert products == [5, 5 + 1], "five of each layer, and of the last only what gives keys and values"
    step = onnx.load(folder / "step.onnx", load_external_data=False)
    assert not any("channels" in weight.name for weight in step.graph.initializer)
    assert not any((engines.engine_dir("llama3", **INT4) / name).exists() for name in PREFILL_BLOCKS_FILES)


@pytest.mark.parametrize(("layers", "stages"), [(1, [1]), (2, [1, 1]), (3, [1, 2]), (30, [15, 15]), (31, [15, 16])])
def test_stages_have_all_layers_in_order(layers: int, stages: list[int]) -> None:
    parts = stages_of(layers)
    assert [len(part) for part in parts] == stages
    assert [layer for part in parts for layer in part] == list(range(layers))


@pytest.fixture
def two_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a session take two threads on a machine with a single CPU, too."""
    monkeypatch.setattr("chunkkv.session.usable_cpus", lambda: 2)


@pytest.mark.usefixtures("two_cpus")
def test_stages_beside_each_other_fill_the_same_cache() -> None:
    caches = []
    for threads in (1, 2):
        folder = engines.engine_dir("llama3", **INT4, **PREFILL, kv_cache_dtype="int8")
        session = ChunkKVSession.from_dir(folder, threads=threads)
        caches.append(filled(session, ids(200))[0])
    for one, two in zip(*((*cache.keys, *cache.values) for cache in caches), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("cache", [{}, {"kv_cache_dtype": "int8"}])
@pytest.mark.usefixtures("two_cpus")
def test_only_several_threads_read_prompts_in_stages_where_the_step_graph_has_the_same_weights(
    cache: dict[str, Any], appended: list[int]
) -> None:
    folder = engines.engine_dir("llama3", use_weight_only=True, weight_only_precision="w8a8", **cache)
    alone, *_ = filled(ChunkKVSession.from_dir(folder, threads=1), ids(150))
    assert not appended
    found, *_ = filled(ChunkKVSession.from_dir(folder, threads=2), ids(150))
    assert sum(appended) == 150 - WINDOW
    for one, two in zip((*found.keys, *found.values), (*alone.keys, *alone.values), strict=True):
        assert relative(one.astype(np.float32), two.astype(np.float32)) < 0.01


class SlowSecondStage:
    """Holds every block in the second stage until it is let go, and says when one is there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.go, self.ended = threading.Event(), threading.Event(), 0
        run = BlocksStage.run

        def slow(stage: BlocksStage, cache: Any, inputs: Any, hidden: Any, is_last: bool) -> Any:
            if hidden is not None:
                self.entered.set()
                assert self.go.wait(20)
            found = run(stage, cache, inputs, hidden, is_last)
            self.ended += hidden is not None
            return found

        monkeypatch.setattr(BlocksStage, "run", slow)


@pytest.mark.usefixtures("two_cpus")
def test_a_prefill_that_is_dropped_leaves_no_stage_that_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = SlowSecondStage(monkeypatch)
    session = ChunkKVSession.from_dir(engines.engine_dir("llama3", **PREFILL), threads=2)
    (request,) = session.requests([ids(150).tolist()], GREEDY, 0.5)
    run = session.executor.prefiller().start([request], session.executor.new_cache(1, 150))
    assert run.step() is None, "the first block has left the first stage"
    assert stage.entered.wait(20) and stage.ended == 0
    threading.Timer(0.2, stage.go.set).start()
    del run
    assert stage.ended == 1


@pytest.mark.usefixtures("two_cpus")
def test_what_goes_wrong_in_the_second_stage_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    run = BlocksStage.run

    def failing(stage: BlocksStage, cache: Any, inputs: Any, hidden: Any, is_last: bool) -> Any:
        if hidden is not None:
            raise MemoryError("no room")
        return run(stage, cache, inputs, hidden, is_last)

    session = ChunkKVSession.from_dir(engines.engine_dir("llama3", **PREFILL), threads=2)
    with monkeypatch.context() as patch, pytest.raises(MemoryError, match="no room"):
        patch.setattr(BlocksStage, "run", failing)
        filled(session, ids(150))
    filled(session, ids(150))


@pytest.mark.parametrize(("threads", "each", "is_parallel"), [(1, 1, False), (2, 1, True), (5, 2, True)])
def test_stages_share_the_threads(monkeypatch: pytest.MonkeyPatch, threads: int, each: int, is_parallel: bool) -> None:
    folder, made = engines.engine_dir("llama3", **PREFILL), []
    settings = ChunkKVSession.from_dir(folder).settings

    def loaded(path: Path, threads: int, repacks: bool = True) -> Any:
        made.append(threads)
        return load_graph(path, threads, repacks)

    step = OnnxRuntimeStep(folder / "step.onnx", settings, threads)
    monkeypatch.setattr(prompt_blocks, "load_graph", loaded)
    graph = PromptBlocksGraph([folder / name for name in PREFILL_BLOCKS_FILES], step)
    assert made == [each, each] and graph.is_parallel == is_parallel


def test_a_damaged_graph_is_named() -> None:
    folder = engines.engine_dir("llama3", **INT4, **PREFILL, max_batch_size=2)
    (folder / "prefill_blocks.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"prefill_blocks\.onnx was changed"):
        ChunkKVSession.from_dir(folder)
