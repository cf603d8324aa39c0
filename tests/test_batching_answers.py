"""Several answers to one prompt: it is prefilled once, whoever comes, goes, waits or fails."""

from __future__ import annotations

import dataclasses

import pytest
from support import engines
from support.messages import naming
from test_batching import GREEDY, last, prompt, wait_for

from chunkkv import SamplingParams
from chunkkv.batching import BatchingLimits, ContinuousBatcher, QueueListener
from chunkkv.errors import EngineRunError, OverloadedError, RequestError
from chunkkv.executors.onnxruntime.decode import OnnxRuntimeDecoder
from chunkkv.executors.onnxruntime.graphs import OnnxRuntimeStep

DRAWN = [SamplingParams(max_new_tokens=12, temperature=1.0, seed=seed, ignore_eos=True) for seed in range(5)]


@pytest.fixture(scope="module")
def session():
    return engines.session("llama3", chunkkv_layer_reuse=2, chunkkv_boundaries="delimiter")


@pytest.fixture
def blocks(monkeypatch):
    """The sizes of the blocks of prompts that run; `at` calls something before the block of that number."""
    log, hooks = [], {}
    append = OnnxRuntimeStep.append_block

    def block(self, cache, ids, *args, **named):
        if hook := hooks.pop(len(log), None):
            hook()
        log.append(len(ids))
        return append(self, cache, ids, *args, **named)

    monkeypatch.setattr(OnnxRuntimeStep, "append_block", block)
    return log, hooks


def submit(batcher: ContinuousBatcher, ids: list[int], samplings=DRAWN, **named) -> list[QueueListener]:
    listeners = [QueueListener() for _ in samplings]
    batcher.submit_answers(ids, samplings, listeners, **named)
    return listeners


@pytest.mark.parametrize("slots", [8, 2, 1])
@pytest.mark.parametrize("keep_ratio", [0.3, 1.0])
def test_the_prompt_is_prefilled_once_however_many_seats_there_are(session, blocks, slots: int, keep_ratio) -> None:
    """With one slot, the next answer begins in the row of the one that ended."""
    ids, (log, _) = prompt(150, 3), blocks
    expected = [session.generate(ids, sampling, keep_ratio=keep_ratio).token_ids for sampling in DRAWN]
    log.clear()
    contexts = []
    with ContinuousBatcher(session, BatchingLimits(slots=slots)) as batcher:
        listeners = submit(batcher, ids, keep_ratio=keep_ratio, on_context=contexts.append)
        results = [last(listener.events()) for listener in listeners]
        assert batcher.load().kv_bytes_allocated == 0 and batcher.load().active == batcher.load().waiting == 0
    assert [result.token_ids for result in results] == expected and len(set(expected)) > 1
    assert sum(log) == 150, "one prefill"
    assert [result.statistics.prefill_s > 0 for result in results] == [True, False, False, False, False]
    held = {tuple(context.token_ids.tolist()) for context in contexts}
    assert held == {(*ids, *tokens[:-1]) for tokens in expected}


@pytest.mark.parametrize("slots", [4, 1])
def test_rows_of_caches_of_fixed_sizes_are_copied_too(session, blocks, monkeypatch, slots: int) -> None:
    """As on engines whose rows have memory of their own; other answers take rows in between."""
    executor, (log, _) = type(session.executor), blocks
    fixed = dataclasses.replace(executor.capabilities, elastic_rows=False)
    monkeypatch.setattr(executor, "capabilities", fixed)
    ids, other = prompt(100, 3), prompt(60, 7)
    expected = [session.generate(ids, sampling).token_ids for sampling in DRAWN]
    beside = session.generate(other, GREEDY).token_ids
    log.clear()
    with ContinuousBatcher(session, BatchingLimits(slots=slots)) as batcher:
        streams = [batcher.stream(other, GREEDY)]
        listeners = submit(batcher, ids)
        streams.append(batcher.stream(other, GREEDY))
        assert [last(listener.events()).token_ids for listener in listeners] == expected
        assert [last(stream).token_ids for stream in streams] == [beside, beside]
    assert sum(log) == 100 + 2 * 60


def test_engines_that_cannot_copy_rows_prefill_for_each_answer(session, blocks, monkeypatch) -> None:
    executor, (log, _) = type(session.executor), blocks
    monkeypatch.setattr(executor, "capabilities", dataclasses.replace(executor.capabilities, continues_rows=False))
    expected = [session.generate(prompt(40), sampling).token_ids for sampling in DRAWN]
    log.clear()
    with ContinuousBatcher(session, BatchingLimits(slots=2)) as batcher:
        assert [last(listener.events()).token_ids for listener in submit(batcher, prompt(40))] == expected
    assert sum(log) == 5 * 40


