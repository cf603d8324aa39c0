"""What a server holds between requests: conversations, documents, named contexts; bounds, and what is passed over."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from support import needle_engine
from support.http_server import ServedEngine, served

from chunkkv import ChunkKVSession, SamplingParams
from chunkkv.contexts import Context
from chunkkv.errors import CacheFullError
from chunkkv.serve.held import Budget, ContextStore, Held
from chunkkv.serve.service import ServiceLimits

PROSE = "The access code of the vault is 7 3 9. The keeper of the desk is clara. " * 8
GREEDY = {"temperature": 0, "max_tokens": 8}
KEEP_ALL = Budget(10_000, 0, None)


@pytest.fixture(scope="module")
def session() -> ChunkKVSession:
    return needle_engine.session()


@pytest.fixture
def engine(session: ChunkKVSession):
    with served(session) as made:
        yield made


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def ask(engine: ServedEngine, *texts: str, **body) -> tuple[str, int]:
    """Return the answer and how many tokens of the prompt were held."""
    reply = engine.post("/v1/chat/completions", messages=chat(*texts), **GREEDY, **body).json()
    return reply["choices"][0]["message"]["content"], reply["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_conversation_goes_on_and_gives_the_tokens_of_one_long_prompt(
    engine: ServedEngine, session: ChunkKVSession
) -> None:
    texts, length = [PROSE], 0
    for turn in range(3):
        answer, cached = ask(engine, *texts, keep_ratio=1.0)
        expected = session.generate(chat(*texts), SamplingParams(max_new_tokens=8), keep_ratio=1.0)
        assert answer == expected.text
        assert cached >= length and (cached > 0) == (turn > 0)
        length = expected.statistics.prompt_tokens
        texts += [answer, f"The keeper of the desk {turn}"]
    assert len(engine.service.store) == 1  # the longer conversation takes the place of the shorter one
    assert ask(engine, *texts, keep_ratio=1.0, cache_prompt=False)[1] == 0


def test_a_compressed_head_is_used_as_a_whole_and_only_with_its_budget(engine: ServedEngine) -> None:
    answer, cached = ask(engine, PROSE, keep_ratio=0.5)
    assert cached == 0
    assert ask(engine, PROSE, answer, "The keeper of", keep_ratio=0.5)[1] > 150
    assert ask(engine, PROSE, answer, "The keeper of", keep_ratio=0.25)[1] == 0
    assert ask(engine, PROSE, answer, "The keeper of", budget_tokens=80)[1] == 0
    assert ask(engine, PROSE[:400], "yes", "The keeper of", keep_ratio=0.5)[1] == 0  # a part of the head


def test_uncompressed_tokens_serve_every_prompt_that_begins_with_them(engine: ServedEngine) -> None:
    ask(engine, PROSE + "The keeper of the desk is", keep_ratio=1.0)
    assert ask(engine, PROSE + "The code of", keep_ratio=1.0)[1] > 150


def test_a_long_prompt_behind_a_short_beginning_is_compressed_all_the_same(engine: ServedEngine) -> None:
    answer, _ = ask(engine, "The keeper of the desk is clara, and she has the code of the vault.", keep_ratio=0.25)
    body = {"messages": chat("The keeper of the desk is clara, and she has the code of the vault.", answer, PROSE * 2)}
    usage = engine.post("/v1/chat/completions", **body, keep_ratio=0.25, **GREEDY).json()["usage"]
    details = usage["prompt_tokens_details"]
    assert details["cached_tokens"] == 0 and details["kept_tokens"] <= usage["prompt_tokens"] * 0.3


def test_a_named_context_is_asked_in_chats_and_goes_on(engine: ServedEngine, session: ChunkKVSession) -> None:
    made = engine.post("/v1/contexts", document=PROSE, id="doc", keep_ratio=0.5)
    assert made.status_code == 201
    described = made.json()
    context = session.compress(chat(PROSE), keep_ratio=0.5)
    assert (described["tokens"], described["kept_tokens"]) == (len(context), context.kept_tokens)
    question = "The keeper of the desk is"
    expected = session.generate(chat(question), SamplingParams(max_new_tokens=8), context=context)
    answer, cached = ask(engine, question, context="doc")
    assert (answer, cached) == (expected.text, len(context))
    assert ask(engine, question, answer, "And now", context="doc")[1] > cached
    assert engine.post("/v1/contexts", document=PROSE, id="doc").status_code == 409
    assert [each["id"] for each in engine.client.get("/v1/contexts").json()["data"]] == ["doc"]
    assert engine.client.get("/v1/contexts/doc").json()["tokens"] == len(context)
    assert engine.client.delete("/v1/contexts/doc").json()["deleted"] is True
    assert engine.client.delete("/v1/contexts/doc").status_code == 404
    assert len(engine.service.store) == 0  # what went on from it went with it
    assert engine.post("/v1/chat/completions", messages=chat(question), context="doc").status_code == 404


def test_a_scorer_may_be_named(engine: ServedEngine, session: ChunkKVSession) -> None:
    question, sampling = "The keeper of the desk is", SamplingParams(max_new_tokens=8)
    context = session.compress(chat(PROSE), keep_ratio=0.3, scorer="reread")
    made = engine.post("/v1/contexts", document=PROSE, id="read-twice", keep_ratio=0.3, scorer="reread").json()
    assert (made["scorer"], made["kept_tokens"]) == ("reread", context.kept_tokens)
    expected = session.generate(chat(question), sampling, context=context).text
    assert ask(engine, question, context="read-twice")[0] == expected
    fresh = session.generate(chat(PROSE + question), sampling, keep_ratio=0.3, scorer="reread").text
    assert ask(engine, PROSE + question, keep_ratio=0.3, scorer="reread", cache_prompt=False) == (fresh, 0)
    assert ask(engine, PROSE + question, keep_ratio=0.3)[1] == 0  # scored otherwise, so nothing held fits


def test_contexts_of_text_and_of_token_ids(engine: ServedEngine, session: ChunkKVSession) -> None:
    ids = session.tokenizer.encode_prompt(PROSE)
    assert engine.post("/v1/contexts", prompt=PROSE, id="text").json()["tokens"] == len(ids)
    assert engine.post("/v1/contexts", prompt=ids, id="ids").json()["tokens"] == len(ids)
    replies = [
        engine.post("/v1/completions", prompt=" The keeper of", context=name, **GREEDY).json()
        for name in ("text", "ids")
    ]
    assert replies[0]["choices"][0]["text"] == replies[1]["choices"][0]["text"]
    refused = engine.post("/v1/chat/completions", messages=chat("a"), context="text")
    assert refused.status_code == 400 and "messages" in refused.json()["error"]["message"]


def test_without_memory_for_contexts_nothing_is_held(session: ChunkKVSession) -> None:
    with served(session, ServiceLimits(context_bytes=0)) as engine:
        answer, _ = ask(engine, PROSE, keep_ratio=1.0)
        assert ask(engine, PROSE, answer, "The keeper of", keep_ratio=1.0)[1] == 0
        refused = engine.post("/v1/contexts", document=PROSE)
        assert refused.status_code == 400 and "context_bytes" in refused.json()["error"]["message"]


def test_a_named_context_that_has_no_room_is_refused(session: ChunkKVSession) -> None:
    with served(session, ServiceLimits(context_bytes=1000)) as engine:
        refused = engine.post("/v1/contexts", document=PROSE)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "cache_full")


class Clock:
    """Time that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def context(session: ChunkKVSession) -> Context:
    return session.compress(np.arange(100, 200).tolist(), keep_ratio=1.0)


