"""Layout `trtllm` on a real server: TensorRT-LLM's names, the library's own tokens, and where a cancel arrives."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
from support.messages import naming
from tritonclient.utils import InferenceServerException

from .server import GrpcStream, gone, sse, tensor, text_request, wait_for
from .test_single import own_answer

LONG = {"text_input": "the access code", "max_tokens": 20_000, "ignore_eos": True}
TEXT_MODELS = ("ensemble", "tensorrt_llm_bls")
CASES = [
    {},
    {"keep_ratio": 0.2},
    {"budget_tokens": 300},
    {"temperature": 0.9, "top_k": 9, "top_p": 0.9, "seed": 4},
    {"repetition_penalty": 1.3},
    {"stop_words": ["9", "6"]},
]


@pytest.fixture(scope="module")
def server(servers):
    return servers("--layout", "trtllm")


@pytest.mark.parametrize("model", TEXT_MODELS)
@pytest.mark.parametrize("case", CASES, ids=json.dumps)
def test_the_answer_is_the_librarys_own(server, session, document, case, model) -> None:
    status, answer = server.generate({"text_input": document, "max_tokens": 12, **case}, model)
    own = own_answer(session, document, case)
    assert status == 200, answer
    assert (answer["text_output"], answer["num_output_tokens"]) == (own.text, len(own.token_ids))
    costs = own.statistics
    assert (answer["num_input_tokens"], answer["kept_tokens"]) == (costs.prompt_tokens, costs.kept_tokens)
    assert answer["finish_reason"] == own.finish_reason


@pytest.mark.parametrize("model", TEXT_MODELS)
def test_streams(server, session, short, model) -> None:
    sampled = {"max_tokens": 10, "temperature": 1.1, "top_p": 1.0, "seed": 3}
    events = server.stream({"text_input": short, **sampled}, model)
    own = own_answer(session, short, sampled)
    assert "".join(event["text_output"] for event in events) == own.text
    assert events[-1]["finish_reason"] == own.finish_reason and len(events) > 2


def ids_request(ids: list[int], new: int, **more) -> list:
    """Return the tensors that TensorRT-LLM clients send to tensorrt_llm."""
    inputs = [tensor("input_ids", ids, "INT32"), tensor("input_lengths", [len(ids)], "INT32")]
    inputs.append(tensor("request_output_len", [new], "INT32"))
    kinds = {float: "FP32", int: "INT32", bool: "BOOL"}
    for name, value in more.items():
        kind = "UINT64" if name == "seed" else kinds.get(type(value), "INT32")
        inputs.append(tensor(name, value if isinstance(value, list) else [value], kind))
    return inputs


def test_token_ids_in_and_out(server, session, short) -> None:
    ids = session.tokenizer.encode(short)
    asked = ids_request(ids, 20, streaming=True, temperature=0.8, runtime_top_k=40, seed=9)
    stream = GrpcStream(server, asked, "tensorrt_llm", "direct")
    results = stream.all()
    stream.close()
    own = own_answer(session, short, {"max_tokens": 20, "temperature": 0.8, "top_k": 40, "seed": 9})
    pieces = [result.as_numpy("output_ids") for result in results]
    assert tuple(int(t) for piece in pieces if piece is not None for t in piece[0, 0]) == own.token_ids
    lengths = [
        result.as_numpy("sequence_length")[0, 0] for result in results if result.as_numpy("output_ids") is not None
    ]
    assert lengths == [piece.shape[-1] for piece in pieces if piece is not None]


def test_the_input_comes_back_where_asked_for(server, session, short) -> None:
    ids = session.tokenizer.encode(short)
    stream = GrpcStream(server, ids_request(ids, 5, exclude_input_in_output=False), "tensorrt_llm")
    (result, *_) = stream.all()
    stream.close()
    assert result.as_numpy("output_ids")[0, 0].tolist()[: len(ids)] == ids


def test_stop_words_as_ids(server, session, document) -> None:
    ids = session.tokenizer.encode(document)
    plain = session.generate(document, None).text
    word = session.tokenizer.encode(plain[-1], add_special_tokens=False)
    words = np.array([[word, list(range(1, len(word) + 1))[-1:] + [-1] * (len(word) - 1)]], np.int32)
    stream = GrpcStream(server, [*ids_request(ids, 20), tensor("stop_words_list", words, "INT32")], "tensorrt_llm")
    (result, *_) = stream.all()
    stream.close()
    assert result.as_numpy("chunkkv_text")[0, 0].decode() == plain[: plain.index(plain[-1])]


def active(server) -> float:
    return server.metric("chunkkv_requests", state="active")


def test_a_stop_request_ends_the_one_of_its_id(server) -> None:
    stream = GrpcStream(server, ids_request([1, 5, 9], 20_000, streaming=True, ignore_eos=True), "tensorrt_llm", "it")
    stream.next()
    stop = GrpcStream(server, ids_request([1], 1, stop=True), "tensorrt_llm", "it")
    stop.all()
    stop.close()
    last = [result for result in stream.all() if result.as_numpy("finish_reason") is not None][-1]
    assert last.as_numpy("finish_reason")[0, 0] == b"cancelled"
    stream.close()
    wait_for(lambda: active(server) == 0, 5)


def test_a_client_that_leaves_is_noticed_through_bls(server) -> None:
    before = server.metric("chunkkv_requests_total", outcome="cancelled")
    response = server.open_stream(LONG, "tensorrt_llm_bls")
    next(sse(response))
    response.fp.raw._sock.shutdown(socket.SHUT_RDWR)
    response.close()
    wait_for(lambda: server.metric("chunkkv_requests_total", outcome="cancelled") == before + 1, 5)
    wait_for(lambda: active(server) == 0, 5)


def test_a_client_that_leaves_is_noticed_through_the_ensemble(server) -> None:
    """Triton cancels the step after the engine's, which tells the engine; another stream goes on."""
    before = server.metric("chunkkv_requests_total", outcome="cancelled")
    stays = sse(server.open_stream({**LONG, "max_tokens": 3000}, "ensemble"))
    next(stays)
    response = server.open_stream(LONG, "ensemble")
    next(sse(response))
    response.fp.raw._sock.shutdown(socket.SHUT_RDWR)
    response.close()
    wait_for(lambda: server.metric("chunkkv_requests_total", outcome="cancelled") == before + 1, 5)
    assert [event["finish_reason"] for event in stays][-1] == "length"
    wait_for(lambda: active(server) == 0, 5)


