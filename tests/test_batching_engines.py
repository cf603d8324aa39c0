"""Continuous batching over the other engines, on their doubles: TensorRT, and TensorRT-LLM with its pool of blocks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import test_tensorrt_executor as tensorrt
import test_tensorrt_llm_executor as tensorrt_llm
from support.tensorrt_double import Double, machine_of

from chunkkv import ChunkKVSession, SamplingParams
from chunkkv.batching import BatchingLimits, ContinuousBatcher

SAMPLING = SamplingParams(max_new_tokens=8, ignore_eos=True)
machine = pytest.fixture(machine_of)


def assert_all_get_their_own_tokens(session: ChunkKVSession, prompts: list, count: int) -> int:
    """Send more requests than there are slots; return the most bytes that the caches took."""
    prompts = [prompts[number % len(prompts)] for number in range(count)]
    expected = [session.generate(ids, SAMPLING).token_ids for ids in prompts]
    with ContinuousBatcher(session, BatchingLimits(slots=3)) as batcher, ThreadPoolExecutor(count) as pool:
        found = list(pool.map(lambda ids: list(batcher.stream(ids, SAMPLING))[-1].finished, prompts))
        allocated = batcher.load().kv_bytes_allocated
    assert [result.token_ids for result in found] == expected
    return allocated


def test_tensorrt(machine: Double, tmp_path: Path) -> None:
    """Captured decode steps of several sizes over one cache, and caches of the capacities that were built."""
    session = ChunkKVSession.from_dir(tensorrt.build(tmp_path / "engine", chunkkv_layer_reuse=2))
    assert_all_get_their_own_tokens(session, tensorrt.PROMPTS, 6)


def test_a_paged_pool_serves_more_requests_than_it_holds_at_once() -> None:
    """The pool is too small for all requests at their full length: blocks that compression frees serve the next."""
    session, _ = tensorrt_llm.recorded(tensorrt_llm.engine_dir("late"), pool_tokens=640)
    allocated = assert_all_get_their_own_tokens(session, tensorrt_llm.PROMPTS, 12)
    assert allocated <= session.executor.capabilities.pool_bytes