def other(context: Context, first: int) -> Context:
    """Return a context of the same size with other tokens."""
    return dataclasses.replace(context, token_ids=context.token_ids + first)


def test_what_was_not_used_for_longest_goes_first(context: Context) -> None:
    clock = Clock()
    size = Held(context, KEEP_ALL, 0).nbytes
    store = ContextStore(3 * size, 100.0, clock)
    for first in range(3):
        clock.now += 1
        store.add(Held(other(context, first), KEEP_ALL, 0))
    clock.now += 1
    ids = np.append(context.token_ids, 7)
    assert store.find(ids, KEEP_ALL, 101) is not None  # the oldest, used again
    store.add(Held(other(context, 3), KEEP_ALL, 0))
    assert len(store) == 3 and store.nbytes == 3 * size
    assert store.find(ids, KEEP_ALL, 101) is not None
    assert store.find(ids + 1, KEEP_ALL, 101) is None
    clock.now += 101
    assert store.find(ids, KEEP_ALL, 101) is None and len(store) == 0


def test_named_contexts_stay_and_what_has_no_room_beside_them_is_refused(context: Context) -> None:
    clock = Clock()
    size = Held(context, KEEP_ALL, 0).nbytes
    store = ContextStore(2 * size, 100.0, clock)
    store.add(Held(other(context, 1), KEEP_ALL, 0))
    store.add(Held(context, KEEP_ALL, 0, name="a"))
    store.add(Held(context, KEEP_ALL, 0, name="b"))
    assert [held.name for held in store.all_named()] == ["a", "b"] and len(store) == 2
    store.add(Held(other(context, 1), KEEP_ALL, 0))  # no room: not held, and no error
    with pytest.raises(CacheFullError, match="delete one"):
        store.add(Held(context, KEEP_ALL, 0, name="c"))
    clock.now += 1000
    assert store.named("a") is not None and store.named("c") is None


def test_a_context_is_cut_behind_its_head_only(context: Context) -> None:
    ids = np.append(context.token_ids[:60], [1, 2, 3])
    whole = Held(context, KEEP_ALL, 0).prefix_of(ids)
    assert whole is not None and (len(whole), whole.slots) == (60, (60,)) and whole.cache is context.cache
    assert Held(context, KEEP_ALL, 61).prefix_of(ids) is None
    assert len(Held(context, KEEP_ALL, 60).prefix_of(ids)) == 60
    last = Held(context, KEEP_ALL, 0).prefix_of(context.token_ids)
    assert last is not None and len(last) == 99  # an answer needs the logits behind one token
    assert Held(context, KEEP_ALL, 0).prefix_of(ids[:10]) is None  # too short to be worth a copy
