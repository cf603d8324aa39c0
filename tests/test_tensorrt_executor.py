"""The TensorRT executor on a contract as read: ONNX Runtime runs the graphs TensorRT would get, on bound addresses.

So the answers must be those of the ONNX Runtime engine, and every address, shape and copy is checked on the way.
TensorRT and CUDA are our own doubles (support/); these tests prove nothing about the real ones.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from support import engines, tensorrt_double
from support.checkpoints import VARIANTS
from support.gguf_files import write_gguf
from support.messages import naming
from support.tensorrt_double import Double, machine_of

from chunkkv import ChunkKVSession, SamplingParams
from chunkkv.engine.tensorrt_contract import CONTRACT_FILE, Contract
from chunkkv.errors import BackendUnavailableError, EngineError, EngineMismatchError, EngineRunError, RequestError
from chunkkv.executors.interface import Choice
from chunkkv.requests import Request, make_requests

pytestmark = pytest.mark.contract_as_read

machine = pytest.fixture(machine_of)
build = engines.build_tensorrt
PARAMS = SamplingParams(max_new_tokens=8, ignore_eos=True, logprobs=True)
PROMPTS = [np.random.default_rng([5, length]).integers(3, 300, length) for length in (61, 9, 100, 200)]
RATIOS = [None, None, 0.7, None]  # the last has more tokens than the cache of the answer has slots
TOLERANCE = 1e-4


@pytest.fixture
def session(machine: Double, tmp_path: Path) -> ChunkKVSession:
    return ChunkKVSession.from_dir(build(tmp_path / "engine", chunkkv_layer_reuse=2))


def assert_same_answers(found: list, expected: list, tolerance: float = TOLERANCE) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert np.abs(np.array(one.logprobs) - np.array(other.logprobs)).max() <= tolerance
        assert one.statistics.kept_tokens == other.statistics.kept_tokens


@pytest.mark.parametrize("boundaries", ["fixed", "delimiter"])
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_answers_equal_those_of_onnx_runtime(machine: Double, tmp_path: Path, variant: str, boundaries: str) -> None:
    flags = {"chunkkv_layer_reuse": 2, "chunkkv_boundaries": boundaries}
    expected = engines.session(variant, **flags).generate(PROMPTS, PARAMS, keep_ratio=RATIOS)
    session = ChunkKVSession.from_dir(build(tmp_path / "engine", variant, **flags))
    assert_same_answers(session.generate(PROMPTS, PARAMS, keep_ratio=RATIOS), expected)


@pytest.mark.parametrize(("leader", "pooling", "rows"), [("first", 1, 1), ("last", 5, 3), ("first", 5, 4)])
def test_rows_may_be_prefilled_together(machine: Double, tmp_path: Path, leader: str, pooling: int, rows: int) -> None:
    flags = {"chunkkv_leader": leader, "chunkkv_pooling": pooling, "chunkkv_layer_reuse": 3}
    expected = engines.session("llama3", **flags).generate(PROMPTS, PARAMS, keep_ratio=RATIOS)
    session = ChunkKVSession.from_dir(build(tmp_path / "engine", max_num_tokens=256 * rows, **flags))
    assert session.executor.prefiller().max_rows == rows
    assert_same_answers(session.generate(PROMPTS, PARAMS, keep_ratio=RATIOS), expected)


@pytest.mark.parametrize("ops", ["plugin", "functions"])
def test_each_request_has_its_own_window(machine: Double, tmp_path: Path, ops: str) -> None:
    """Rows that are prefilled together are scored by as many queries as each has, as on ONNX Runtime one by one."""
    alone = engines.session("llama3", chunkkv_layer_reuse=3)
    directory = build(tmp_path / "engine", max_num_tokens=1024, chunkkv_ops=ops, chunkkv_layer_reuse=3)
    together = ChunkKVSession.from_dir(directory)
    assert together.executor.capabilities.window_per_request
    plain = alone.requests(PROMPTS, PARAMS)
    requests = [dataclasses.replace(one, window=window) for one, window in zip(plain, (4, 2, 1, 3), strict=True)]
    for row, found in enumerate(prefilled(together, requests)):
        (expected,) = prefilled(alone, [requests[row]])
        (whole,) = prefilled(alone, [plain[row]])
        assert (found is None) == (expected is None) == (row == 1), "the second prompt is too short to be compressed"
        if found is not None and expected is not None and whole is not None:
            (part,) = expected.token_scores
            scores = expected.token_scores[part]
            assert np.array_equal(found.kept_indices[part], expected.kept_indices[part])
            np.testing.assert_allclose(found.token_scores[part], scores, rtol=1e-3, atol=1e-7)
            assert np.allclose(whole.token_scores[part], scores, rtol=1e-3, atol=1e-7) == (requests[row].window == 4)


def prefilled(session: ChunkKVSession, requests: list[Request]) -> list[Choice | None]:
    """Return what was chosen for each request, prefilled together."""
    executor = session.executor
    cache = executor.new_cache(len(requests), executor.capacity_for(max(one.kept_tokens for one in requests)))
    return [result.choice for result in executor.prefiller().run(requests, cache, threading.Event())]


def test_engines_of_before_take_no_windows_of_requests(machine: Double, tmp_path: Path) -> None:
    directory = build(tmp_path / "engine")
    contract = json.loads((directory / CONTRACT_FILE).read_text())
    assert contract.pop("window") == 4
    assert Contract.read(directory).window == 4
    (directory / CONTRACT_FILE).write_text(json.dumps(contract))
    assert Contract.read(directory).window == 0


def test_an_engine_without_chunkkv_keeps_every_token(machine: Double, tmp_path: Path) -> None:
    expected = engines.session("llama3", chunkkv=False).generate(PROMPTS, PARAMS)
    session = ChunkKVSession.from_dir(build(tmp_path / "engine", chunkkv=False))
    assert_same_answers(session.generate(PROMPTS, PARAMS), expected)
    assert machine.registry.loaded == []


def test_a_gguf_file_gives_the_same_answers_as_on_onnx_runtime(machine: Double, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "llama3", "Q4_1")
    expected = engines.session("llama3", checkpoint_dir=tmp_path).generate(PROMPTS, PARAMS, keep_ratio=RATIOS)
    session = ChunkKVSession.from_dir(build(tmp_path / "engine", checkpoint_dir=tmp_path / "model.gguf"))
    assert_same_answers(session.generate(PROMPTS, PARAMS, keep_ratio=RATIOS), expected)


def test_float16_stays_close(machine: Double, tmp_path: Path) -> None:
    params = dataclasses.replace(PARAMS, max_new_tokens=1)
    expected = engines.session("llama3").generate(PROMPTS, params, keep_ratio=1.0)
    session = ChunkKVSession.from_dir(build(tmp_path / "engine", dtype="float16"))
    for one, other in zip(session.generate(PROMPTS, params, keep_ratio=1.0), expected, strict=True):
        assert abs(one.logprobs[0] - other.logprobs[0]) < 0.05
    compressed = session.generate(PROMPTS[0], PARAMS).statistics
    assert compressed.full_cache_bytes == 61 * 2 * 3 * 2 * 16 * 2  # keys and values, layers, heads, head size, bytes


def test_weights_of_any_size_lie_where_tensorrt_accepts_them(machine: Double, tmp_path: Path) -> None:
    odd = engines.checkpoint_dir("llama3", vocab_size=301)  # in float16 not a multiple of 256 bytes
    session = ChunkKVSession.from_dir(build(tmp_path / "engine", dtype="float16", checkpoint_dir=odd))
    sizes = [nbytes for _, nbytes in session.executor.contract.weights.values()]
    assert any(size % 256 for size in sizes[:-1])
    assert len(session.generate(PROMPTS[0], PARAMS).token_ids) == PARAMS.max_new_tokens


def test_inspection_shows_the_same_choice(session: ChunkKVSession) -> None:
    expected = engines.session("llama3", chunkkv_layer_reuse=2).inspect(PROMPTS[2])
    found = session.inspect(PROMPTS[2])
    for one, other in zip(found.groups, expected.groups, strict=True):
        assert (one.layers, one.leader) == (other.layers, other.leader)
        assert np.array_equal(one.kept_indices, other.kept_indices)
        np.testing.assert_allclose(one.token_scores, other.token_scores, rtol=1e-3, atol=1e-7)
    assert all(len(group.kept_indices) == 61 for group in session.inspect(PROMPTS[0], keep_ratio=1.0).groups)


def test_decode_replays_one_graph_and_memory_is_given_back(machine: Double, session: ChunkKVSession) -> None:
    before = set(machine.cuda.memory)
    session.generate(PROMPTS, PARAMS)
    gc.collect()
    assert machine.cuda.launches == PARAMS.max_new_tokens - 2  # one token comes from prefill, one step has no graph
    assert set(machine.cuda.memory) == before and not machine.cuda.live_graphs


def test_decode_without_a_graph_gives_the_same_tokens(machine: Double, session: ChunkKVSession) -> None:
    expected = session.generate(PROMPTS, PARAMS)
    machine.cuda.capturable = False
    launches = machine.cuda.launches
    with pytest.warns(RuntimeWarning, match=naming("decode CUDA graph cudaStreamBeginCapture")):
        found = session.generate(PROMPTS, PARAMS)
    assert_same_answers(found, expected, 0.0)
    assert machine.cuda.launches == launches


def test_an_answer_runs_on_the_smallest_engine_that_fits(session: ChunkKVSession) -> None:
    executor = session.executor
    assert [executor.capacity_for(tokens) for tokens in (1, 128, 129, 256)] == [(128,), (128,), (256,), (256,)]
    with pytest.raises(RequestError, match=naming("257 tokens 256 slots")):
        executor.capacity_for(257)
    short, long = (session.generate(PROMPTS[2], dataclasses.replace(PARAMS, max_new_tokens=n)) for n in (80, 100))
    per_token = short.statistics.full_cache_bytes // 100
    assert short.statistics.allocated_cache_bytes == 128 * per_token  # 40 kept and 80 new
    assert long.statistics.allocated_cache_bytes == 256 * per_token
    group = 2 * per_token // 3  # two of three layers share a choice and are alive together
    assert short.statistics.peak_cache_bytes == 128 * per_token + 100 * group
    assert short.statistics.compress_s == 0 < short.statistics.prefill_s


def test_two_runs_give_the_same_bits_and_threads_may_share_a_session(session: ChunkKVSession) -> None:
    expected = [session.generate(ids, PARAMS) for ids in PROMPTS]
    with ThreadPoolExecutor(3) as pool, warnings.catch_warnings():
        warnings.simplefilter("error")
        found = list(pool.map(lambda ids: session.generate(ids, PARAMS), PROMPTS * 3))
    assert_same_answers(found, expected * 3, 0.0)


def test_cancel_before_prefill_does_no_work(machine: Double, session: ChunkKVSession) -> None:
    cancel = threading.Event()
    cancel.set()
    results = session.generate(PROMPTS, PARAMS, cancel=cancel)
    assert [(result.finish_reason, result.token_ids) for result in results] == [("cancelled", ())] * len(PROMPTS)
    assert machine.cuda.launches == 0


def test_a_plugin_that_counts_differently_is_noticed(session: ChunkKVSession) -> None:
    requests = [dataclasses.replace(session_request(session), kept_tokens=30, class_lengths=(30,))]
    cache = session.executor.new_cache(1, 128)
    with pytest.raises(EngineRunError, match=naming("24 61 30 tokens")):
        session.executor.prefiller().run(requests, cache, threading.Event())


def session_request(session: ChunkKVSession):
    return make_requests([PROMPTS[0]], None, session.limits, session.settings, None, None, 8)[0]


def test_shapes_outside_the_profile_and_failing_runs_are_errors(
    session: ChunkKVSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = session.executor
    with pytest.raises(EngineRunError, match=naming("input_ids (5,1) profile")):
        executor.decoder(executor.new_cache(5, 128))
    monkeypatch.setattr(tensorrt_double.Context, "execute_async_v3", lambda self, stream_handle: False)
    with pytest.raises(EngineRunError, match=naming("TensorRT engine")):
        session.generate(PROMPTS[0], PARAMS)


def test_what_the_executor_cannot_do_is_declared_and_refused(session: ChunkKVSession) -> None:
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


def test_a_step_answers_for_the_rows_it_names_and_refuses_slots_behind_the_cache(session: ChunkKVSession) -> None:
    executor = session.executor
    alone, together = executor.new_cache(1, 128), executor.new_cache(3, 128)
    (request,) = make_requests([PROMPTS[0]], None, session.limits, session.settings, None, None, 8)
    for cache in (alone, together.rows(1, 1)):
        executor.prefiller().run([request], cache, threading.Event())
    one, three = executor.decoder(alone), executor.decoder(together)
    for step, token in enumerate((7, 200, 31)):  # the second step is captured, the third one replayed
        position, slot = len(request.ids) + step, request.kept_tokens + step
        expected = one.step([0], [token], [position], [slot])
        found = three.step([1], [token], [position], [slot])
        assert found.shape == (1, session.limits.vocab_size) and np.abs(found - expected).max() <= TOLERANCE
    with pytest.raises(EngineRunError, match=naming("row 1 slot 128")):
        three.step([1], [7], [200], [128])


def test_caches_that_are_not_updated_in_place_are_refused(session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_double.Engine, "get_aliased_input_tensor", lambda self, name: None)
    with pytest.raises(EngineMismatchError, match=naming("present_key.0 None 'past_key.0'")):
        session.executor.decoder(session.executor.new_cache(1, 128))


def test_an_engine_of_another_tensorrt_or_gpu_is_refused(machine: Double, tmp_path: Path, monkeypatch) -> None:
    folder = build(tmp_path / "engine")
    monkeypatch.setattr(tensorrt_double, "MAGIC", b"another magic")
    with pytest.raises(EngineMismatchError, match=naming("prefill.engine GPU magic")):
        ChunkKVSession.from_dir(folder)
    machine.module.__version__ = "11.9.0.1"
    with pytest.raises(EngineMismatchError, match=naming("TensorRT 11.4.0.106 11.9.0.1")):
        ChunkKVSession.from_dir(folder)


def test_a_machine_without_tensorrt_says_so(machine: Double, tmp_path: Path, monkeypatch) -> None:
    folder = build(tmp_path / "engine")
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(BackendUnavailableError, match=naming("TensorRT 'tensorrt'")):
        ChunkKVSession.from_dir(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "int8"},
        {"num_layers": 0},
        {"capacities": []},
        {"capacities": [[256], [128]]},
        {"capacities": [128, 256]},
        {"capacities": [[128, 256]]},
        {"capacities": [[True]]},
        {"layout": {"parts": [], "length_classes": 1}},
        {"scored": [7]},
        {"leaders": [7]},
        {"weights": {"a": [0, 10**9]}},
        {"weights": {"a": [-1, 4]}},
        {"weights": []},
        {"head_dim": True},
        {"more": 1},
    ],
)
def test_a_contract_that_makes_no_sense_is_refused(machine: Double, tmp_path: Path, change: dict) -> None:
    folder = build(tmp_path / "engine")
    values = json.loads((folder / CONTRACT_FILE).read_text())
    Contract.read(folder)
    (folder / CONTRACT_FILE).write_text(json.dumps({**values, **change}))
    with pytest.raises(EngineError, match=naming("tensorrt.json")):
        Contract.read(folder)


def test_a_plugin_library_that_does_not_load_says_why(machine: Double, tmp_path: Path, monkeypatch) -> None:
    folder = build(tmp_path / "engine")

    def refuse(self: tensorrt_double.Registry, plugin_path: str) -> None:
        machine.logger.log(tensorrt_double.Severity.ERROR, "dlopen: undefined symbol: chunkkv_score")

    machine.registry._creators.clear()
    monkeypatch.setattr(tensorrt_double.Registry, "load_library", refuse)
    with pytest.raises(BackendUnavailableError, match=naming("dlopen chunkkv_score")):
        ChunkKVSession.from_dir(folder)


@pytest.mark.parametrize(("leader", "alive"), [("first", 1), ("last", 2)])
def test_as_many_layers_are_alive_as_the_statistics_say(
    machine: Double, tmp_path: Path, leader: str, alive: int
) -> None:
    folder = build(tmp_path / "engine", chunkkv_layer_reuse=2, chunkkv_leader=leader)
    nodes = machine.log[0]["network"].model.graph.node  # prefill is built first
    keys = [node.input[0] for node in nodes if node.name.endswith("compact_key")]
    made = {name: place for place, node in enumerate(nodes) for name in node.output}
    used = {name: place for place, node in enumerate(nodes) for name in node.input}
    overlap = max(sum(made[key] <= place <= used[key] for key in keys) for place in range(len(nodes)))
    assert overlap == alive == Contract.read(folder).group_layers


def test_attention_finds_its_scale_on_the_query(machine: Double, tmp_path: Path) -> None:
    build(tmp_path / "engine")
    for entry in machine.log:
        nodes = entry["network"].model.graph.node
        made = {node.output[0]: node for node in nodes}
        attentions = [node for node in nodes if node.op_type == "Attention"]
        assert len(attentions) == 3
        for node in attentions:
            assert [a.f for a in node.attribute if a.name == "scale"] == [1.0]
            scaled = made[node.input[0]]
            assert scaled.op_type == "Mul"
            constant = onnx.numpy_helper.to_array(made[scaled.input[1]].attribute[0].t)
            assert constant == np.float32(16**-0.5)
