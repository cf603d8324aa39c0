"""The server's answers: those of the session, in OpenAI's shapes; errors by field; keys, sizes, overload, leaving."""

from __future__ import annotations

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support import needle_engine
from support.http_server import ServedEngine, served

from chunkkv import ChunkKVSession, SamplingParams
from chunkkv.batching import BatchingLimits
from chunkkv.executors.onnxruntime.graphs import OnnxRuntimeStep
from chunkkv.serve.bodies import chat_ask, completion_ask
from chunkkv.serve.errors import api_error
from chunkkv.serve.service import ServiceLimits

PROSE = "The access code of the vault is 7 3 9. The keeper of the desk is clara. " * 8
TEXT = PROSE + "The access code of the vault is"
GREEDY = {"temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def session() -> ChunkKVSession:
    return needle_engine.session()


@pytest.fixture(scope="module")
def engine(session: ChunkKVSession):
    with served(session) as made:
        yield made


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def test_a_completion_is_the_sessions_answer(engine: ServedEngine, session: ChunkKVSession) -> None:
    expected = session.generate(TEXT, SamplingParams(max_new_tokens=8), keep_ratio=0.5)
    reply = engine.post("/v1/completions", prompt=TEXT, keep_ratio=0.5, cache_prompt=False, **GREEDY).json()
    (choice,) = reply["choices"]
    assert (choice["text"], choice["finish_reason"]) == (expected.text, expected.finish_reason)
    statistics = expected.statistics
    assert reply["usage"] == {
        "prompt_tokens": statistics.prompt_tokens,
        "completion_tokens": statistics.new_tokens,
        "total_tokens": statistics.prompt_tokens + statistics.new_tokens,
        "prompt_tokens_details": {"cached_tokens": 0, "kept_tokens": statistics.kept_tokens},
    }
    assert 0 < statistics.kept_tokens < statistics.prompt_tokens


def test_messages_go_through_the_template_once(engine: ServedEngine, session: ChunkKVSession) -> None:
    messages = chat(TEXT)
    expected = session.generate(messages, SamplingParams(max_new_tokens=8))
    reply = engine.post("/v1/chat/completions", messages=messages, cache_prompt=False, **GREEDY).json()
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": expected.text}
    ids = engine.post("/tokenize", messages=messages).json()["tokens"]
    assert ids == session.tokenizer.encode_chat(messages)
    assert ids.count(session.tokenizer.bos_token_id) == 1 and len(ids) == reply["usage"]["prompt_tokens"]
    rendered = session.tokenizer.apply_chat_template(messages)  # a client that renders by itself gets no second one
    assert engine.post("/tokenize", prompt=rendered).json()["tokens"] == ids


def test_a_stream_has_a_chunk_for_each_token_and_a_usage_at_its_end(engine: ServedEngine) -> None:
    body = {"messages": chat(TEXT), **GREEDY}
    whole = engine.post("/v1/chat/completions", **body).json()
    *lines, done = engine.events("/v1/chat/completions", **body, stream_options={"include_usage": True})
    *chunks, last = map(json.loads, lines)
    assert done == "[DONE]" and last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(chunks) == whole["usage"]["completion_tokens"]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert [delta.get("role") for delta in deltas] == ["assistant", *[None] * (len(deltas) - 1)]
    assert "".join(delta["content"] for delta in deltas) == whole["choices"][0]["message"]["content"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][:-1] == [None] * (len(chunks) - 1)
    assert {chunk["id"] for chunk in chunks} == {last["id"]} and "usage" not in chunks[0]


def test_several_prompts_and_answers_are_numbered(engine: ServedEngine, session: ChunkKVSession) -> None:
    ids = session.tokenizer.encode_prompt(TEXT)
    body = {"prompt": [ids, ids[:90]], "n": 2, "temperature": 1.0, "seed": 5, "max_tokens": 6, "ignore_eos": True}
    reply = engine.post("/v1/completions", **body).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    sampling = [SamplingParams(max_new_tokens=6, temperature=1.0, seed=5 + n, ignore_eos=True) for n in range(4)]
    expected = [session.generate(ids if n < 2 else ids[:90], sampling[n]).text for n in range(4)]
    assert [choice["text"] for choice in reply["choices"]] == expected
    assert reply["usage"]["prompt_tokens"] == len(ids) + 90 and reply["usage"]["completion_tokens"] == 24
    pieces = ["", "", "", ""]
    for line in engine.events("/v1/completions", **body)[:-1]:
        (choice,) = json.loads(line)["choices"]
        pieces[choice["index"]] += choice["text"]
    assert pieces == expected


def test_log_probabilities_are_those_of_the_model(engine: ServedEngine, session: ChunkKVSession) -> None:
    sampling = SamplingParams(max_new_tokens=8, logprobs=True, top_logprobs=2)
    expected = session.generate(chat(TEXT), sampling)
    body = {"messages": chat(TEXT), "logprobs": True, "top_logprobs": 2, "cache_prompt": False, **GREEDY}
    content = engine.post("/v1/chat/completions", **body).json()["choices"][0]["logprobs"]["content"]
    np.testing.assert_allclose([token["logprob"] for token in content], expected.logprobs, atol=1e-4)
    assert [len(token["top_logprobs"]) for token in content] == [2] * len(expected.token_ids)
    assert all(token["top_logprobs"][0]["token"] == token["token"] for token in content)  # greedy
    assert all(bytes(token["bytes"]).decode() == token["token"] for token in content)
    body = {"prompt": TEXT, "logprobs": 2, **GREEDY}
    old = engine.post("/v1/completions", **body).json()["choices"][0]["logprobs"]
    assert set(old) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert len({len(values) for values in old.values()}) == 1


def test_what_steers_tokens_is_obeyed(engine: ServedEngine, session: ChunkKVSession) -> None:
    plain = engine.post("/v1/completions", prompt=PROSE, **GREEDY, ignore_eos=True).json()["choices"][0]["text"]
    first = session.tokenizer.encode(plain, add_special_tokens=False)[0]
    barred = engine.post("/v1/completions", prompt=PROSE, logit_bias={str(first): -100}, **GREEDY).json()
    assert barred["choices"][0]["text"] != plain
    stop = plain.split()[1]
    stopped = engine.post("/v1/completions", prompt=PROSE, stop=[stop], ignore_eos=True, **GREEDY).json()["choices"][0]
    assert stopped["finish_reason"] == "stop" and stopped["text"] == plain[: plain.index(stop)]
    echoed = engine.post("/v1/completions", prompt=PROSE, echo=True, ignore_eos=True, **GREEDY).json()
    assert echoed["choices"][0]["text"] == PROSE + plain
    least = engine.post("/v1/completions", prompt=PROSE, temperature=0, max_tokens=40, min_tokens=40).json()
    assert least["usage"]["completion_tokens"] == 40
    for name, value in (("top_p", 1e-6), ("top_k", 1), ("min_p", 1.0)):
        reply = engine.post(
            "/v1/completions", prompt=PROSE, max_tokens=8, temperature=2.0, ignore_eos=True, **{name: value}
        )
        assert reply.json()["choices"][0]["text"] == plain, name
    penalised = engine.post("/v1/completions", prompt=PROSE, frequency_penalty=2, presence_penalty=2, **GREEDY)
    assert penalised.status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        ("completions", {}, "prompt", "missing"),
        ("completions", {"prompt": ""}, "prompt", "empty"),
        ("completions", {"prompt": [1, "a"]}, "prompt", "token ids"),
        ("completions", {"prompt": [4096]}, "prompt", "1023"),
        ("completions", {"prompt": "a", "temperature": -1}, "temperature", "0"),
        ("completions", {"prompt": "a", "temperature": "warm"}, "temperature", "number"),
        ("completions", {"prompt": "a", "top_p": 0}, "top_p", "(0, 1]"),
        ("completions", {"prompt": "a", "max_tokens": 0}, "max_tokens", "1"),
        ("completions", {"prompt": "a", "max_tokens": 9000}, "prompt", "lower max_tokens to 4094"),
        ("completions", {"prompt": "a", "min_tokens": 17}, "min_tokens", "16"),
        ("completions", {"prompt": "a", "n": 65}, "n", "64"),
        ("completions", {"prompt": ["a"] * 65}, "prompt", "64"),
        ("completions", {"prompt": "a", "best_of": 2}, "best_of", "n"),
        ("completions", {"prompt": "a", "logprobs": 21}, "logprobs", "20"),
        ("completions", {"prompt": "a", "logprobs": 1, "echo": True}, "logprobs", "echo"),
        ("completions", {"prompt": "a", "keep_ratio": 1.5}, "keep_ratio", "(0, 1]"),
        ("completions", {"prompt": "a", "keep_ratio": 0.5, "budget_tokens": 4}, "keep_ratio", "one"),
        ("completions", {"prompt": "a", "scorer": "best"}, "scorer", "window"),
        ("completions", {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "'x'"),
        ("completions", {"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias", "100"),
        ("completions", {"prompt": "a", "logit_bias": {"1024": 1}}, "logit_bias", "1023"),
        ("completions", {"prompt": "a", "use_beam_search": True}, "use_beam_search", "false"),
        ("completions", {"prompt": "a", "temprature": 1}, "temprature", "temperature"),
        ("completions", {"prompt": "a", "stream_options": {"usage": True}}, "stream_options.usage", "include_usage"),
        ("completions", {"prompt": "a", "context": "none"}, "context", "POST"),
        ("completions", {"prompt": "a", "context": "x", "keep_ratio": 0.5}, "context", "own"),
        ("completions", {"prompt": "a", "model": "gpt"}, "model", "needle"),
        ("chat/completions", {}, "messages", "missing"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content", "string"),
        ("chat/completions", {"messages": [{"content": "a"}]}, "messages[0].role", "user"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, "image_url"),
        ("chat/completions", {"messages": chat("a"), "tools": [{}]}, "tools", "leave"),
        ("chat/completions", {"messages": chat("a"), "top_logprobs": 2}, "top_logprobs", "logprobs"),
        ("chat/completions", {"messages": chat("a"), "seed": 0.5}, "seed", "whole"),
        ("contexts", {}, "document", "one"),
        ("contexts", {"document": "a b", "id": "/"}, "id", "letters"),
        ("contexts", {"document": " "}, "document", "word"),
    ],
)
def test_a_wrong_field_is_named(engine: ServedEngine, path: str, body: dict, param: str | None, says: str) -> None:
    response = engine.post(f"/v1/{path}", **body)
    error = response.json()["error"]
    assert response.status_code == (404 if param == "model" or "POST" in says else 400), error
    assert error["type"] in ("invalid_request_error", "not_found_error") and says in error["message"]
    assert error["param"] == param or (param is None and error["param"])


ODD = (None, True, -1, 0, 1.5, 1e30, 10**400, "x", "\ud800", [], [None], {}, {"x": 1}, {"\ud800": [[]]})
FIELDS = """add_special_tokens best_of budget_tokens cache_prompt context echo frequency_penalty functions ignore_eos
    keep_ratio logit_bias logprobs max_completion_tokens max_tokens messages metadata min_p min_tokens model n
    presence_penalty prompt repetition_penalty response_format scorer seed stop stop_token_ids stream_options suffix
    temperature tools top_k top_logprobs top_p use_beam_search user \ud800"""


@pytest.mark.parametrize(("read", "plain"), [(completion_ask, {"prompt": "a"}), (chat_ask, {"messages": chat("a")})])
@pytest.mark.parametrize("name", FIELDS.split(), ids=ascii)
def test_no_value_of_a_field_is_the_servers_fault(read, plain: dict, name: str) -> None:
    for value in ODD:
        try:
            read({**plain, name: value}, "needle").params(4, 1)
        except Exception as error:
            refused = api_error(error)
            assert refused.status in (400, 404) and json.dumps(refused.body(), ensure_ascii=False).encode(), value


def test_a_body_that_is_no_json_object_is_refused(engine: ServedEngine) -> None:
    for data in (b"", b"{", b"[]", b'{"prompt": NaN}', b"[" * 100_000, b"\xff"):
        response = engine.client.post("/v1/completions", content=data, headers={"Content-Type": "application/json"})
        assert response.status_code == 400, data[:20]
    assert engine.client.post("/v1/completions", data={"prompt": "a"}).status_code == 415
    assert engine.client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"


def test_keys_and_sizes_are_checked_before_any_work(session: ChunkKVSession) -> None:
    key = "0123456789abcdef"
    limits = ServiceLimits(max_body_bytes=2000)
    with served(session, limits, keys=("f" * 16, key)) as engine:
        body = {"prompt": "a", "max_tokens": 2}
        engine.client.headers["Authorization"] = f"Bearer {key}"
        assert engine.post("/v1/completions", **body).status_code == 200
        large = engine.post("/v1/completions", prompt="a" * 3000)
        assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
        parts = (b'{"prompt": "' + b"a" * 500 for _ in range(9))  # no length is told
        unsized = engine.client.post("/v1/completions", content=parts, headers={"Content-Type": "application/json"})
        assert unsized.status_code == 413
        for value in ("", "Bearer", f"Bearer {key}x", f"Basic {key}"):
            refused = engine.client.post("/v1/completions", json=body, headers={"Authorization": value})
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        assert engine.client.get("/metrics", headers={"Authorization": ""}).status_code == 401
        assert engine.client.get("/health", headers={"Authorization": ""}).status_code == 200


def test_overload_is_429_and_the_queues_timeout_503_with_a_time_to_try_again(session: ChunkKVSession) -> None:
    batching = BatchingLimits(slots=1, waiting=1, queue_timeout_s=0.3, kv_bytes=10**8)
    with served(session, batching=batching) as engine:
        long = {"prompt": "a b c", "max_tokens": 3000, "ignore_eos": True}
        with engine.client.stream("POST", "/v1/completions", json={**long, "stream": True}) as running:
            lines = running.iter_lines()
            next(lines)
            waiting = threading.Thread(target=lambda: replies.append(engine.post("/v1/completions", **long)))
            replies: list = []
            waiting.start()
            engine.wait_until(lambda load: load.waiting == 1)
            full = engine.post("/v1/completions", **long)
            assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
            assert int(full.headers["retry-after"]) >= 1
            waiting.join()
        assert (replies[0].status_code, replies[0].json()["error"]["code"]) == (503, "timeout")
        assert int(replies[0].headers["retry-after"]) >= 1
        page = engine.client.get("/metrics").text
        assert 'chunkkv_requests_total{outcome="rejected"} 1.0' in page
        assert 'chunkkv_requests_total{outcome="timeout"} 1.0' in page


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_seat_at_once(engine: ServedEngine, stream: bool) -> None:
    body = json.dumps({"prompt": "a b c", "max_tokens": 4000, "ignore_eos": True, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection(("127.0.0.1", engine.server.port)) as client:
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        if stream:
            assert b"200" in client.recv(100)
        engine.wait_until(lambda load: load.active == 1)
    engine.wait_until(lambda load: load.active == 0)
    assert 'outcome="cancelled"} 0.0' not in engine.client.get("/metrics").text or stream


def test_a_server_that_stops_lets_open_requests_end(session: ChunkKVSession) -> None:
    with served(session) as engine:
        body = {"prompt": "a b c", "max_tokens": 200, "ignore_eos": True, "stream": True}
        with engine.client.stream("POST", "/v1/completions", json=body) as running:
            lines = running.iter_lines()
            next(lines)
            engine.server.stop()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and len(rest) >= 199
        engine.server.wait()
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", engine.server.port), timeout=2)


def test_a_server_that_ends_within_a_block_tells_its_clients(session: ChunkKVSession, monkeypatch) -> None:
    monkeypatch.setattr("chunkkv.serve.server._ERRORS_S", -4)  # one second in all
    came, go_on, append = threading.Event(), threading.Event(), OnnxRuntimeStep.append_block

    def block(self, *args, **named):
        came.set()
        assert go_on.wait(30)
        return append(self, *args, **named)

    monkeypatch.setattr(OnnxRuntimeStep, "append_block", block)
    with served(session) as engine, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(lambda: engine.post("/v1/completions", prompt=TEXT, **GREEDY))
        assert came.wait(30)
        engine.server.stop()
        reply = asked.result(30)
        go_on.set()
    assert reply.status_code == 503 and reply.json()["error"]["code"] == "closing"
    assert "retry-after" in reply.headers


def test_tokens_go_there_and_back(engine: ServedEngine, session: ChunkKVSession) -> None:
    reply = engine.post("/tokenize", prompt=TEXT, add_special_tokens=False).json()
    assert reply["tokens"] == session.tokenizer.encode(TEXT, add_special_tokens=False)
    assert reply["count"] == len(reply["tokens"]) and reply["max_model_len"] == session.limits.max_seq_len
    text = engine.post("/detokenize", tokens=reply["tokens"]).json()["prompt"]
    assert text == session.tokenizer.decode(reply["tokens"], skip_special_tokens=False)
    for token in ("a", -1, 1024, 1.5, True, None, 2**70):
        error = engine.post("/detokenize", tokens=[5, token]).json()["error"]
        assert error["param"] == "tokens" and "tokens[1]" in error["message"] and "1023" in error["message"], error
    assert engine.client.get("/v1/models/needle").json()["id"] == "needle"
    assert engine.client.get("/v1/models/other").status_code == 404
