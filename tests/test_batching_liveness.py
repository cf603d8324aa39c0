"""Whether a batcher lives: its heartbeat, which no prompt and no queue can hold up, and what waiting requests cost."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
from support import engines
from support.messages import naming
from test_batching import gate, wait_for

from chunkkv import SamplingParams
from chunkkv.batching import BatchingLimits, ContinuousBatcher, QueueListener
from chunkkv.errors import EngineRunError
from chunkkv.executors.onnxruntime.graphs import OnnxRuntimeStep

__all__ = ["gate"]  # a fixture

GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(3, 384, length).tolist()


def last(events) -> object:
    *_, event = events
    return event.finished


@pytest.fixture(scope="module")
def session():
    return engines.session("llama3", chunkkv_layer_reuse=2, chunkkv_boundaries="delimiter")


def test_a_busy_batcher_says_that_it_lives_and_a_stuck_one_that_it_does_not(session, gate) -> None:
    with ContinuousBatcher(session, BatchingLimits(slots=1, waiting=1)) as batcher:
        batcher.check_alive(0.001)
        streams = [batcher.stream(prompt(20 + n), GREEDY) for n in range(2)]
        next(streams[0])
        batcher.check_alive(30)
        time.sleep(0.1)
        with pytest.raises(EngineRunError, match=naming("stuck block")):
            batcher.check_alive(0.05)
        gate.opened.set()
        assert [len(last(stream).token_ids) for stream in streams] == [12, 12]
        wait_for(lambda: batcher.load().active == 0)
        time.sleep(0.1)
        batcher.check_alive(0.05)


def test_a_prompt_that_takes_longer_than_every_timeout_is_no_stuck_engine(session, monkeypatch) -> None:
    """Nine blocks of 60 ms each are far more than twice the time for which no block may end."""
    append = OnnxRuntimeStep.append_prompt_block

    def slow(*inputs):
        time.sleep(0.06)
        return append(*inputs)

    monkeypatch.setattr(OnnxRuntimeStep, "append_prompt_block", slow)
    with ContinuousBatcher(session, BatchingLimits(slots=1)) as batcher:
        began, stream = time.monotonic(), QueueListener()
        batcher.submit(prompt(144), GREEDY, stream)
        wait_for(lambda: batcher.load().active == 1)
        while stream.is_empty:
            batcher.check_alive(0.2)
            time.sleep(0.005)
        assert time.monotonic() - began > 0.5
        last(stream.events())


def test_waiting_requests_are_asked_ten_times_a_second_and_no_more(session, gate) -> None:
    """Whether a client has gone is a message to the server, so it must not be asked of all of them in every step."""
    asked = []

    class Waiting(QueueListener):
        def is_cancelled(self) -> bool:
            asked.append(time.monotonic())
            return super().is_cancelled()

    with ContinuousBatcher(session, BatchingLimits(slots=1)) as batcher:
        running = batcher.stream(prompt(20), dataclasses.replace(GREEDY, max_new_tokens=200))
        next(running)
        waiting = [Waiting() for _ in range(8)]
        for listener in waiting:
            batcher.submit(prompt(21), GREEDY, listener)
        began = time.monotonic()
        gate.opened.set()
        last(running)
        rounds = (time.monotonic() - began) / 0.1 + 2
        meanwhile = [moment for moment in asked if moment <= began + (rounds - 2) * 0.1]
        assert gate.steps >= 199 and len(meanwhile) <= 8 * rounds
        for listener in waiting:
            last(listener.events())
