"""Ranges around the stages: what is recorded, in which order, on which thread, and what they cost without a tool."""

from __future__ import annotations

import threading
import timeit
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support import engines

from chunkkv import SamplingParams, profiling
from chunkkv.session import ChunkKVSession

GREEDY = SamplingParams(max_new_tokens=4, ignore_eos=True)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(3, 384, length).tolist()


def test_the_stages_of_a_generation_in_order() -> None:
    with profiling.recording() as recorder:
        session = ChunkKVSession.from_dir(engines.engine_dir("llama3"), threads=1)
        result = session.generate(prompt(60), GREEDY)
    load, request, *stages = recorder.ranges
    names = [stage.name for stage in stages]
    assert (load.name, request.name, request.nested) == ("load", "request", False)
    assert names == [*["prefill"] * 4, "compress", "sample", *["decode", "sample"] * 3], "60 tokens are four blocks"
    kept = result.statistics.kept_tokens
    assert kept == 24 and load.request_id == 0
    assert {(stage.request_id, stage.kept_tokens) for stage in (request, *stages)} == {(request.request_id, kept)}
    assert recorder.of_request(request.request_id) == (request, *stages)
    ends = [request.start_ns, *(time for stage in stages for time in (stage.start_ns, stage.end_ns)), request.end_ns]
    assert ends == sorted(ends) and load.end_ns <= request.start_ns
    assert {stage.depth for stage in stages} == {0}


def test_a_batch_decodes_under_no_single_id_with_the_sum_of_kept_tokens() -> None:
    session = engines.session("llama3")
    with profiling.recording() as recorder:
        results = session.generate([prompt(60), prompt(7)], GREEDY)
    found = recorder.ranges
    spans = [one for one in found if one.name == "request"]
    assert len({span.request_id for span in spans}) == 2
    both = sum(result.statistics.kept_tokens for result in results)
    assert {(one.request_id, one.kept_tokens) for one in found if one.name == "decode"} == {(0, both)}
    assert [one.name for one in recorder.of_request(spans[1].request_id)] == ["request", "prefill", *["sample"] * 4]


def test_ranges_nest_and_an_error_closes_them() -> None:
    with profiling.recording() as recorder:
        with pytest.raises(KeyError), profiling.range("outer", request_id=3), profiling.range("inner"):
            raise KeyError
        with profiling.range("next"):
            pass
    assert [(one.name, one.depth, one.request_id) for one in recorder.ranges] == [
        ("outer", 0, 3),
        ("inner", 1, 0),
        ("next", 0, 0),
    ]


def test_an_abandoned_stream_closes_its_request() -> None:
    session = engines.session("llama3")
    with profiling.recording() as recorder:
        events = session.generate(prompt(60), GREEDY, stream=True)
        next(events)
        assert "request" not in {one.name for one in recorder.ranges}
        events.close()
    assert [one.name for one in recorder.ranges] == ["request", *["prefill"] * 4, "compress", "sample"]


def test_threads_do_not_meet_and_nothing_is_lost() -> None:
    threads, rounds = 8, 200
    barrier = threading.Barrier(threads)

    def work(number: int) -> None:
        barrier.wait()
        for _ in range(rounds):
            with profiling.range("outer", request_id=number), profiling.range("inner", request_id=number):
                pass

    with profiling.recording() as recorder, ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(1, threads + 1)))
    assert len(recorder.ranges) == 2 * threads * rounds
    assert {(one.name, one.depth) for one in recorder.ranges} == {("outer", 0), ("inner", 1)}
    for number in range(1, threads + 1):
        assert len({one.thread for one in recorder.of_request(number)}) == 1


def test_a_range_ends_where_it_began_and_the_recorder_is_bounded() -> None:
    with profiling.recording(limit=2) as recorder:
        across = profiling.range("across")
        across.__enter__()
        for _ in range(3):
            with profiling.range("within"):
                pass
    across.__exit__(None, None, None)
    with profiling.range("after"):
        pass
    assert [one.name for one in recorder.ranges] == ["within", "within"] and recorder.dropped == 2


@pytest.mark.parametrize(("request_id", "kept"), [(0, 0), (7, 399), (1, 999_999_999), (9_000_000_000, 1)])
def test_a_payload_carries_both_numbers(request_id: int, kept: int) -> None:
    value = profiling.payload(request_id, kept)
    assert value < 2**63 and profiling.split_payload(value) == (request_id, kept)


def test_without_a_tool_a_range_costs_next_to_nothing() -> None:
    def used() -> None:
        with profiling.range("decode", request_id=7, kept_tokens=399):
            pass

    cost = min(timeit.repeat(used, number=10_000, repeat=5)) / 10_000
    assert cost < 5e-6, f"{cost * 1e9:.0f} ns"
