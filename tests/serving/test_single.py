"""Layout `single` on a real server: the library's own tokens, streams, bad input, overload, clients that go."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support.messages import naming
from tritonclient.utils import InferenceServerException

from chunkkv import SamplingParams

from .server import GrpcStream, sse, tensor, text_request, wait_for

LONG = {"text_input": "the access code", "max_tokens": 30_000, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(servers):
    return servers("--slots", "8", "--waiting", "16")


def idle(server) -> bool:
    return server.metric("chunkkv_requests") == 0


CASES = [
    {},
    {"keep_ratio": 0.2},
    {"budget_tokens": 300},
    {"temperature": 0.7, "seed": 11},
    {"temperature": 1.3, "top_k": 7, "top_p": 0.9, "seed": 2**40, "keep_ratio": 0.5},
    {"repetition_penalty": 1.2, "max_tokens": 30, "ignore_eos": True},
    {"stop_words": ["9", "6"], "ignore_eos": True},
    {"seed": 5, "temperature": 0.9, "ignore_eos": True, "max_tokens": 40},
]


def own_answer(session, text: str, case: dict):
    """Ask the library what the server was asked."""
    named = {"max_tokens": "max_new_tokens", "stop_words": "stop"}
    budget = {name: case[name] for name in ("keep_ratio", "budget_tokens") if name in case}
    rest = {named.get(name, name): value for name, value in case.items() if name not in budget}
    return session.generate(text, SamplingParams(**{"max_new_tokens": 12, **rest}), **budget)


@pytest.mark.parametrize("case", CASES, ids=json.dumps)
def test_the_answer_is_the_librarys_own(server, session, document, case) -> None:
    status, answer = server.generate({"text_input": document, "max_tokens": 12, **case})
    own = own_answer(session, document, case)
    assert status == 200, answer
    assert (answer["text_output"], tuple(np.atleast_1d(answer["output_ids"]))) == (own.text, own.token_ids)
    costs = own.statistics
    assert answer["finish_reason"] == own.finish_reason
    assert (answer["num_input_tokens"], answer["kept_tokens"]) == (costs.prompt_tokens, costs.kept_tokens)
    assert (answer["num_output_tokens"], answer["kv_cache_bytes"]) == (costs.new_tokens, costs.cache_bytes)
    assert 0 < answer["prefill_ms"] <= answer["ttft_ms"]


def test_many_at_once_get_what_each_alone_gets(server, session, short) -> None:
    cases = [{"seed": n, "temperature": 0.9, "max_tokens": 20 + n, "ignore_eos": True} for n in range(20)]
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda case: server.generate({"text_input": short, **case})[1], cases))
    for case, answer in zip(cases, answers, strict=True):
        assert tuple(answer["output_ids"]) == own_answer(session, short, case).token_ids


def test_server_sent_events_are_the_text_in_pieces(server, session, short) -> None:
    events = server.stream({"text_input": short, "max_tokens": 30, "ignore_eos": True})
    own = own_answer(session, short, {"max_tokens": 30, "ignore_eos": True})
    assert len(events) > 10 and "".join(event["text_output"] for event in events) == own.text
    ids = [token for event in events for token in np.atleast_1d(event["output_ids"])]
    assert tuple(ids) == own.token_ids
    assert [event.get("finish_reason") for event in events] == [None] * (len(events) - 1) + ["length"]


def test_grpc_streaming(server, session, short) -> None:
    stream = GrpcStream(server, [*text_request(short, 10), tensor("keep_ratio", [0.5], "FP32")], request_id="grpc-1")
    results = stream.all()
    stream.close()
    own = own_answer(session, short, {"max_tokens": 10, "keep_ratio": 0.5})
    pieces = [result.as_numpy("text_output") for result in results]
    assert b"".join(piece[0, 0] for piece in pieces if piece is not None).decode() == own.text
    (done,) = wait_for(lambda: [e for e in server.events("request_done") if e["request_id"] == "grpc-1"])
    assert (done["new_tokens"], done["kept_tokens"]) == (len(own.token_ids), own.statistics.kept_tokens)
    assert done["ttft_ms"] <= done["total_ms"]


def test_the_prompt_is_repeated_where_asked_for(server, short) -> None:
    _, plain = server.generate({"text_input": short, "max_tokens": 6})
    _, echoed = server.generate({"text_input": short, "max_tokens": 6, "exclude_input_in_output": False})
    assert echoed["text_output"] == short + plain["text_output"]


BAD = [
    ({}, 400, "missing required input"),
    ({"text_input": ""}, 400, "CHUNKKV_INVALID: prompt 0 is empty"),
    ({"text_input": ["a", "b"]}, 400, "batch-size must be <= 1"),
    ({"text_input": 5}, 500, "attempt to access JSON non-string"),
    ({"text_input": "a", "max_tokens": "x"}, 500, "Unable to parse 'data'"),
    ({"text_input": "a", "max_tokens": 0}, 400, "max_new_tokens is 0"),
    ({"text_input": "a", "max_tokens": -3}, 400, "max_new_tokens is -3"),
    ({"text_input": "a", "max_tokens": 3_000_000_000}, 400, "max_new_tokens is -1294967296"),
    ({"text_input": "a", "max_tokens": 1_000_000}, 400, "this engine takes at most 32768"),
    ({"text_input": "a", "temperature": -1}, 400, "temperature is -1"),
    ({"text_input": "a", "top_p": 1.5}, 400, "top_p is 1.5"),
    ({"text_input": "a", "top_k": -1}, 400, "top_k is -1"),
    ({"text_input": "a", "keep_ratio": 1.5}, 400, "keep_ratio is 1.5"),
    ({"text_input": "a", "keep_ratio": 0.5, "budget_tokens": 9}, 400, "give one of them"),
    ({"text_input": "a", "budget_tokens": -1}, 400, "budget_tokens is -1"),
    ({"text_input": "a", "seed": -1}, 500, "Unable to parse 'data'"),
    ({"text_input": "a", "beam_width": 4}, 400, "beam_width is 4; this engine does not have it"),
    ({"text_input": "a", "presence_penalty": 500.0}, 400, "presence_penalty is 500"),
    ({"text_input": "a", "bad_words": ["b"]}, 400, "cannot forbid words"),
    ({"text_input": "a", "end_id": 77}, 400, "end_id is 77"),
    ({"text_input": "a", "keep_ration": 0.5}, 400, "there is no input 'keep_ration'; known are"),
    ({"text_input": "word " * 3000, "max_tokens": 1}, 400, "this engine takes at most 2048"),
    ({"text_input": "x" * 10_000_000}, 400, "text_input has 10000000 bytes; this server takes at most"),
    (b"{", 500, "failed to parse the request JSON buffer"),
    (b'{"text_input": "\xff\xfe"}', 400, "text_input is not UTF-8 text: byte 0xff at 0"),
]


@pytest.mark.parametrize(("body", "status", "named"), BAD, ids=[str(body)[:60] for body, *_ in BAD])
def test_bad_input_is_refused_by_name(server, body, status, named) -> None:
    got, answer = server.generate(body)
    assert got == status and re.search(named, answer["error"]), answer


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ([tensor("text_input", [b"a"], "BYTES"), tensor("temperature", [np.nan], "FP32")], "temperature nan"),
        ([tensor("text_input", [b"a"], "BYTES"), tensor("keep_ratio", [np.nan], "FP32")], "keep_ratio nan"),
        ([tensor("text_input", [b"caf\xe9"], "BYTES")], "text_input UTF-8 0xe9 3"),
        ([tensor("text_input", [b"a"], "BYTES"), tensor("stop_words", [b"\xff"], "BYTES")], "stop_words UTF-8"),
        ([tensor("text_input", [b"a"], "BYTES"), tensor("max_tokens", [1.5], "FP32")], "max_tokens"),
        ([tensor("text_input", [b"a"], "BYTES"), tensor("max_tokens", [1, 2], "INT32")], "max_tokens"),
        ([tensor("max_tokens", [1], "INT32")], "text_input"),
        ([tensor("text_input", [b"a"], "BYTES"), tensor("nothing", [1], "INT32")], "nothing"),
        ([tensor("text_input", [b"a"], "BYTES"), tensor("seed", [2**63], "UINT64")], "seed 9223372036854775808"),
    ],
)
def test_bad_tensors_are_refused_by_name(server, inputs, named) -> None:
    stream = GrpcStream(server, inputs)
    with pytest.raises(InferenceServerException, match=naming(named)):
        stream.all()
    stream.close()


def test_an_unknown_model_is_not_found(server) -> None:
    assert server.generate({"text_input": "a"}, "nothing")[0] == 404


def test_refusals_are_counted_and_nothing_stays(server) -> None:
    before = server.metric("chunkkv_requests_total", outcome="invalid")
    server.generate({"text_input": ""})
    wait_for(lambda: server.metric("chunkkv_requests_total", outcome="invalid") == before + 1)
    assert wait_for(lambda: idle(server)) and server.metric("chunkkv_kv_cache_bytes", kind="used") == 0


def test_more_than_fits_is_rejected_and_the_rest_is_served(server, short) -> None:
    """60 clients at once on 8 slots and 16 places to wait: every one gets an answer or is told to come again."""
    body = {"text_input": short, "max_tokens": 400, "ignore_eos": True}
    barrier = threading.Barrier(60)

    def ask(_: int):
        barrier.wait()
        return server.generate(body)

    before = server.metric("chunkkv_requests_total", outcome="rejected")
    with ThreadPoolExecutor(60) as pool:
        answers = list(pool.map(ask, range(60)))
    served = [answer for status, answer in answers if status == 200]
    refused = [answer for status, answer in answers if status == 400]
    assert len(served) + len(refused) == 60 and len(served) >= 24 and refused
    assert all(answer["num_output_tokens"] == 400 for answer in served)
    assert all(answer["error"].startswith("CHUNKKV_OVERLOADED: the queue is full") for answer in refused)
    assert wait_for(lambda: server.metric("chunkkv_requests_total", outcome="rejected") == before + len(refused))


def test_a_client_that_hangs_up_is_cancelled(server) -> None:
    before = server.metric("chunkkv_requests_total", outcome="cancelled")
    response = server.open_stream(LONG)
    next(sse(response))
    wait_for(lambda: server.metric("chunkkv_requests", state="active") == 1)
    used = server.metric("chunkkv_kv_cache_bytes", kind="used")
    assert 0 < used <= server.metric("chunkkv_kv_cache_bytes", kind="allocated")
    response.fp.raw._sock.shutdown(socket.SHUT_RDWR)
    response.close()
    wait_for(lambda: server.metric("chunkkv_requests_total", outcome="cancelled") == before + 1, 5)
    assert wait_for(lambda: idle(server), 5)


def test_a_grpc_client_that_cancels(server) -> None:
    before = server.metric("chunkkv_requests_total", outcome="cancelled")
    stream = GrpcStream(server, [*text_request("the access code", 30_000), tensor("ignore_eos", [True], "BOOL")])
    stream.next()
    stream.close(cancel=True)
    wait_for(lambda: server.metric("chunkkv_requests_total", outcome="cancelled") == before + 1, 5)
    assert wait_for(lambda: idle(server), 5)


def test_a_client_that_does_not_read_holds_up_nobody(server, short) -> None:
    slow = socket.create_connection(("127.0.0.1", server.http))
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    body = json.dumps({**LONG, "max_tokens": 4000, "stream": True}).encode()
    head = f"POST /v2/models/chunkkv/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    slow.sendall(head.encode() + body)
    wait_for(lambda: server.metric("chunkkv_requests", state="active") == 1)
    started = time.monotonic()
    assert server.generate({"text_input": short, "max_tokens": 6})[0] == 200
    assert time.monotonic() - started < 5
    assert wait_for(lambda: idle(server), 30), "its answer ends at its own length"
    slow.close()


def test_metrics_add_up(server, short) -> None:
    names = ("chunkkv_prompt_tokens_total", "chunkkv_kept_tokens_total", "chunkkv_generated_tokens_total")
    names += ("chunkkv_ttft_seconds_count", "chunkkv_tpot_seconds_count")
    before = [server.metric(name) for name in names]
    _, answer = server.generate({"text_input": short, "max_tokens": 6, "keep_ratio": 0.5, "ignore_eos": True})
    expected = [answer["num_input_tokens"], answer["kept_tokens"], 6, 1, 1]
    wait_for(lambda: [server.metric(name) - old for name, old in zip(names, before, strict=True)] == expected)
