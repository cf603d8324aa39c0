"""Clients that users bring: the official package openai, and the bodies that benchmark clients send."""

from __future__ import annotations

import json
import threading
from contextlib import ExitStack

import httpx
import openai
import pytest
from support import needle_engine
from support.http_server import ServedEngine, served

from chunkkv import ChunkKVSession
from chunkkv.batching import BatchingLimits

PROSE = "The access code of the vault is 7 3 9. The keeper of the desk is clara. " * 8
CHAT = [{"role": "user", "content": PROSE}]


@pytest.fixture(scope="module")
def session() -> ChunkKVSession:
    return needle_engine.session()


@pytest.fixture(scope="module")
def engine(session: ChunkKVSession):
    with served(session, keys=("0123456789abcdef",)) as made:
        yield made


@pytest.fixture(scope="module")
def client(engine: ServedEngine):
    with openai.OpenAI(base_url=f"{engine.url}/v1", api_key="0123456789abcdef", max_retries=0) as made:
        yield made


def test_openai_holds_a_conversation(client: openai.OpenAI) -> None:
    body = {"model": "needle", "temperature": 0, "max_tokens": 8, "extra_body": {"keep_ratio": 0.5}}
    first = client.chat.completions.create(messages=CHAT, **body)
    answer = first.choices[0].message.content
    assert answer and first.usage.prompt_tokens_details.cached_tokens == 0
    assert 0 < first.usage.prompt_tokens_details.kept_tokens < first.usage.prompt_tokens
    turns = [*CHAT, {"role": "assistant", "content": answer}, {"role": "user", "content": "The keeper of"}]
    chunks = list(
        client.chat.completions.create(messages=turns, stream=True, stream_options={"include_usage": True}, **body)
    )
    assert "".join(chunk.choices[0].delta.content for chunk in chunks[:-1])
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 100


def test_openai_reads_completions_models_and_log_probabilities(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["needle"]
    reply = client.completions.create(model="needle", prompt=[PROSE, "The keeper"], max_tokens=4, logprobs=2, n=2)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert len(reply.choices[0].logprobs.tokens) <= 4
    chat = client.chat.completions.create(
        model="needle", messages=CHAT, max_tokens=3, logprobs=True, top_logprobs=3, logit_bias={"5": -100}, seed=1
    )
    assert len(chat.choices[0].logprobs.content[0].top_logprobs) == 3
    stream = client.completions.create(model="needle", prompt=PROSE, max_tokens=4, stream=True)
    assert sum(len(chunk.choices) for chunk in stream) <= 4


def test_openai_raises_its_own_errors(client: openai.OpenAI, engine: ServedEngine) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="needle", prompt="a", temperature=-1)
    assert refused.value.param == "temperature" and refused.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt", prompt="a")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="0").models.list()


def test_openai_tries_again_after_429(session: ChunkKVSession) -> None:
    with (
        served(session, batching=BatchingLimits(slots=1, waiting=1, kv_bytes=10**8)) as engine,
        ExitStack() as open_ones,
    ):
        long = {"prompt": "a b c", "max_tokens": 3000, "ignore_eos": True, "stream": True}
        running = open_ones.enter_context(engine.client.stream("POST", "/v1/completions", json=long))
        lines = running.iter_lines()
        next(lines)
        waiting = threading.Thread(target=lambda: engine.post("/v1/completions", **{**long, "max_tokens": 1}))
        waiting.start()
        engine.wait_until(lambda load: load.waiting == 1)

        def note(reply: httpx.Response) -> None:
            statuses.append(reply.status_code)
            open_ones.close()  # the running request leaves, so there is room for the next attempt

        statuses: list[int] = []
        transport = httpx.Client(event_hooks={"response": [note]})
        with openai.OpenAI(base_url=f"{engine.url}/v1", api_key="-", max_retries=5, http_client=transport) as client:
            assert client.completions.create(model="needle", prompt="a", max_tokens=2).choices
        waiting.join()
        assert statuses[0] == 429 and statuses[-1] == 200


BODIES = {
    "vllm openai": (
        "/v1/completions",
        {
            "model": "needle",
            "prompt": PROSE,
            "repetition_penalty": 1.0,
            "max_tokens": 6,
            "logprobs": None,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "temperature": 0.0,
        },
    ),
    "vllm openai, older": (
        "/v1/completions",
        {"model": "needle", "prompt": PROSE, "temperature": 0.0, "best_of": 1, "max_tokens": 6, "stream": True},
    ),
    "vllm openai-chat": (
        "/v1/chat/completions",
        {
            "model": "needle",
            "messages": [{"role": "user", "content": [{"type": "text", "text": PROSE}]}],
            "max_completion_tokens": 6,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        },
    ),
    "sglang sglang-oai": (
        "/v1/completions",
        {
            "model": "needle",
            "prompt": PROSE,
            "temperature": 0.0,
            "best_of": 1,
            "max_tokens": 6,
            "stream": True,
            "ignore_eos": True,
        },
    ),
    "sglang sglang-oai-chat": (
        "/v1/chat/completions",
        {
            "model": "needle",
            "messages": CHAT,
            "temperature": 0.0,
            "max_completion_tokens": 6,
            "stream": True,
            "ignore_eos": True,
        },
    ),
    "genai-perf": (
        "/v1/chat/completions",
        {"model": "needle", "messages": CHAT, "stream": True, "max_tokens": 6, "min_tokens": 6, "ignore_eos": True},
    ),
    "aiperf": (
        "/v1/chat/completions",
        {
            "model": "needle",
            "messages": [{"role": "user", "name": "", "content": PROSE}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_completion_tokens": 6,
            "min_tokens": 6,
            "ignore_eos": True,
        },
    ),
}


@pytest.mark.parametrize("client_name", BODIES)
def test_benchmark_clients_count_the_tokens_that_were_made(engine: ServedEngine, client_name: str) -> None:
    path, body = BODIES[client_name]
    *lines, done = engine.events(path, **body)
    chunks = [json.loads(line) for line in lines]
    counted = [chunk for chunk in chunks if chunk["choices"]]  # each of them is a token to these clients
    assert done == "[DONE]" and 1 <= len(counted) <= 6
    if body.get("ignore_eos"):
        assert len(counted) == 6
    if "stream_options" in body:
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == len(counted)
    else:
        assert all("usage" not in chunk for chunk in chunks)
