"""TensorRT-LLM engines driven over our pool of blocks: recorded networks in NumPy, answers as on ONNX Runtime.

TensorRT-LLM is a contract as read (support/tensorrt_llm_double); these tests prove nothing about the real one.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from support import engines, tensorrt_llm_double
from support.cuda_double import CudartDouble
from support.messages import naming
from support.tensorrt_llm_builds import llm_checkpoint, source_checkpoint
from support.tensorrt_llm_double import Machine, installed
from support.tensorrt_llm_double.attention import Pools
from support.tensorrt_llm_double.graph import Graph
from support.tensorrt_llm_double.oracle import oracle_plugins
from support.tensorrt_llm_double.run import Execution
from support.tensorrt_llm_double.step_engine import RecordedStepEngine

from chunkkv import ChunkKVSession, SamplingParams
from chunkkv.engine.directory import EngineFiles
from chunkkv.engine.tensorrt_llm_side_file import SideFile, engine_file
from chunkkv.errors import (
    BackendUnavailableError,
    CacheFullError,
    EngineMismatchError,
    EngineRunError,
    RequestError,
)
from chunkkv.executors.tensorrt_llm.executor import TensorRTLLMExecutor, paged_geometry
from chunkkv.executors.tensorrt_llm.paged_inputs import PagedGeometry, StepInputs, StepRow
from chunkkv.executors.tensorrt_llm.step_engine import StepTensor
from chunkkv.gpu import tensorrt_plugins
from chunkkv.gpu.cuda_runtime import CudaRuntime
from chunkkv.requests import Limits, Request, make_requests
from chunkkv_builder import build as build_engine

pytestmark = pytest.mark.contract_as_read

PARAMS = SamplingParams(max_new_tokens=12, ignore_eos=True, logprobs=True)
PROMPTS = [np.random.default_rng([5, length]).integers(3, 300, length) for length in (61, 9, 100, 190)]
TOKENS_PER_BLOCK = 16
TOLERANCE = 1e-4  # of a log probability: both sides compute in float32, sums run in another order


@cache
def engine_dir(**flags: Any) -> Path:
    """Return a directory built by the real command line on the double."""
    folder = Path(tempfile.mkdtemp(dir=engines._FOLDER.name))
    (folder / "libchunkkv_tensorrt.so.10").touch()
    named = {"backend": "tensorrt_llm", "checkpoint_dir": llm_checkpoint(), "output_dir": folder / "engine"}
    named |= {"max_batch_size": 4, "max_input_len": 192, "max_seq_len": 256, "max_num_tokens": 512}
    named |= {"tokens_per_block": TOKENS_PER_BLOCK, "log_level": "error", "chunkkv": True}
    with installed(), mock.patch.object(tensorrt_plugins, "PLUGIN_FOLDERS", (folder,)):
        build_engine.main(engines.command_line({**named, **engines.SMALL_CHUNKKV, **flags}))
    return folder / "engine"


def engine_of_another_tensorrt() -> Path:
    """Return a directory that TensorRT 10.7 built."""
    with mock.patch.object(tensorrt_llm_double, "TENSORRT_VERSION", "10.7.0.23"):
        return engine_dir.__wrapped__(chunkkv_layer_reuse=2)


def recorded(
    path: Path, pool_tokens: int | None = None, float32: bool = True
) -> tuple[ChunkKVSession, RecordedStepEngine]:
    """Return a session over the recorded network of `path`, and the step engine under it.

    In float32, unless the float16 of the file is asked for: rounding moves logits by more than the best two lie apart,
    so greedy tokens of float16 tell nothing about another engine's.
    """
    files, side, pools = EngineFiles.load(path), SideFile.read(path), Pools()
    graph, geometry = Graph.from_bytes((path / engine_file(0)).read_bytes()), paged_geometry(files, side)
    if float32:
        graph, geometry = graph.widened(), replace(geometry, kv_bytes=4)
    engine = RecordedStepEngine(Execution(graph, oracle_plugins(pools), pools))
    executor = TensorRTLLMExecutor(engine, geometry, files.settings, pool_tokens)
    limits = Limits(4, files.build["max_input_len"], 256, files.model["vocab_size"], files.traits.budget_is_fixed)
    return ChunkKVSession(executor, files.settings, limits), engine


def assert_same_answers(found: list, expected: list) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert np.abs(np.array(one.logprobs) - np.array(other.logprobs)).max() <= TOLERANCE
        assert one.statistics.kept_tokens == other.statistics.kept_tokens


@cache
def expected_answers() -> list:
    """Return the answers of ONNX Runtime from the same weights."""
    folder = engines.engine_dir("llama3", chunkkv_layer_reuse=2, checkpoint_dir=source_checkpoint())
    return ChunkKVSession.from_dir(folder, threads=1).generate(PROMPTS, PARAMS)


def test_answers_equal_those_of_onnx_runtime() -> None:
    session, _ = recorded(engine_dir(chunkkv_layer_reuse=2))
    assert_same_answers(session.generate(PROMPTS, PARAMS), expected_answers())


def test_a_mapping_of_one_axis_names_the_layers_pools_alone() -> None:
    """As in 0.16, where the layer's place in its pool is a field of the plugin."""
    rows, offsets = [StepRow(np.ones(3, np.int32), 3, 0, 0)], np.zeros((1, 1, 2, 4), np.int32)
    for shape, mapping in (((2,), [0, 0]), ((2, 2), [[0, 0], [0, 1]])):
        found = tensors(host_kv_cache_pool_mapping=shape)
        steps = StepInputs(found, {"logits": StepTensor((-1, 320), np.dtype(np.float32))}, GEOMETRY, 0)
        assert steps.arrays(rows, offsets)["host_kv_cache_pool_mapping"].tolist() == mapping