def test_answers_behind_a_context_share_the_question(session, blocks) -> None:
    log, _ = blocks
    context = session.compress(prompt(90), keep_ratio=0.5)
    expected = [session.generate(prompt(20, 1), sampling, context=context).token_ids for sampling in DRAWN]
    log.clear()
    with ContinuousBatcher(session, BatchingLimits(slots=8)) as batcher:
        listeners = submit(batcher, prompt(20, 1), context=context)
        assert [last(listener.events()).token_ids for listener in listeners] == expected
    assert sum(log) == 20


def test_whoever_leaves_the_others_go_on(session, blocks, monkeypatch) -> None:
    """The first answer is cancelled in the middle of the prefill, the second one after a token, the third waits."""
    monkeypatch.setattr("chunkkv.batching.batcher.PIECE_TOKENS", 16)
    monkeypatch.setattr("chunkkv.batching.schedule.PIECE_TOKENS", 16)
    ids, (log, hooks) = prompt(150, 3), blocks
    expected = [session.generate(ids, sampling).token_ids for sampling in DRAWN]
    log.clear()
    leaving: list[None] = []
    with ContinuousBatcher(session, BatchingLimits(slots=1)) as batcher:
        beside = batcher.stream(prompt(30), dataclasses.replace(GREEDY, max_new_tokens=200))
        next(beside)
        hooks[len(log) + 3] = lambda: leaving.append(listeners[0].cancel())  # before its fourth block
        listeners = submit(batcher, ids)
        listeners[2].cancel()
        assert last(listeners[2].events()).finish_reason == "cancelled", "it waited behind the others"
        assert last(beside).finish_reason == "length"
        second = listeners[1].events()
        assert next(second).token_ids == expected[1][:1]
        second.close()
        assert [last(listener.events()).token_ids for listener in listeners[3:]] == expected[3:]
    assert last(listeners[0].events()).finish_reason == "cancelled"
    assert sum(log) == 30 + 150 and leaving


def test_an_engine_that_fails_ends_all_of_them(session, monkeypatch) -> None:
    append, step = OnnxRuntimeStep.append_block, OnnxRuntimeDecoder.step
    failing = {"block"}

    def block(self, *args, **named):
        if "block" in failing:
            raise RuntimeError("no block")
        return append(self, *args, **named)

    def stepped(self, *args):
        if "step" in failing:
            raise RuntimeError("no step")
        return step(self, *args)

    monkeypatch.setattr(OnnxRuntimeStep, "append_block", block)
    monkeypatch.setattr(OnnxRuntimeDecoder, "step", stepped)
    with ContinuousBatcher(session, BatchingLimits(slots=2)) as batcher:
        for name in ("block", "step"):
            failing = {name}
            for listener in submit(batcher, prompt(40)):
                with pytest.raises(EngineRunError, match=f"no {name}"):
                    last(listener.events())
        failing = set()
        assert {last(listener.events()).finish_reason for listener in submit(batcher, prompt(40))} == {"length"}
        assert batcher.load().kv_bytes_allocated == 0


def test_closing_ends_those_that_wait_for_the_prompt(session, monkeypatch) -> None:
    batcher = ContinuousBatcher(session, BatchingLimits(slots=1))
    listeners = submit(batcher, prompt(40), [dataclasses.replace(one, max_new_tokens=100) for one in DRAWN])
    wait_for(lambda: batcher.load().active == 1)
    assert batcher.load().waiting == 4
    batcher.close()
    for listener in listeners:
        with pytest.raises(OverloadedError):
            last(listener.events())


def test_they_are_queued_together_or_not_at_all(session) -> None:
    with ContinuousBatcher(session, BatchingLimits(slots=2, waiting=2)) as batcher:
        with pytest.raises(RequestError, match=naming("5 answers at most 4")):
            submit(batcher, prompt(40))
        first = batcher.stream(prompt(40), dataclasses.replace(GREEDY, max_new_tokens=100))
        next(first)
        with pytest.raises(OverloadedError, match="queue is full"):
            submit(batcher, prompt(40), DRAWN[:4])
        assert batcher.load().waiting == 0
        with pytest.raises(RequestError, match="max_new_tokens"):
            submit(batcher, prompt(40), [DRAWN[0], dataclasses.replace(DRAWN[1], max_new_tokens=3)])