def test_a_client_of_bls_that_leaves_before_its_answer_is_noticed_and_no_other_with_its_id(server) -> None:
    """Without a stream there is no response at which to notice; both clients chose the same id."""
    before = server.metric("chunkkv_requests_total", outcome="cancelled")
    stays = server.open_stream({**LONG, "max_tokens": 3000, "id": "same"}, "tensorrt_llm_bls")
    events = sse(stays)
    next(events)
    sampled = [tensor("top_p", [1.0], "FP32"), tensor("seed", [1], "UINT64")]
    leaves = GrpcStream(
        server, [*text_request("the access code", 20_000, stream=False), *sampled], "tensorrt_llm_bls", "same"
    )
    wait_for(lambda: active(server) == 2)
    leaves.close(cancel=True)
    wait_for(lambda: server.metric("chunkkv_requests_total", outcome="cancelled") == before + 1, 5)
    assert [event["finish_reason"] for event in events][-1] in ("length", "stop")


# What the OpenAI frontend of Triton sends for a chat to a model that is not vLLM's (python/openai, r25.05).
FRONTEND = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "top_p": 1.0, "temperature": 0.0, "seed": 7}


@pytest.mark.parametrize("model", TEXT_MODELS)
def test_tritons_openai_frontend_is_served(server, session, short, model) -> None:
    """Its usage is the sum of the counts of all responses, of which it reads the first value as INT32."""
    own = own_answer(session, short, {"max_tokens": 10})
    kinds = {"seed": "UINT64"}
    inputs = [
        *text_request(short, 10),
        *(tensor(name, [value], kinds.get(name, "FP32")) for name, value in FRONTEND.items()),
        *(tensor(name, [True], "BOOL") for name in ("exclude_input_in_output", "return_num_input_tokens")),
        tensor("return_num_output_tokens", [True], "BOOL"),
    ]
    stream = GrpcStream(server, inputs, model)
    results = [result for result in stream.all() if result.as_numpy("text_output") is not None]
    stream.close()
    assert "".join(result.as_numpy("text_output").reshape(-1)[0].decode() for result in results) == own.text
    counts = [result.as_numpy("num_output_tokens") for result in results]
    assert {count.dtype for count in counts} == {np.dtype(np.int32)} and len(counts) > 2
    assert sum(int(count[0, 0]) for count in counts) == len(own.token_ids)
    assert results[-1].as_numpy("num_input_tokens")[0, 0] == own.statistics.prompt_tokens


