"""What answers leave in their rows goes on as a context."""

from __future__ import annotations

import pytest
from support import engines
from test_batching import GREEDY, last, prompt

from chunkkv.batching import BatchingLimits, ContinuousBatcher, QueueListener


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