def test_what_a_step_is_given() -> None:
    session, engine = recorded(engine_dir(chunkkv_layer_reuse=2))
    session.generate(PROMPTS[:2], PARAMS)
    first, second, third, *_, last = engine.steps
    assert first["input_ids"].tolist() == PROMPTS[0].tolist() and first["position_ids"].tolist() == list(range(61))
    for name in ("last_token_ids", "sequence_length", "context_lengths", "host_past_key_value_lengths"):
        assert (first[name].tolist(), second[name].tolist()) == ([61], [9]), name
    assert first["host_request_types"].tolist() == [0] and third["host_request_types"].tolist() == [1, 1]
    assert third["position_ids"].tolist() == [61, 9] and third["sequence_length"].tolist() == [62, 10]
    assert third["context_lengths"].tolist() == third["host_context_lengths"].tolist() == [61, 9]
    assert third["host_past_key_value_lengths"].tolist() == [24, 9], "compact: what attention really reads"
    assert last["host_past_key_value_lengths"].tolist() == [24 + 10, 9 + 10]
    blocks = first["kv_cache_block_offsets"][0, 0, 0] // (4 * 2)
    assert blocks[:4].tolist() == [0, 1, 2, 3]
    assert second["kv_cache_block_offsets"][0, 0, 0, 0] == 4 * 4 * 2
    assert third["kv_cache_block_offsets"].shape == (1, 2, 2, 256 // TOKENS_PER_BLOCK)


def test_prompts_that_do_not_fit_together_are_staged() -> None:
    prompts = [np.roll(PROMPTS[3], shift) for shift in range(4)]  # 12 blocks each, 6 with the answer
    session, engine = recorded(engine_dir(chunkkv_layer_reuse=2), pool_tokens=30 * TOKENS_PER_BLOCK)
    plenty, _ = recorded(engine_dir(chunkkv_layer_reuse=2))
    assert_same_answers(session.generate(prompts, PARAMS), plenty.generate(prompts, PARAMS))
    used = [set(np.unique(step["kv_cache_block_offsets"][:, :, 0]).tolist()) for step in engine.steps[:4]]
    assert used[0] & used[1], "the second prompt lies in blocks that the first one gave back"
    gc.collect()
    assert session.executor.blocks.free_blocks == 30


def test_a_full_pool_refuses_before_any_work_and_names_the_setting() -> None:
    session, engine = recorded(engine_dir(chunkkv_layer_reuse=2), pool_tokens=10 * TOKENS_PER_BLOCK)
    with pytest.raises(CacheFullError, match=naming("4 96 slots 24 blocks max_tokens_in_paged_kv_cache")):
        session.generate(PROMPTS, PARAMS)
    assert not engine.steps
    with pytest.raises(CacheFullError, match=naming("prompt 190 tokens")):  # its answer would fit, its prompt does not
        session.generate(PROMPTS[3], PARAMS)
    gc.collect()
    assert session.executor.blocks.free_blocks == 10
    assert_same_answers([session.generate(PROMPTS[2], PARAMS)], expected_answers()[2:3])


def test_rows_that_ended_leave_the_batch() -> None:
    session, engine = recorded(engine_dir(chunkkv_layer_reuse=2))
    expected = expected_answers()
    end = expected[1].token_ids[3]
    ending = ChunkKVSession(session.executor, session.settings, session.limits, None, [end])
    found = ending.generate(PROMPTS, SamplingParams(max_new_tokens=12))
    assert found[1].finish_reason == "stop" and len(found[1].token_ids) == expected[1].token_ids.index(end) + 1
    rows = [len(step["context_lengths"]) for step in engine.steps]
    assert rows[4] == 4 and rows[-1] < 4
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids[: len(one.token_ids)]


def test_a_row_may_be_filled_again_and_idle_rows_are_left_out() -> None:
    session, engine = recorded(engine_dir(chunkkv_layer_reuse=2))
    executor = session.executor
    cache = executor.new_cache(3, executor.capacity_for(120))
    prefiller, decoder = executor.prefiller(), executor.decoder(cache)
    with pytest.raises(EngineRunError, match=naming("row 0 position")):
        decoder.step([0], [0], [0], [0])
    assert not engine.steps
    for prompt, answer in ((PROMPTS[3], expected_answers()[3]), (PROMPTS[2], expected_answers()[2])):
        requests = session_requests(session, prompt)
        logits = prefiller.run(requests, cache.rows(1, 1), threading.Event())[0].logits
        assert int(logits.argmax()) == answer.token_ids[0]
        assert len(executor.blocks.blocks(cache.sequences[1])) == executor.blocks.blocks_for(requests[0].kept_tokens)
        logits = decoder.step([1], [answer.token_ids[0]], [len(prompt)], [requests[0].kept_tokens])
        assert int(logits[0].argmax()) == answer.token_ids[1]
        assert engine.steps[-1]["context_lengths"].tolist() == [len(prompt)]
    with pytest.raises(EngineRunError, match=naming("row 1 slot", cache.capacity[0])):
        decoder.step([1], [0], [500], cache.capacity)


def session_requests(session: ChunkKVSession, prompt: np.ndarray) -> list[Request]:
    return make_requests([prompt], None, session.limits, session.settings, None, None, 1)


def test_calls_on_several_threads_share_the_pool() -> None:
    session, _ = recorded(engine_dir(chunkkv_layer_reuse=2))
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda n=number: found.update({n: session.generate(PROMPTS[n], PARAMS)}))
        for number in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same_answers([found[number] for number in range(4)], expected_answers())
    gc.collect()
    assert session.executor.blocks.free_blocks == session.executor.blocks.num_blocks


