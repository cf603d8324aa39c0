"""Continuous batching: the session's own tokens, whoever comes and goes; bounds, cancelling, timeouts, failures."""

from __future__ import annotations

import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support import engines
from support.messages import naming

from chunkkv import SamplingParams, profiling
from chunkkv.batching import BatchingLimits, ContinuousBatcher, QueueListener
from chunkkv.errors import ConfigError, EngineRunError, OverloadedError, RequestTimeoutError
from chunkkv.executors.onnxruntime.decode import OnnxRuntimeDecoder
from chunkkv.executors.onnxruntime.graphs import OnnxRuntimeStep

GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)
LONG = dataclasses.replace(GREEDY, max_new_tokens=100)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(3, 384, length).tolist()


def last(events) -> object:
    *_, event = events
    return event.finished


@pytest.fixture(scope="module")
def session():
    return engines.session("llama3", chunkkv_layer_reuse=2, chunkkv_boundaries="delimiter")


@pytest.fixture
def batcher(session):
    with ContinuousBatcher(session, BatchingLimits(slots=4)) as made:
        yield made


@pytest.fixture
def gate(monkeypatch):
    """Decode steps wait until the test opens the gate; `steps` counts them."""
    make, decode = OnnxRuntimeDecoder.__init__, OnnxRuntimeDecoder.step
    computed_rows = {}

    class Gate:
        opened, steps, rows = threading.Event(), 0, []

    def made(self, graph, cache):
        computed_rows[self] = cache.row_count
        make(self, graph, cache)

    def step(self, *inputs):
        assert Gate.opened.wait(30)
        Gate.steps += 1
        Gate.rows.append(computed_rows[self])
        return decode(self, *inputs)

    Gate.opened, Gate.steps, Gate.rows = threading.Event(), 0, []
    monkeypatch.setattr(OnnxRuntimeDecoder, "__init__", made)
    monkeypatch.setattr(OnnxRuntimeDecoder, "step", step)
    yield Gate
    Gate.opened.set()


def wait_for(condition) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


def test_every_request_gets_the_sessions_own_tokens(session, batcher) -> None:
    """Forty requests of mixed lengths, budgets and sampling join and leave in four slots."""
    rng = np.random.default_rng(7)
    cases = []
    for number in range(40):
        params = SamplingParams(
            max_new_tokens=int(rng.integers(1, 40)),
            temperature=float(rng.choice([0.0, 0.8])),
            top_k=int(rng.choice([0, 20])),
            top_p=float(rng.choice([0.9, 1.0])),
            seed=number,
            logprobs=True,
        )
        budget = [{}, {"keep_ratio": 0.6}, {"budget_tokens": 25}, {"keep_ratio": 1.0}][number % 4]
        cases.append((prompt(int(rng.integers(1, 180)), number), params, budget))
    expected = [session.generate(ids, params, **budget) for ids, params, budget in cases]
    with ThreadPoolExecutor(40) as pool:
        found = list(pool.map(lambda case: last(batcher.stream(case[0], case[1], **case[2])), cases))
    for mine, own in zip(found, expected, strict=True):
        assert (mine.token_ids, mine.text, mine.finish_reason) == (own.token_ids, own.text, own.finish_reason)
        assert mine.statistics.kept_tokens == own.statistics.kept_tokens
        np.testing.assert_allclose(mine.logprobs, own.logprobs, atol=1e-4)
    assert batcher.load().active == batcher.load().waiting == batcher.load().kv_bytes_used == 0


def test_a_stream_is_the_text_in_pieces(session, batcher) -> None:
    events = list(batcher.stream("the key of the cache is in the token", GREEDY))
    own = session.generate("the key of the cache is in the token", GREEDY)
    assert "".join(event.text for event in events) == events[-1].finished.text == own.text
    assert tuple(token for event in events for token in event.token_ids) == own.token_ids


def test_a_newcomer_joins_while_another_decodes(batcher, gate) -> None:
    first, second = batcher.stream(prompt(40), LONG), None
    next(first)
    gate.opened.set()
    second = batcher.stream(prompt(50), GREEDY)
    last(second)
    assert batcher.load().active == 1, "the long answer still grows"
    assert len(last(first).token_ids) == 100
    assert gate.steps < 100 + 12, "they decoded together"
    assert set(gate.rows) == {1, 2}, "a lone answer pays for one row"


def test_slots_bound_what_decodes_and_the_queue_what_waits(session, gate) -> None:
    with ContinuousBatcher(session, BatchingLimits(slots=1, waiting=2)) as batcher:
        running = batcher.stream(prompt(20), GREEDY)
        next(running)
        waiting = [batcher.stream(prompt(20 + n), GREEDY) for n in range(2)]
        with pytest.raises(OverloadedError, match=naming("queue 1 2 waiting")):
            batcher.stream(prompt(9), GREEDY)
        gate.opened.set()
        assert [len(last(stream).token_ids) for stream in (running, *waiting)] == [12] * 3