SAMPLING = [  # what a client of TensorRT-LLM asks, and what that is in SamplingParams
    ({"temperature": 1.5}, {}),
    ({"top_k": 5}, {"temperature": 1.0, "top_k": 5, "seed": 0}),
    ({"top_p": 0.9, "seed": 2}, {"temperature": 1.0, "top_p": 0.9, "seed": 2}),
    ({"top_k": 4, "top_p": 0.0, "temperature": 2.0}, {"temperature": 2.0, "top_k": 4, "seed": 0}),
    ({"temperature": 0.0, "top_k": 50}, {}),
    (
        {"temperature": 2.0, "top_k": 50, "presence_penalty": 0.5, "frequency_penalty": 0.25},
        {"temperature": 2.0, "top_k": 50, "seed": 0, "penalise_prompt": True}
        | {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    ),
]


@pytest.mark.parametrize("model", TEXT_MODELS)
@pytest.mark.parametrize(("asked", "means"), SAMPLING, ids=[json.dumps(asked) for asked, _ in SAMPLING])
def test_sampling_is_read_as_tensorrt_llm_reads_it(server, session, document, asked, means, model) -> None:
    more = {"max_tokens": 16, "ignore_eos": True}  # behind its end the model is sure of nothing
    status, answer = server.generate({"text_input": document, **more, **asked}, model)
    assert status == 200, answer
    assert answer["text_output"] == own_answer(session, document, {**more, **means}).text


LOG_PROBS = ("cum_log_probs", "output_log_probs")
ABSENT = (*LOG_PROBS, "context_logits", "generation_logits", "kv_cache_reused_blocks")
SWITCHES = ("return_log_probs", "return_context_logits", "return_generation_logits", "return_perf_metrics")


@pytest.mark.parametrize("model", TEXT_MODELS)
def test_a_client_may_list_outputs_that_it_does_not_ask_for(server, session, short, model) -> None:
    """Clients of TensorRT-LLM send the switches for these outputs as false, and list the outputs all the same."""
    inputs = [*text_request(short, 8), *(tensor(name, [False], "BOOL") for name in SWITCHES)]
    stream = GrpcStream(server, inputs, model, outputs=["text_output", *ABSENT])
    results = [result for result in stream.all() if result.as_numpy("text_output") is not None]
    stream.close()
    text = b"".join(result.as_numpy("text_output").reshape(-1)[0] for result in results).decode()
    assert text == own_answer(session, short, {"max_tokens": 8}).text
    assert [name for name in ABSENT for result in results if result.as_numpy(name) is not None] == []


@pytest.mark.parametrize("model", TEXT_MODELS)
def test_log_probabilities_are_the_librarys(server, session, short, model) -> None:
    inputs = [*text_request(short, 8), tensor("return_log_probs", [True], "BOOL")]
    stream = GrpcStream(server, inputs, model, outputs=["text_output", *LOG_PROBS, "num_output_tokens"])
    results = [result for result in stream.all() if result.as_numpy("text_output") is not None]
    stream.close()
    own = own_answer(session, short, {"max_tokens": 8, "logprobs": True}).logprobs
    found = [result.as_numpy("output_log_probs") for result in results]
    assert all(each.shape[:2] == (1, 1) for each in found)
    assert all(result.as_numpy("num_output_tokens").shape == (1, 1) for result in results)
    np.testing.assert_allclose(np.concatenate(found, axis=2)[0, 0], own, atol=1e-5)
    assert results[-1].as_numpy("cum_log_probs").shape == (1, 1)
    np.testing.assert_allclose(results[-1].as_numpy("cum_log_probs")[0, 0], sum(own), atol=1e-4)


@pytest.mark.parametrize("model", TEXT_MODELS)
@pytest.mark.parametrize("switch", SWITCHES[1:])
def test_asking_for_an_output_that_is_not_there_is_refused(server, switch, model) -> None:
    status, answer = server.generate({"text_input": "a", "max_tokens": 2, switch: True}, model)
    assert status == 400 and f"{switch} is True; this engine does not have it" in answer["error"]


def test_bls_serves_more_than_a_few_at_once(server) -> None:
    """Twenty streams grow together through one process."""
    streams = [GrpcStream(server, text_request("the access code", 3000), "tensorrt_llm_bls") for _ in range(20)]
    for stream in streams:
        stream.next()
    wait_for(lambda: active(server) == 20)
    for stream in streams:
        stream.close(cancel=True)
    wait_for(lambda: active(server) == 0)


BAD = [
    ({"text_input": "a"}, "missing required input"),
    ({"text_input": "", "max_tokens": 4}, "prompt 0 is empty"),
    ({"text_input": "a", "max_tokens": 0}, "max_new_tokens is 0"),
    ({"text_input": "a", "max_tokens": 4, "temperature": -1}, "temperature is -1"),
    ({"text_input": "a", "max_tokens": 4, "keep_ratio": 7}, "keep_ratio is 7"),
    ({"text_input": "a", "max_tokens": 4, "beam_width": 2}, "beam_width is 2"),
    ({"text_input": "a", "max_tokens": 4, "bad_words": ["b"]}, "bad_words"),
    ({"text_input": "a", "max_tokens": 4, "end_id": 507}, "end_id is 507"),
    ({"text_input": "word " * 3000, "max_tokens": 1}, "this engine takes at most 2048"),
    ({"text_input": "x" * 10_000_000, "max_tokens": 1}, "has 10000000 bytes"),
]


@pytest.mark.parametrize("model", TEXT_MODELS)
@pytest.mark.parametrize(("body", "named"), BAD, ids=[str(body)[:60] for body, _ in BAD])
def test_bad_input_is_refused_by_name(server, model, body, named) -> None:
    status, answer = server.generate(body, model)
    assert status == 400 and re.search(named, answer["error"]), answer


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"input_ids": [5, 1024]}, "token 1024 position 1"),
        ({"input_ids": [5], "input_lengths": [9]}, "input_lengths 9 input_ids 1"),
        ({"stop_words_list": np.array([[[5, 6], [3, -1]]])}, "stop_words_list"),
        ({"bad_words_list": np.array([[[5], [1]]])}, "bad_words_list"),
    ],
)
def test_bad_ids_are_refused_by_name(server, more, named) -> None:
    values = {"input_ids": [1, 2], "request_output_len": [3], **more}
    values.setdefault("input_lengths", [len(values["input_ids"])])
    stream = GrpcStream(server, [tensor(name, value, "INT32") for name, value in values.items()], "tensorrt_llm")
    with pytest.raises(InferenceServerException, match=naming(named)):
        stream.all()
    stream.close()


