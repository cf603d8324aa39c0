"""What answers leave in their rows goes on as a context."""

from __future__ import annotations

import dataclasses

import pytest
from support import engines
from test_batching import GREEDY, last, prompt

from chunkkv.batching import BatchingLimits, ContinuousBatcher, QueueListener
from chunkkv.errors import EngineRunError
from chunkkv.executors.elastic_cache import ElasticHostKVCache
from chunkkv.executors.onnxruntime.continuation import OnnxRuntimeContinuer
from chunkkv.executors.onnxruntime.decode import OnnxRuntimeDecoder


@pytest.fixture(scope="module")
def session():
    return engines.session("llama3", chunkkv_layer_reuse=2, chunkkv_boundaries="delimiter")


@pytest.fixture
def batcher(session):
    with ContinuousBatcher(session, BatchingLimits(slots=4)) as made:
        yield made


def test_what_an_answer_leaves_in_its_row_is_handed_over_as_a_context(session, batcher) -> None:
    contexts, listener = [], QueueListener()
    ids = prompt(150, 3)
    batcher.submit(ids, GREEDY, listener, keep_ratio=0.3, on_context=contexts.append)
    answer = last(listener.events())
    (context,) = contexts
    assert context.token_ids.tolist() == [*ids, *answer.token_ids[:-1]]
    assert context.kept_tokens == answer.statistics.kept_tokens + len(answer.token_ids) - 1
    more = [answer.token_ids[-1], *prompt(20, 4)]
    held = []
    session.generate(ids, GREEDY, keep_ratio=0.3, on_context=lambda row, made: held.append(made))
    expected = session.generate(more, GREEDY, context=held[0])
    continued = last(batcher.stream(more, GREEDY, context=context))
    assert continued.token_ids == expected.token_ids
    assert continued.statistics.context_tokens == len(context)


@pytest.fixture
def copies(monkeypatch):
    """What moves rows: `copy` for one from a context, `take_row` for one from another cache."""
    log = []
    copy, take_row = OnnxRuntimeContinuer.copy, ElasticHostKVCache.take_row

    def copied(self, *args) -> None:
        log.append("copy")
        copy(self, *args)

    def taken(self, *args) -> None:
        log.append("take_row")
        take_row(self, *args)

    monkeypatch.setattr(OnnxRuntimeContinuer, "copy", copied)
    monkeypatch.setattr(ElasticHostKVCache, "take_row", taken)
    return log


def test_a_context_is_copied_once_for_a_question(session, batcher, copies) -> None:
    context = session.compress(prompt(90), keep_ratio=0.5)
    expected = session.generate(prompt(9), GREEDY, context=context).token_ids
    copies.clear()
    assert last(batcher.stream(prompt(9), GREEDY, context=context)).token_ids == expected
    assert copies == ["copy"]


@pytest.fixture
def small_pieces(monkeypatch) -> None:
    """Others decode after every block."""
    monkeypatch.setattr("chunkkv.batching.batcher.PIECE_TOKENS", 16)
    monkeypatch.setattr("chunkkv.batching.schedule.PIECE_TOKENS", 16)


@pytest.mark.usefixtures("small_pieces")
def test_a_question_of_several_blocks_is_prefilled_in_its_row_while_others_decode(session, monkeypatch) -> None:
    """Steps between its blocks overwrite slot 0 of its row, which lies between rows that decode."""
    context = session.compress(prompt(90), keep_ratio=0.5)
    question = prompt(6 * 16, 5)  # six blocks
    long = dataclasses.replace(GREEDY, max_new_tokens=60)
    expected = session.generate(question, GREEDY, context=context).token_ids
    others = [session.generate(prompt(20, seed), long).token_ids for seed in range(3)]
    written, append = [], OnnxRuntimeContinuer.append

    def appended(self, cache, *args):
        written.append(float(abs(cache.keys[0][0, :, 0]).sum()))
        return append(self, cache, *args)

    monkeypatch.setattr(OnnxRuntimeContinuer, "append", appended)
    with ContinuousBatcher(session, BatchingLimits(slots=4)) as batcher:
        streams = [batcher.stream(prompt(20, 9), dataclasses.replace(GREEDY, max_new_tokens=3))]
        streams += [batcher.stream(prompt(20, seed), long) for seed in range(3)]
        assert last(streams[0]).finish_reason == "length"  # row 0 is free again, and the others lie behind it
        assert last(batcher.stream(question, GREEDY, context=context)).token_ids == expected
        assert [last(stream).token_ids for stream in streams[1:]] == others
    assert len(written) == 6 and len(set(written)) == 1, "every block found the context's slot 0"


@pytest.mark.usefixtures("small_pieces")
def test_a_question_outlives_a_step_that_fails_beside_it(session, monkeypatch) -> None:
    context = session.compress(prompt(90), keep_ratio=0.5)
    question = prompt(6 * 16, 5)
    expected = session.generate(question, GREEDY, context=context).token_ids
    blocks, append, step = [], OnnxRuntimeContinuer.append, OnnxRuntimeDecoder.step

    def appended(self, *args):
        blocks.append(1)
        return append(self, *args)

    def failing(self, *args):
        if len(blocks) == 3:
            raise RuntimeError("out of order")
        return step(self, *args)

    monkeypatch.setattr(OnnxRuntimeContinuer, "append", appended)
    monkeypatch.setattr(OnnxRuntimeDecoder, "step", failing)
    with ContinuousBatcher(session, BatchingLimits(slots=4)) as batcher:
        beside = batcher.stream(prompt(20), dataclasses.replace(GREEDY, max_new_tokens=60))
        next(beside)
        asked = batcher.stream(question, GREEDY, context=context)
        with pytest.raises(EngineRunError, match="out of order"):
            last(beside)
        assert last(asked).token_ids == expected
        assert batcher.load().kv_bytes_allocated == 0