def test_first_come_first_served(session) -> None:
    order = []

    class Listener:
        def __init__(self, number):
            self.number, self.ended = number, threading.Event()

        def on_accepted(self, request):
            assert len(request.ids) == 30 + self.number

        def on_event(self, event):
            if event.finished:
                order.append(self.number)
                self.ended.set()

        def is_cancelled(self):
            return False

    with ContinuousBatcher(session, BatchingLimits(slots=1)) as batcher:
        listeners = [Listener(number) for number in range(8)]
        for listener in listeners:
            batcher.submit(prompt(30 + listener.number), GREEDY, listener)
        assert all(listener.ended.wait(30) for listener in listeners)
    assert order == list(range(8))


def test_cancelling_ends_within_a_token(batcher, gate) -> None:
    stream = batcher.stream(prompt(40), LONG)
    next(stream)
    stream.close()
    gate.opened.set()
    wait_for(lambda: batcher.load().active == 0)
    assert gate.steps <= 1


def test_cancelling_while_waiting_frees_the_queue(session, gate) -> None:
    with ContinuousBatcher(session, BatchingLimits(slots=1, waiting=1)) as batcher:
        running = batcher.stream(prompt(20), GREEDY)
        next(running)
        given_up = QueueListener()
        batcher.submit(prompt(21), GREEDY, given_up)
        given_up.cancel()
        gate.opened.set()
        result = last(given_up.events())
        assert result.finish_reason == "cancelled" and result.token_ids == () and result.text == ""
        assert result.statistics.prompt_tokens == 21 and result.statistics.allocated_cache_bytes == 0
        assert last(running).finish_reason == "length"


def test_a_wait_too_long_and_an_answer_too_long(session, gate) -> None:
    limits = BatchingLimits(slots=1, queue_timeout_s=0.05, request_timeout_s=0.5)
    with ContinuousBatcher(session, limits) as batcher:
        running = batcher.stream(prompt(20), LONG)
        next(running)
        waiting = batcher.stream(prompt(21), GREEDY)
        time.sleep(0.1)
        gate.opened.set()
        with pytest.raises(RequestTimeoutError, match=naming("waited 0.05")):
            last(waiting)
        last(running)
        gate.opened.clear()
        running = batcher.stream(prompt(20), LONG)
        next(running)
        time.sleep(0.6)
        gate.opened.set()
        with pytest.raises(RequestTimeoutError, match=naming("took 0.5 tokens")):
            last(running)


def test_a_failing_step_ends_its_answers_and_the_next_request_works(session, batcher, monkeypatch) -> None:
    decode = OnnxRuntimeDecoder.step
    monkeypatch.setattr(OnnxRuntimeDecoder, "step", lambda *_: 1 / 0)
    with pytest.raises(EngineRunError, match=naming("engine ZeroDivisionError")):
        last(batcher.stream(prompt(40), GREEDY))
    monkeypatch.setattr(OnnxRuntimeDecoder, "step", decode)
    assert last(batcher.stream(prompt(40), GREEDY)).token_ids == session.generate(prompt(40), GREEDY).token_ids


def test_a_failing_prefill_ends_its_own_request_only(session, batcher, gate, monkeypatch) -> None:
    running = batcher.stream(prompt(40), GREEDY)
    next(running)
    with monkeypatch.context() as patch:
        patch.setattr(OnnxRuntimeStep, "append_prompt_block", lambda *_: 1 / 0)
        failing = batcher.stream(prompt(30), GREEDY)
        gate.opened.set()
        with pytest.raises(EngineRunError, match="ZeroDivisionError"):
            last(failing)
    assert last(running).token_ids == session.generate(prompt(40), GREEDY).token_ids


def test_a_failing_listener_takes_nothing_down(batcher) -> None:
    class Broken:
        def on_accepted(self, request):
            pass

        def on_event(self, event):
            raise OSError("the client has gone")

        on_error = on_event

        def is_cancelled(self):
            return False

    batcher.submit(prompt(40), LONG, Broken())
    assert len(last(batcher.stream(prompt(41), GREEDY)).token_ids) == 12
    wait_for(lambda: batcher.load().active == 0)


