"""Rows that take memory only for their tokens, and admission by what requests really need."""

from __future__ import annotations

import dataclasses
import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from support import engines
from support.messages import naming

from chunkkv import SamplingParams
from chunkkv.batching import BatchingLimits, ContinuousBatcher
from chunkkv.batching.bounds import free_memory
from chunkkv.batching.elastic_pool import ElasticPool
from chunkkv.batching.seats import Needs
from chunkkv.cache_layout import uniform_layout
from chunkkv.errors import CacheFullError, ConfigError, RequestError
from chunkkv.executors.elastic_cache import PAGE_BYTES, elastic_cache
from chunkkv.executors.host_cache import HostKVCache
from chunkkv.executors.onnxruntime.decode import OnnxRuntimeDecoder

GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(3, 384, length).tolist()


def last(events) -> object:
    *_, event = events
    return event.finished


def wait_for(condition) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def session():
    return engines.session("llama3", chunkkv_layer_reuse=2, chunkkv_boundaries="delimiter")


def template(heads: int = 2, head_dim: int = 64, layers: int = 4) -> HostKVCache:
    arrays = tuple(np.zeros((1, heads, 1, head_dim), np.float32) for _ in range(layers))
    return HostKVCache(arrays, arrays, uniform_layout(layers, heads))


def resident() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


def test_a_row_takes_the_memory_of_its_tokens_and_gives_it_back() -> None:
    """8,000 rows of 32,768 slots are a terabyte of address space; three rows of it hold 16 MB."""
    cache = elastic_cache(template(), 8000, (32_768,))
    assert cache.nbytes > 1e12
    before = resident()
    for row, tokens in ((0, 1000), (4000, 2000), (7999, 1000)):
        for array in cache.arrays:
            array[row, :, :tokens] = row + 1
    held = sum(cache.bytes_of((tokens,)) for tokens in (1000, 2000, 1000))
    assert held == pytest.approx(16.4e6, rel=0.02)
    assert 0.9 * held < resident() - before < 1.2 * held
    cache.release(4000)
    assert resident() - before < 0.7 * held
    assert all((array[0, :, :1000] == 1).all() and (array[7999, :, :1000] == 8000).all() for array in cache.arrays)
    cache.release(0)
    cache.release(7999)
    assert resident() - before < 0.1 * held


@pytest.mark.parametrize("head_dim", [64, 80, 128, 12])
def test_rows_and_heads_begin_on_pages_and_move_whole(head_dim: int) -> None:
    cache = elastic_cache(template(head_dim=head_dim), 3, (100,))
    assert cache.capacity >= (100,)
    assert all(array.strides[0] % PAGE_BYTES == array.strides[1] % PAGE_BYTES == 0 for array in cache.arrays)
    rng = np.random.default_rng(head_dim)
    values = [rng.standard_normal((2, 90, head_dim)).astype(np.float32) for _ in cache.arrays]
    for array, value in zip(cache.arrays, values, strict=True):
        array[2, :, :90] = value
        array[1] = 7
    cache.take_row(cache, 2, 0, (90,))
    other = elastic_cache(template(head_dim=head_dim), 1, (95,))
    other.take_row(cache, 0, 0, (90,))
    assert all((array[0, :, :90] == value).all() for array, value in zip(other.arrays, values, strict=True))
    assert all((array[1] == 7).all() and not array[[0, 2]].any() for array in cache.arrays)


def test_a_system_that_refuses_address_space_is_named_and_fewer_rows_are_tried(session, monkeypatch) -> None:
    with pytest.raises(CacheFullError, match=naming("bytes address space rows slots")):
        elastic_cache(template(), 1 << 40, (1 << 20,))
    make = type(session.executor).new_elastic_cache

    def refuse(self, rows: int, capacity: int):
        if rows > 2:
            raise CacheFullError("no")
        return make(self, rows, capacity)

    monkeypatch.setattr(type(session.executor), "new_elastic_cache", refuse)
    pool = ElasticPool(session.executor, 8, 256, None)
    assert pool.batch.rows == 2
    needs = Needs((10,), (12,))
    pool.take(needs)
    pool.take(needs)
    assert not pool.fits(needs)


