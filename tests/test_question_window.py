"""The window of a request: where the question of a conversation begins, and that it alone observes the document."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
from support import engines

from chunkkv import ChunkKVSession, SamplingParams, reference_scores
from chunkkv.requests import make_requests
from chunkkv.text.question import question_start

WINDOW = 32
GREEDY = SamplingParams(max_new_tokens=8, ignore_eos=True)
DOCUMENT = "The door of the old house is green. The key lies under a stone. " * 3


@pytest.fixture(scope="module")
def session() -> ChunkKVSession:
    return engines.session("llama3", chunkkv_window=WINDOW, chunkkv_min_tokens=48, max_num_tokens=48)


@pytest.mark.parametrize(
    ("content", "question"),
    [
        ("Where is the key?", "Where is the key?"),
        ("The door is green. Where is the key?", "Where is the key?"),
        ("The door is green. Where is the key? Answer in one word.", "Where is the key? Answer in one word."),
        ("Is it green?\n\nThe key lies there. Find it.", "Find it."),
        ("Is it green? Why? Say so!", "Why? Say so!"),
        ("A long text\nsummarise it", "summarise it"),
        ("Version 1.5 is out. What is new?\n", "What is new?"),
        ("门是绿色的。钥匙在哪里？", "钥匙在哪里？"),
        ("  Where?  ", "Where?"),
    ],
)
def test_the_last_question_of_the_user(content: str, question: str) -> None:
    messages = [
        {"role": "user", "content": "Where was it?"},
        {"role": "assistant", "content": "There."},
        {"role": "user", "content": content},
    ]
    rendered = f"user: Where was it?\nassistant: There.\nuser: {content.strip()}\nassistant:"
    start = question_start(messages, rendered)
    assert start is not None and rendered[start:] == f"{question}\nassistant:"


@pytest.mark.parametrize("content", [None, "", "  ", [{"type": "text", "text": "Where?"}], "not as it was written"])
def test_no_question_is_found_where_there_is_no_text_as_it_was_written(content: object) -> None:
    assert question_start([{"role": "user", "content": content}], "user: Where?") is None
    assert question_start([{"role": "system", "content": "Where?"}], "system: Where?") is None


@pytest.mark.parametrize(
    ("question", "is_longer"), [("Why?", False), ("Where?", False), ("What colour is the door of that house?", True)]
)
def test_the_window_is_the_question_with_the_end_of_the_template(session, question: str, is_longer: bool) -> None:
    messages = [{"role": "user", "content": DOCUMENT + question}]
    (request,) = session.requests([messages], GREEDY)
    assert session.tokenizer is not None
    text = session.tokenizer.apply_chat_template(messages)
    behind = session.tokenizer.encode(text[text.rindex(question) :], add_special_tokens=False)
    assert request.window == min(len(behind), WINDOW) and is_longer == (len(behind) > WINDOW)
    assert session.requests([request.ids], GREEDY)[0].window == 0
    assert session.requests([DOCUMENT], GREEDY)[0].window == 0


def test_the_tokens_before_the_question_do_not_observe(session) -> None:
    """The engine's scores with a window per request are those of an engine whose whole window is as long."""
    messages = [{"role": "user", "content": DOCUMENT + "Why?"}]
    (request,) = session.requests([messages], GREEDY)
    assert 8 <= request.window < WINDOW
    own, whole = (session.inspect(prompt) for prompt in (messages, request.ids))
    for group, other in zip(own.groups, whole.groups, strict=True):
        assert not np.allclose(group.token_scores, other.token_scores)
        assert len(group.kept_indices) == len(other.kept_indices) == own.kept_tokens
        tail = np.arange(len(request.ids) - WINDOW, len(request.ids))
        assert np.isin(tail, group.kept_indices).all()
    observed = scores_of_last(session, request.ids, request.window)
    for group in own.groups:
        np.testing.assert_allclose(group.token_scores, observed[group.leader], rtol=1e-4, atol=1e-7)


def scores_of_last(session: ChunkKVSession, ids: np.ndarray, observed: int) -> dict[int, np.ndarray]:
    """Return the reference's token scores of every layer, seen by the last `observed` tokens."""
    prefiller = session.executor.blockwise_prefiller()
    cache = prefiller.new_cache(1, len(ids))
    _, queries = prefiller.fill(ids, cache, threading.Event())
    settings = session.settings
    assert settings is not None
    return {
        layer: reference_scores.token_scores(
            query[0],
            cache.keys[layer][0],
            settings.window,
            settings.pooling,
            settings.score,
            observed=observed,
            head_reduce=settings.head_reduce,
        )
        for layer, query in queries.items()
    }


class SevenTokens:
    """A tokenizer whose questions have seven tokens."""

    def encode_prompt(self, text: str, add_special_tokens: bool = True) -> list[int]:
        raise AssertionError(text)

    def encode_chat(self, messages: object) -> list[int]:
        return [5] * 60

    def question_tokens(self, messages: object) -> int | None:
        return 7


def test_at_least_eight_tokens_observe(session) -> None:
    messages = [{"role": "user", "content": "Why?"}]
    for settings, window in ((session.settings, 8), (dataclasses.replace(session.settings, window=3), 3), (None, 0)):
        (request,) = make_requests(
            [messages], SevenTokens(), session.limits, settings, None, None, 8, window_per_request=True
        )
        assert request.window == window


def test_engines_without_a_window_per_request_get_their_own(session, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = dataclasses.replace(session.executor.capabilities, window_per_request=False)
    monkeypatch.setattr(type(session.executor), "capabilities", fixed)
    assert session.requests([[{"role": "user", "content": DOCUMENT + "Why?"}]], GREEDY)[0].window == 0
