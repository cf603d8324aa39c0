"""Continuous batching over the other engines, on their doubles: TensorRT, and TensorRT-LLM with its pool of blocks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import test_head_classes as head_classes
import test_tensorrt_executor as tensorrt
import test_tensorrt_llm_executor as tensorrt_llm
from support import engines
from support.messages import naming
from support.tensorrt_double import Double, machine_of

from chunkkv import ChunkKVSession, SamplingParams
from chunkkv.batching import BatchingLimits, ContinuousBatcher
from chunkkv.batching.bucket_pool import BucketPool
from chunkkv.batching.seats import Needs
from chunkkv.errors import ConfigError

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
    most = session.limits.max_batch_size
    with ContinuousBatcher(session) as batcher:
        assert batcher.load().slots == most and batcher.load().kv_bytes_bound is None
    with pytest.raises(ConfigError, match=naming(f"slots {most + 1} {most} --max_batch_size")):
        ContinuousBatcher(session, BatchingLimits(slots=most + 1))


def test_a_paged_pool_serves_more_requests_than_it_holds_at_once() -> None:
    """The pool is too small for all requests at their full length: blocks that compression frees serve the next."""
    session, _ = tensorrt_llm.recorded(tensorrt_llm.engine_dir(), pool_tokens=640)
    allocated = assert_all_get_their_own_tokens(session, tensorrt_llm.PROMPTS, 12)
    assert allocated <= session.executor.capabilities.pool_bytes


def test_a_busy_larger_cache_is_shared_before_another_is_made() -> None:
    """Answers of different lengths decode in one step; a step for one row costs about as much as for several."""
    executor = engines.session("llama3").executor  # its caches are made by number of slots, as those of any engine
    pool = BucketPool(executor, slots=2, max_tokens=256, bound=None)
    long, short, other = (pool.take(Needs((tokens,), (tokens + 1,))) for tokens in (200, 60, 61))
    assert long.batch is short.batch and long.capacity == short.capacity == (256,)
    assert other.capacity == (128,), "the larger one is full"
    assert len(pool.busy()) == 2


def test_caches_are_dropped_only_when_idle() -> None:
    executor = engines.session("llama3").executor
    pool = BucketPool(executor, slots=2, max_tokens=256, bound=2 * 128 * executor.kv_bytes_per_token)
    large = Needs((199,), (200,))
    small = [pool.take(Needs((59,), (60 + number,))) for number in range(2)]
    assert not pool.fits(Needs((60,), (61,))) and not pool.fits(large), "both rows are taken"
    small[0].leave()
    assert not pool.fits(large), "a row of the small cache is still in use"
    small[1].leave()
    assert pool.fits(large) and pool.take(large).capacity == (256,)
    assert not pool.fits(Needs((60,), (61,)))


@pytest.mark.parametrize("name", ["recent local heads", "no reading heads", "no local heads", "ranked", "ranked heads"])
def test_rows_whose_heads_hold_different_numbers_of_tokens(name: str) -> None:
    """Each length class of a row has its own slots in the shared cache, also while rows move."""
    session = head_classes.session(head_classes.settings_for(name))
    sampling = [SamplingParams(max_new_tokens=cap, ignore_eos=True) for cap in (30, 3, 4, 5, 6, 25)]
    prompts = [head_classes.tokens(length, length) for length in (90, 40, 61, 15, 77, 83)]
    expected = [session.generate(ids, params).token_ids for ids, params in zip(prompts, sampling, strict=True)]
    with ContinuousBatcher(session, BatchingLimits(slots=6)) as batcher:
        streams = [batcher.stream(ids, params) for ids, params in zip(prompts, sampling, strict=True)]
        found = [list(stream)[-1].finished.token_ids for stream in streams]
        assert found == expected and batcher.load().kv_bytes_allocated == 0