def test_admission_counts_a_prompt_in_work_and_then_only_what_it_keeps(session) -> None:
    executor = session.executor
    pool = ElasticPool(executor, 8, 256, None)
    needs = Needs((40,), (50,), 200)

    def size(tokens: int) -> int:
        return pool.batch.cache.bytes_of((tokens,))

    seat = pool.take(needs)
    assert pool.allocated_bytes == size(200) + size(40)
    (request,) = session.requests([prompt(200)], GREEDY, budget_tokens=40)
    run = seat.prefill(request)
    while run.step() is None:
        pass
    seat.settle((40,))
    assert pool.allocated_bytes == size(50)
    seat.leave()
    seat.leave()
    assert pool.allocated_bytes == 0 and not pool.busy()
    whole = pool.take(Needs((200,), (210,)))
    assert pool.allocated_bytes == size(210), "a prompt that keeps everything moves array by array"
    whole.leave()


def test_memory_stays_within_its_bound_and_a_large_request_lets_small_ones_pass(session) -> None:
    pool = ElasticPool(session.executor, 1, 256, None)
    bound = pool.prefill_bytes(Needs((150,), (162,))) + pool.prefill_bytes(Needs((16,), (28,), 40))
    cases = [(prompt(150, n), {"keep_ratio": 1.0}) if n % 3 == 0 else (prompt(40, n), {}) for n in range(12)]
    most = []
    with ContinuousBatcher(session, BatchingLimits(slots=8, kv_bytes=bound)) as batcher:
        watching = threading.Event()

        def watch() -> None:
            while not watching.wait(0.001):
                most.append(batcher.load().kv_bytes_allocated)

        watcher = threading.Thread(target=watch)
        watcher.start()
        with ThreadPoolExecutor(12) as threads:
            found = list(threads.map(lambda case: last(batcher.stream(case[0], GREEDY, **case[1])), cases))
        watching.set()
        watcher.join()
        wait_for(lambda: batcher.load().kv_bytes_allocated == 0)
    assert 0 < max(most) <= bound
    for (ids, budget), mine in zip(cases, found, strict=True):
        assert mine.token_ids == session.generate(ids, GREEDY, **budget).token_ids


def test_what_never_fits_is_refused(session) -> None:
    per_token = session.executor.kv_bytes_per_token
    size = ElasticPool(session.executor, 1, 256, None).batch.cache.bytes_of
    with (
        ContinuousBatcher(session, BatchingLimits(slots=1, kv_bytes=size((64,)))) as batcher,
        pytest.raises(RequestError, match=naming("120 tokens 48 stay kv_bytes")),
    ):
        batcher.stream(prompt(120), GREEDY)
    with pytest.raises(ConfigError, match=naming("kv_bytes shortest")):
        ContinuousBatcher(session, BatchingLimits(kv_bytes=per_token))


def test_answers_of_every_length_share_a_step_and_rows_close_up(session, monkeypatch) -> None:
    """Twelve answers with caps of 4 to 200 tokens: one step for all, and few rows once few are left."""
    steps = []
    decode, make = OnnxRuntimeDecoder.step, OnnxRuntimeDecoder.__init__
    computed = {}

    def made(self, graph, cache) -> None:
        computed[self] = cache.row_count
        make(self, graph, cache)

    def step(self, rows, *inputs):
        steps.append((len(rows), computed[self]))
        return decode(self, rows, *inputs)

    monkeypatch.setattr(OnnxRuntimeDecoder, "__init__", made)
    monkeypatch.setattr(OnnxRuntimeDecoder, "step", step)
    caps = [200, *range(4, 48, 4), 200]
    cases = [(prompt(20, n), dataclasses.replace(GREEDY, max_new_tokens=cap)) for n, cap in enumerate(caps)]
    with ContinuousBatcher(session, BatchingLimits(slots=16)) as batcher:
        streams = [batcher.stream(*case) for case in cases]
        found = [last(stream).token_ids for stream in streams]
    own = steps.copy()
    assert found == [session.generate(*case).token_ids for case in cases]
    assert len(own) <= 230, "one step serves every length"
    assert {rows for taken, rows in own if taken == 2} == {2}, "the last answer moved from its high row"
    assert sum(rows > 2 * taken for taken, rows in own) <= 12, "one row moves per step"


def test_a_containers_bound_counts(tmp_path) -> None:
    free = free_memory(tmp_path)
    assert free > 1 << 20
    (tmp_path / "memory.current").write_text("1000\n", encoding="ascii")
    for most, expected in (("max\n", free), ("5000\n", 4000), ("500\n", 0)):
        (tmp_path / "memory.max").write_text(most, encoding="ascii")
        assert free_memory(tmp_path) == pytest.approx(expected, rel=0.2)