def test_a_budget_of_its_own_and_inspection_are_refused() -> None:
    session, engine = recorded(engine_dir(chunkkv_layer_reuse=2))
    with pytest.raises(RequestError, match=naming("24 fixed")):
        session.generate(PROMPTS[0], PARAMS, keep_ratio=0.2)
    assert not engine.steps
    assert session.generate(PROMPTS[0], PARAMS, keep_ratio=0.4).statistics.kept_tokens == 24
    with pytest.raises(EngineMismatchError, match=naming("tokens keeps")):
        session.inspect(PROMPTS[0])
    cancel = threading.Event()
    cancel.set()
    assert session.generate(PROMPTS[0], PARAMS, cancel=cancel).finish_reason == "cancelled"


def test_what_the_executor_cannot_do_is_declared_and_refused() -> None:
    session, _ = recorded(engine_dir(chunkkv_layer_reuse=2))
    executor = session.executor
    capabilities, cache = executor.capabilities, executor.new_cache(1, executor.capacity_for(100))
    assert not (capabilities.blockwise_prefill or capabilities.block_scoring or capabilities.layer_lengths)
    for refused in (
        executor.blockwise_prefiller,
        lambda: executor.score_block(cache, PROMPTS[0], 0, 0),
        lambda: executor.layer_lengths_decoder(cache),
    ):
        with pytest.raises(BackendUnavailableError, match=naming("backend onnxruntime")):
            refused()


GEOMETRY = PagedGeometry(2, 1, 64, 16, 2, 300, 4, 256)


def tensors(**changes: Any) -> dict[str, StepTensor]:
    shapes = {name: (-1,) for name in ("input_ids", "host_request_types")}
    shapes |= {name: (1, -1, 2, -1) for name in ("kv_cache_block_offsets", "host_kv_cache_block_offsets")}
    shapes |= {"host_kv_cache_pool_mapping": (2, 2), **changes}
    return {name: StepTensor(shape, np.dtype(np.int32)) for name, shape in shapes.items() if shape is not None}


@pytest.mark.parametrize(
    ("changes", "outputs", "message"),
    [
        ({"lora_ranks": (-1,)}, ("logits",), "input 'lora_ranks'"),
        ({"kv_cache_block_offsets": (2, -1, 2, -1)}, ("logits",), "2 KV pools"),
        ({"kv_cache_block_offsets": None}, ("logits",), "no input 'kv_cache_block_offsets'"),
        ({}, ("logits", "layer_3"), "outputs layer_3 logits"),
        ({}, (), "outputs none"),
    ],
)
def test_an_engine_that_wants_something_else_is_refused(changes: Any, outputs: tuple[str, ...], message: str) -> None:
    found = {name: StepTensor((-1, 300), np.dtype(np.float32)) for name in outputs}
    with pytest.raises(EngineMismatchError, match=naming(message)):
        StepInputs(tensors(**changes), found, GEOMETRY, 0)


