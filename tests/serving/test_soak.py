"""Requests of mixed lengths for minutes: no server ends, no client waits for ever, every whole answer is the library's.

make test-soak runs it, a part of make test-deep: up to 20,000 requests for each model, in at most one minute each.
"""

from __future__ import annotations

import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from chunkkv import SamplingParams

from .server import sse, wait_for

CLIENTS, REQUESTS, MOST_S = 16, 20_000, 60
TEXTS = ("the access code of the vault", "a b c", "the key lies under the third stone from the door, said the note")
LENGTHS = (1, 2, 5, 12, 40, 150)
LEAVES_EVERY = 25  # of so many requests one client leaves in the middle of its stream


@pytest.mark.deep
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("layout", "model"), [("single", "chunkkv"), ("trtllm", "ensemble"), ("trtllm", "tensorrt_llm_bls")]
)
def test_a_model_outlives_a_soak(servers, session, layout: str, model: str) -> None:
    server = servers("--layout", layout, serve_flags=("--canary_s", "1"))
    own = {
        (text, length): session.generate(text, SamplingParams(max_new_tokens=length, ignore_eos=True)).text
        for text in TEXTS
        for length in LENGTHS
    }
    pids, until = {server.server_pid, *server.model_processes()}, time.monotonic() + MOST_S

    def client(number: int) -> tuple[int, list[str]]:
        """Ask until the time or the requests are over; returns the requests and what was wrong."""
        rng, wrong, count = random.Random(number), [], 0
        while count < REQUESTS // CLIENTS and time.monotonic() < until:
            count += 1
            text, length = rng.choice(TEXTS), rng.choice(LENGTHS)
            body = {"text_input": text, "max_tokens": length, "ignore_eos": True, "keep_ratio": rng.choice((0.2, 1.0))}
            if count % LEAVES_EVERY == 0:
                response = server.open_stream({**body, "max_tokens": 2000}, model)
                next(sse(response))
                response.fp.raw._sock.shutdown(socket.SHUT_RDWR)
                response.close()
            elif rng.random() < 0.5:
                answer = "".join(event["text_output"] for event in server.stream(body, model))
                wrong += [f"{body}: {answer!r}"] if answer != own[text, length] else []
            else:
                status, answer = server.generate(body, model)
                if status != 200 or answer["text_output"] != own[text, length]:
                    wrong.append(f"{body}: {status} {answer}")
        return count, wrong

    with ThreadPoolExecutor(CLIENTS) as pool:
        results = list(pool.map(client, range(CLIENTS)))
    counts, wrong = sum(count for count, _ in results), [text for _, texts in results for text in texts]
    print(f"{model}: {counts} requests, {len(wrong)} wrong")
    assert wrong == [] and counts >= min(REQUESTS, 1000)
    assert not server.events("restarting") and {server.server_pid, *server.model_processes()} == pids
    wait_for(lambda: server.metric("chunkkv_requests", state="active") == 0, 30)