def test_a_listener_that_cannot_say_whether_it_has_gone_takes_nothing_down(batcher) -> None:
    class Broken:
        asked = 0

        def on_accepted(self, request):
            pass

        on_event = on_error = on_accepted

        def is_cancelled(self):
            Broken.asked += 1
            raise OSError("the client has gone")

    batcher.submit(prompt(40), LONG, Broken())
    wait_for(lambda: Broken.asked)
    assert len(last(batcher.stream(prompt(41), GREEDY)).token_ids) == 12


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_batcher_that_has_stopped_is_not_taken_for_a_busy_one(session, monkeypatch) -> None:
    """Who watches a server tells the two apart by the error; nothing else would restart it."""
    with ContinuousBatcher(session, BatchingLimits(slots=1)) as batcher:
        monkeypatch.setattr(batcher, "_drop_stale", lambda: 1 / 0)
        with pytest.raises(EngineRunError, match=naming("batcher ZeroDivisionError")):
            last(batcher.stream(prompt(40), GREEDY))
        wait_for(lambda: not batcher._thread.is_alive())
        with pytest.raises(EngineRunError, match=naming("batcher ZeroDivisionError")):
            batcher.stream(prompt(40), GREEDY)


def test_closing_ends_or_finishes_everything(session, gate) -> None:
    batcher = ContinuousBatcher(session, BatchingLimits(slots=1))
    streams = [batcher.stream(prompt(20 + n), GREEDY) for n in range(3)]
    next(streams[0])
    threading.Timer(0.1, gate.opened.set).start()
    batcher.close()
    for stream in streams:
        with pytest.raises(OverloadedError, match="batcher was closed"):
            last(stream)
    with pytest.raises(OverloadedError):
        batcher.stream(prompt(9), GREEDY)
    batcher = ContinuousBatcher(session, BatchingLimits(slots=1))
    streams = [batcher.stream(prompt(20 + n), GREEDY) for n in range(3)]
    batcher.close(drain=True)
    assert [len(last(stream).token_ids) for stream in streams] == [12] * 3


def test_profilers_see_each_request_and_the_steps_they_share(batcher, gate) -> None:
    with profiling.recording() as recorder:
        first = batcher.stream(prompt(40), GREEDY)
        next(first)
        second = batcher.stream(prompt(50), GREEDY)
        gate.opened.set()
        kept = [last(stream).statistics.kept_tokens for stream in (first, second)]
        wait_for(lambda: batcher.load().active == 0)
    spans = [found for found in recorder.ranges if found.name == "request"]
    assert [found.kept_tokens for found in spans] == kept and len({found.request_id for found in spans}) == 2
    together = [found for found in recorder.ranges if found.name == "decode" and found.request_id == 0]
    assert together and {found.kept_tokens for found in together} == {sum(kept)}
    assert all(recorder.of_request(found.request_id)[0] == found for found in spans), "a span holds the whole request"


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"slots": 0}, "slots 0"),
        ({"slots": 1.5}, "slots 1.5"),
        ({"slots": "3"}, "slots '3'"),
        ({"slots": True}, "slots True"),
        ({"waiting": 0}, "waiting 0"),
        ({"waiting": None}, "waiting None"),
        ({"queue_timeout_s": float("nan")}, "queue_timeout_s nan"),
        ({"request_timeout_s": 0}, "request_timeout_s 0"),
        ({"request_timeout_s": "60"}, "request_timeout_s '60'"),
        ({"kv_bytes": 0}, "kv_bytes 0"),
        ({"kv_bytes": 1e9}, "kv_bytes 1000000000.0"),
    ],
)
def test_limits_are_checked(values: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=naming(named)):
        BatchingLimits(**values)


def test_slots_are_not_bound_by_the_engines_batch_size(session) -> None:
    """The engine was built for 4 rows; its graphs take any number."""
    assert session.limits.max_batch_size == 4
    expected = [session.generate(prompt(20, seed), GREEDY).token_ids for seed in range(9)]
    with ContinuousBatcher(session, BatchingLimits(slots=9)) as batcher:
        assert batcher.load().slots == 9
        streams = [batcher.stream(prompt(20, seed), GREEDY) for seed in range(9)]
        assert [last(stream).token_ids for stream in streams] == expected
    with ContinuousBatcher(session) as batcher:
        assert batcher.load().slots == 256 and batcher.load().kv_bytes_bound > 0


def test_questions_behind_a_context_are_batched_beside_other_prompts(session, batcher) -> None:
    context = session.compress(prompt(90), keep_ratio=0.5)
    questions = [prompt(5 + number, number) for number in range(5)]
    expected = [session.generate(ids, GREEDY, context=context).token_ids for ids in questions]
    other = session.generate(prompt(70), GREEDY).token_ids
    streams = [batcher.stream(ids, GREEDY, context=context) for ids in questions]
    beside = batcher.stream(prompt(70), GREEDY)
    assert [last(stream).token_ids for stream in streams] == expected and last(beside).token_ids == other