def test_what_knocks_at_the_engines_door_with_nonsense_harms_nobody(server) -> None:
    names = [line.rsplit(" ", 1)[1] for line in Path("/proc/net/unix").read_text().splitlines() if " @" in line]
    (name,) = {name[1:] for name in names if name.endswith(f"-{server.server_pid}-tensorrt_llm")}
    for line in (b"{", b"[]", b'{"stop": "a"}', b'{"stop": 999999}', b'{"id": 1}', b'{"inputs": {"x": [1]}, "id": ""}'):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(f"\0{name}")
            connection.sendall(line + b"\n")
            connection.settimeout(5)
            assert connection.recv(1) == b"", line
    assert server.generate({"text_input": "a", "max_tokens": 2}, "ensemble")[0] == 200


def test_postprocessing_alone_turns_ids_into_text(server, session) -> None:
    ids = session.tokenizer.encode("the access code", add_special_tokens=False)
    client = grpc_client.InferenceServerClient(f"127.0.0.1:{server.grpc}")
    inputs = [tensor("TOKENS_BATCH", [[[*ids, 7]]], "INT32"), tensor("SEQUENCE_LENGTH", [[len(ids)]], "INT32")]
    assert client.infer("postprocessing", inputs).as_numpy("OUTPUT")[0, 0].decode() == session.tokenizer.decode(ids)
    client.close()


def test_the_ensemble_over_grpc(server, session, short) -> None:
    stream = GrpcStream(server, text_request(short, 8), "ensemble")
    texts = [result.as_numpy("text_output") for result in stream.all()]
    stream.close()
    text = b"".join(piece.reshape(-1)[0] for piece in texts if piece is not None).decode()
    assert text == own_answer(session, short, {"max_tokens": 8}).text


def test_all_five_stop_together(server) -> None:
    pids = [server.server_pid, *server.model_processes()]
    assert len(pids) == 1 + 4
    assert server.stop() == 0 and gone(pids)