def test_logits_of_every_token_are_gathered_here() -> None:
    inputs = StepInputs(tensors(), {"logits": StepTensor((-1, 320), np.dtype(np.float16))}, GEOMETRY, 0)
    rows = [StepRow(np.zeros(3, np.int64), 3, 0, 0), StepRow(np.zeros(1, np.int64), 5, 6, 5)]
    logits = np.arange(4, dtype=np.float16)[:, None] * np.ones(320, np.float16)
    assert inputs.last_rows(logits, rows)[:, 0].tolist() == [2, 3]
    assert inputs.last_rows(logits, rows).shape == (2, 300)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    """A machine with TensorRT-LLM, the plugins and a GPU whose memory is the host's."""
    with installed() as found:
        found.cuda = CudartDouble()
        runtime = CudaRuntime(found.cuda)
        monkeypatch.setattr(CudaRuntime, "load", staticmethod(lambda: runtime))
        monkeypatch.setattr(tensorrt_plugins, "PLUGIN_FOLDERS", (tmp_path,))
        (tmp_path / "libchunkkv_tensorrt.so.10").touch()
        yield found


def test_a_directory_runs_on_device_memory(machine: Machine) -> None:
    path = engine_dir(chunkkv_layer_reuse=2)
    session = ChunkKVSession.from_dir(path, max_tokens_in_paged_kv_cache=48 * TOKENS_PER_BLOCK)
    assert session.executor.blocks.num_blocks == 48
    assert session.limits.budget_is_fixed
    same_network, _ = recorded(path, float32=False)
    assert_same_answers(session.generate(PROMPTS, PARAMS), same_network.generate(PROMPTS, PARAMS))
    assert machine.cuda.launches == 0, "plugins read lengths on the host: no graph may freeze them"


def test_the_pool_takes_what_is_free_up_to_what_can_be_used(machine: Machine) -> None:
    path = engine_dir(chunkkv_layer_reuse=2)
    session = ChunkKVSession.from_dir(path)
    assert session.executor.blocks.num_blocks == 4 * 256 // TOKENS_PER_BLOCK
    block = session.executor.capabilities.pool_bytes // 64
    machine.cuda.free = 10 * block
    assert ChunkKVSession.from_dir(path).executor.blocks.num_blocks == 9
    with pytest.raises(RequestError, match=naming("max_tokens_in_paged_kv_cache 1000 63 1 160")):
        ChunkKVSession.from_dir(path, max_tokens_in_paged_kv_cache=1000)
    machine.cuda.free = 0
    with pytest.raises(RequestError, match=naming("free memory 0 blocks")):
        ChunkKVSession.from_dir(path)
    with pytest.raises(RequestError, match=naming("caches paged")):
        ChunkKVSession.from_dir(engines.engine_dir("llama3"), max_tokens_in_paged_kv_cache=100)


def test_an_engine_of_several_ranks_points_to_the_runner() -> None:
    path = engine_dir(checkpoint_dir=llm_checkpoint(tp_size=2))
    with pytest.raises(EngineMismatchError, match=naming("2 ranks mpirun chunkkv.executors.tensorrt_llm.runner")):
        ChunkKVSession.from_dir(path)


def test_what_is_missing_is_named(machine: Machine) -> None:
    path = engine_of_another_tensorrt()
    with pytest.raises(EngineMismatchError, match=r"built with TensorRT 10\.7\b.*10\.14\b"):
        ChunkKVSession.from_dir(path)
    # Undone before the machine takes its packages away: a patch that outlives them would bring them back.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt_llm", None)
        with pytest.raises(BackendUnavailableError, match=naming("'tensorrt' 'tensorrt_llm'")):
            ChunkKVSession.from_dir(path)


def test_a_plugin_that_refuses_a_step_ends_the_answer_with_its_words(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = ChunkKVSession.from_dir(engine_dir(chunkkv_layer_reuse=2))
    engine = session.executor.engine

    def refuse(stream: int) -> bool:
        engine._logger.log(engine._trt.ILogger.Severity.ERROR, "chunked context is on")
        return False

    monkeypatch.setattr(engine._context, "execute_async_v3", refuse)
    with pytest.raises(EngineRunError, match=naming("engine chunked")):
        session.generate(PROMPTS[0], PARAMS)
    gc.collect()
    assert session.executor.blocks.free_blocks == session.executor.blocks.num_blocks
