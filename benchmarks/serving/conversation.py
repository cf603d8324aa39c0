"""Two questions about one document with the package openai: the second goes on from what the server holds."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import openai

from benchmarks.serving.load import TEXT
from benchmarks.serving.servers import own_server

QUESTIONS = ("What does the narrator do when he feels grim?", "Why does he go to sea as a sailor?")


def conversation(engine_dir: Path, keep: float, share: float = 4 / 3) -> dict[str, Any]:
    """Return two questions about one document, and how much sooner the second one's first token comes.

    Parameters
    ----------
    engine_dir : Path
        The engine.
    keep : float
        Keep ratio of both.
    share : float, default 4 / 3
        The document's length as a multiple of the text's, which has about 2,850 tokens.
    """
    text = TEXT.read_text("utf-8")
    document = f"{text}\n\n{text}"[: int(len(text) * share)]
    with own_server(engine_dir) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=1200, max_retries=0)
        _first_token(client, [{"role": "user", "content": "Hello"}], keep)  # memory and caches of the process
        load, before = os.getloadavg()[0], server.cpu_seconds()
        messages: list[Any] = [{"role": "user", "content": f"{document}\n\n{QUESTIONS[0]}"}]
        first = _first_token(client, messages, keep)
        between = server.cpu_seconds()
        messages += [{"role": "assistant", "content": first["answer"]}, {"role": "user", "content": QUESTIONS[1]}]
        second = _first_token(client, messages, keep)
        after = server.cpu_seconds()
    first["server_cpu_s"], second["server_cpu_s"] = round(between - before, 2), round(after - between, 2)
    ratio = round(first["ttft_s"] / second["ttft_s"], 1)
    values = {"first": first, "second": second, "times_sooner": ratio, "machine_load": round(load, 1)}
    return {"keep_ratio": keep, **values}


def _first_token(client: openai.OpenAI, messages: list[Any], keep: float) -> dict[str, Any]:
    """Ask and return the answer, its usage, and when its first token came."""
    began, first, text, usage = time.perf_counter(), 0.0, "", None
    stream = client.chat.completions.create(
        model="model",
        messages=messages,
        max_tokens=32,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"keep_ratio": keep},
    )
    for chunk in stream:
        first = first or time.perf_counter() - began
        usage = chunk.usage or usage
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert usage is not None and usage.prompt_tokens_details is not None
    details = usage.prompt_tokens_details.model_dump()
    counts = {name: details[name] for name in ("cached_tokens", "kept_tokens")}
    return {"ttft_s": round(first, 3), "prompt_tokens": usage.prompt_tokens, **counts, "answer": text}
