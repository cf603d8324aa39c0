"""Contexts on the TensorRT executor, on a contract as read: answers must be those of the ONNX Runtime engine.

TensorRT and CUDA are our own doubles (support/); these tests prove nothing about the real ones.
"""

from __future__ import annotations

import gc
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from support import engines, tensorrt_double
from support.messages import naming
from support.tensorrt_double import Double, machine_of

from chunkkv import ChunkKVSession, Context, SamplingParams
from chunkkv.conversation import Conversation
from chunkkv.engine.directory import MANIFEST_FILE, Manifest
from chunkkv.engine.tensorrt_contract import CONTRACT_FILE, Contract
from chunkkv.errors import BackendUnavailableError, EngineMismatchError, EngineRunError
from chunkkv_builder.manifest import write_manifest
from chunkkv_builder.progress import Progress

pytestmark = pytest.mark.contract_as_read

machine = pytest.fixture(machine_of)
build = partial(engines.build_tensorrt, max_seq_len=512)
PARAMS = SamplingParams(max_new_tokens=8, ignore_eos=True, logprobs=True)
DOCUMENT, SHORT, LONG, MIDDLE = (
    np.random.default_rng([6, length]).integers(3, 300, length) for length in (150, 5, 90, 33)
)
TOLERANCE = 1e-4


@pytest.fixture
def session(machine: Double, tmp_path: Path) -> ChunkKVSession:
    return ChunkKVSession.from_dir(build(tmp_path / "engine"))


@pytest.fixture(scope="module")
def onnx_session() -> ChunkKVSession:
    return engines.session("llama3", max_seq_len=512)


def assert_same(found: list, expected: list) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=TOLERANCE)
        for name in ("prompt_tokens", "context_tokens", "kept_tokens"):
            assert getattr(one.statistics, name) == getattr(other.statistics, name)


@pytest.mark.parametrize("keep_ratio", [None, 1.0])
@pytest.mark.parametrize("variant", ["llama3", "qwen3", "mistral"])
def test_answers_equal_those_of_onnx_runtime(machine: Double, tmp_path: Path, variant: str, keep_ratio) -> None:
    session = ChunkKVSession.from_dir(build(tmp_path / "engine", variant))
    onnx_session = engines.session(variant, max_seq_len=512)
    answers = []
    for each in (session, onnx_session):
        context = each.compress(DOCUMENT, keep_ratio=keep_ratio)
        longer = context.extend(LONG)
        held: dict[int, Context] = {}
        found = each.generate([SHORT, LONG, MIDDLE], PARAMS, context=context, on_context=held.__setitem__)
        found += [each.generate(SHORT, PARAMS, context=behind) for behind in (longer, held[1])]
        answers.append(found)
    assert_same(*answers)


def test_memory_that_nobody_wrote_changes_nothing_and_is_given_back(machine: Double, session: ChunkKVSession) -> None:
    context = session.compress(DOCUMENT)
    expected = session.generate([SHORT, LONG], PARAMS, context=context)
    gc.collect()
    before = set(machine.cuda.memory)  # fresh memory holds NaN on this machine
    with ThreadPoolExecutor(3) as pool:
        runs = list(pool.map(lambda held: session.generate([SHORT, LONG], PARAMS, context=held), [context] * 3))
    for run in runs:
        assert [answer.logprobs for answer in run] == [answer.logprobs for answer in expected]
    gc.collect()
    assert set(machine.cuda.memory) == before and not machine.cuda.live_graphs


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_saved_context_comes_back(machine: Double, tmp_path: Path, dtype: str) -> None:
    session = ChunkKVSession.from_dir(build(tmp_path / "engine", dtype=dtype))
    context = session.compress(DOCUMENT)
    context.save(tmp_path / "context.safetensors")
    loaded = Context.load(tmp_path / "context.safetensors", session)
    continuer = session.executor.continuer()
    arrays = [continuer.to_host(each.cache, each.slots) for each in (context, loaded)]
    assert arrays[0].keys() == arrays[1].keys() and arrays[0]["key.0"].dtype == dtype
    for name, array in arrays[0].items():
        assert np.isfinite(array).all() and np.array_equal(array, arrays[1][name])
    answers = [session.generate(SHORT, PARAMS, context=each) for each in (context, loaded)]
    assert answers[0].logprobs == answers[1].logprobs


def test_a_conversation_goes_on_in_the_cache(session: ChunkKVSession, onnx_session: ChunkKVSession) -> None:
    answers = []
    for each in (session, onnx_session):
        conversation = Conversation(each, "The door is green. " * 6)
        for question in ("What colour is the door?", "And the key?"):
            list(conversation.ask(question, PARAMS))
        assert conversation.last is not None and conversation.last.statistics.context_tokens > 0
        answers.append(conversation.last)
    assert_same([answers[0]], [answers[1]])


def test_a_turn_stays_whole(session: ChunkKVSession) -> None:
    context = session.compress(DOCUMENT)
    assert session.executor.capabilities.continues_rows and not session.executor.capabilities.compresses_turns
    with pytest.raises(BackendUnavailableError, match="cannot compress a turn"):
        context.extend(LONG, keep_ratio=0.3)


def test_a_directory_without_block_engines_is_refused_by_name(machine: Double, tmp_path: Path) -> None:
    folder = build(tmp_path / "engine")
    values = json.loads((folder / CONTRACT_FILE).read_text())
    assert values.pop("block_tokens") == 128
    (folder / CONTRACT_FILE).write_text(json.dumps(values))
    for path in folder.glob("block_*.engine"):
        path.unlink()
    assert Contract.read(folder).block_tokens == 0
    manifest = Manifest.read(folder / MANIFEST_FILE)
    (folder / MANIFEST_FILE).unlink()
    write_manifest(folder, manifest.backend, manifest.versions, Progress("error"), manifest.tensorrt)
    session = ChunkKVSession.from_dir(folder)
    assert len(session.generate(SHORT, PARAMS).token_ids) == 8
    with pytest.raises(BackendUnavailableError, match="cannot continue a context"):
        session.compress(DOCUMENT)
    with pytest.raises(BackendUnavailableError, match="no block engines"):
        session.executor.continuer()


def test_a_block_behind_the_cache_and_caches_that_are_not_updated_are_refused(session, monkeypatch) -> None:
    executor = session.executor
    continuer, cache = executor.continuer(), executor.new_cache(1, 128)
    with pytest.raises(EngineRunError, match=naming("row 0 slot 128 128 slots")):
        continuer.append(cache, SHORT, (124,), 124)
    monkeypatch.setattr(tensorrt_double.Engine, "get_aliased_input_tensor", lambda self, name: None)
    with pytest.raises(EngineMismatchError, match=naming("present_key.0 None 'past_key.0'")):
        continuer.append(cache, SHORT, (0,), 0)
