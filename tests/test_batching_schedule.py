"""Whose block is next: no stream waits for more than a block, short prompts go first, and no prompt starves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import engines

from chunkkv import SamplingParams
from chunkkv.batching import BatchingLimits, ContinuousBatcher, QueueListener, schedule
from chunkkv.batching.schedule import MOST_OVERTAKEN, OLDEST_EVERY, PIECE_TOKENS, Turns, admissible, count_overtaken
from chunkkv.executors.onnxruntime.decode import OnnxRuntimeDecoder
from chunkkv.executors.onnxruntime.graphs import OnnxRuntimeStep

BLOCK = 16  # of the test engines, and of the schedule in these tests
SHORT = SamplingParams(max_new_tokens=1)
LONG = SamplingParams(max_new_tokens=60, ignore_eos=True)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(3, 384, length).tolist()


@dataclass
class Waits:
    number: int
    tokens_left: int
    overtaken: int = 0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=30))
def test_every_prompt_ends_and_a_short_one_soon(arrivals: list[tuple[int, int]]) -> None:
    """A clock that counts pieces: each arrival comes some pieces after the one before, with a number of pieces."""
    turns, work, ended, clock = Turns(), [], {}, 0
    due, when = [], 0
    for number, (gap, pieces) in enumerate(arrivals):
        when += gap
        due.append((when, Waits(number, pieces * PIECE_TOKENS)))
    came = {waits.number: moment for moment, waits in due}
    total = sum(pieces for _, pieces in arrivals)
    while due or work:
        work += [waits for moment, waits in due if moment <= clock]
        due = [(moment, waits) for moment, waits in due if moment > clock]
        if (turn := turns.choose(work)) is not None:
            turn.tokens_left -= PIECE_TOKENS
            if turn.tokens_left == 0:
                work.remove(turn)
                ended[turn.number] = clock + 1
        clock += 1
    assert set(ended) == set(came)
    for number, (_, pieces) in enumerate(arrivals):
        waited = ended[number] - came[number]
        assert waited <= OLDEST_EVERY * (total + 1), "once it is the oldest, every third piece is its own"
        beside = [n for n in came if n != number and came[n] <= ended[number] and ended[n] > came[number]]
        if pieces == 1 and len(beside) <= 1:
            assert waited <= OLDEST_EVERY, "beside one long prompt a short one ends within three pieces"


def test_a_request_without_room_lets_a_bounded_number_pass() -> None:
    large, small = Waits(0, 1), [Waits(number, 1) for number in range(1, 99)]
    queue = [large, *small]

    def fits(request: Waits) -> bool:
        return request is not large

    passed = 0
    while able := admissible(queue, fits):
        count_overtaken(queue, able[0], fits)
        queue.remove(able[0])
        passed += 1
    assert passed == MOST_OVERTAKEN == large.overtaken and queue[0] is large
    assert admissible(queue, lambda request: True) == queue, "once there is room for it everybody may begin"


@pytest.fixture
def pieces(monkeypatch):
    """The pieces of work in order: `step`, or the number of tokens of a block; `at` calls something before a piece."""
    log, hooks = [], {}
    append, decode = OnnxRuntimeStep.append_prompt_block, OnnxRuntimeDecoder.step

    def note(piece) -> None:
        if hook := hooks.pop(len(log), None):
            hook()
        log.append(piece)

    def block(self, cache, ids, *place):
        note(len(ids))
        return append(self, cache, ids, *place)

    def step(self, *inputs):
        note("step")
        return decode(self, *inputs)

    monkeypatch.setattr(OnnxRuntimeStep, "append_prompt_block", block)
    monkeypatch.setattr(OnnxRuntimeDecoder, "step", step)
    monkeypatch.setattr("chunkkv.batching.batcher.PIECE_TOKENS", BLOCK)
    monkeypatch.setattr(schedule, "PIECE_TOKENS", BLOCK)
    log.clear()
    return log, hooks


@pytest.mark.parametrize("keep_ratio", [0.4, 1.0])
def test_a_stream_waits_for_one_block_and_a_short_prompt_for_three(pieces, keep_ratio: float) -> None:
    """A stream runs, a prompt of 12 blocks comes, and in its third block a prompt of one block."""
    log, hooks = pieces
    session = engines.session("llama3")
    long_ids = prompt(12 * BLOCK)
    expected = [session.generate(ids, LONG, keep_ratio=keep_ratio).token_ids for ids in (prompt(20), long_ids)]
    first = session.generate(prompt(9), SHORT).token_ids
    log.clear()
    with ContinuousBatcher(session, BatchingLimits(slots=3)) as batcher:
        stream = batcher.stream(prompt(20), LONG, keep_ratio=keep_ratio)
        begun = [next(stream)]
        late, answered = QueueListener(), []
        came = len(log)
        long = batcher.stream(long_ids, LONG, keep_ratio=keep_ratio)

        def submit() -> None:
            answered.append(len(log))
            batcher.submit(prompt(9), SHORT, late)

        hooks[came + 9] = submit
        late_result = [event.finished for event in late.events()][-1]
        long_result = [event.finished for event in long][-1]
        stream_result = [*begun, *stream][-1].finished
    assert (stream_result.token_ids, long_result.token_ids) == tuple(expected) and late_result.token_ids == first
    blocks = [piece for piece in log[answered[0] :] if piece != "step"]
    assert blocks.index(9) <= 3, "its only block is among the three after it came"
    ends = len(log) - log[::-1].index(BLOCK)
    between = "".join("s" if piece == "step" else "b" for piece in log[came:ends])
    assert "bb" not in between.lstrip("b"), "between two blocks every open answer gets a token"


def test_short_prompts_share_the_time_of_a_block(pieces) -> None:
    log, _ = pieces
    session = engines.session("llama3")
    with ContinuousBatcher(session, BatchingLimits(slots=5)) as batcher:
        running = batcher.stream(prompt(20), LONG)
        next(running)
        streams = [batcher.stream(prompt(5, seed), SHORT) for seed in range(3)]
        for stream in streams:
            list(stream)
        list(running)
    assert log.count(5) == 3
    text = "".join("s" if piece == "step" else "b" for piece in log)
    assert "bbb" in text or text.count("sbs") < 3, "three of them make up one block, unless they came one by one"
