"""`chunkkv serve` as a process: it says when it is ready, lets open requests end, and refuses wrong flags.

With -m deep, the conversation of the documentation on a real model: the second question about a document of 4,000
tokens has its first token at least 20 times sooner.
"""

from __future__ import annotations

import json
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from support import needle_engine
from support.builds import CommandLine
from support.smollm2 import smollm2

from benchmarks.serving.conversation import conversation
from chunkkv.cli.main import main
from chunkkv_builder import build as build_engine

LONG = {"prompt": "a b c", "max_tokens": 300, "ignore_eos": True, "stream": True}


class ServeProcess:
    """The command in a process of its own, on a free port."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[dict] = []
        self._lines: queue.SimpleQueue[dict | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stderr:
            self._lines.put(json.loads(line) if line.startswith("{") else {"event": line})
        self._lines.put(None)

    def event(self, name: str) -> dict:
        """Return the next line of the log with that event."""
        while (line := self._lines.get(timeout=60)) is not None:
            self.lines.append(line)
            if line["event"] == name:
                return line
        raise AssertionError((name, self.lines))


@contextmanager
def process_of(*flags: str) -> Iterator[ServeProcess]:
    """Run the command until the block ends."""
    command = [sys.executable, "-m", "chunkkv", "serve", "--engine_dir", str(needle_engine.engine_dir()), *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield ServeProcess(process)
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_open_requests_end(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# who may ask\n0123456789abcdef\n")
    with process_of("--port", "0", "--api_key_file", str(tmp_path / "keys"), "--model_name", "m") as server:
        url = server.event("ready")["url"]
        assert [line["event"] for line in server.lines] == ["loading", "ready"]
        headers = {"Authorization": "Bearer 0123456789abcdef"}
        with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
            assert client.get("/v1/models").json()["data"][0]["id"] == "m"
            with client.stream("POST", "/v1/completions", json=LONG) as response:
                lines = response.iter_lines()
                next(lines)
                server.process.send_signal(number)
                assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.event("request_done")["new_tokens"] == 300
        server.event("stopped")
        assert server.process.wait(30) == 0


def test_a_second_signal_cuts_open_requests_off() -> None:
    with process_of("--port", "0") as server:
        url = server.event("ready")["url"]
        with httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "max_tokens": 4000}, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            server.event("stopping")
            server.process.send_signal(signal.SIGTERM)
            *_, error, done = (line.removeprefix("data: ") for line in lines if line)
        assert json.loads(error)["error"]["code"] == "closing" and done == "[DONE]"
        assert server.process.wait(20) == 0
        server.event("stopped")
        events = [line["event"] for line in server.lines]
        assert events == ["loading", "ready", "stopping", "stopping_at_once", "request_refused", "stopped"]


def test_a_server_that_the_network_can_reach_says_so() -> None:
    with process_of("--port", "0", "--host", "0.0.0.0") as server:
        line = server.event("open_to_the_network")
        assert line["level"] == "warning" and "--api_key_file" in line["message"]
        server.event("ready")


def test_wrong_flags_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = CommandLine(capsys, main)
    engine = ["--engine_dir", str(needle_engine.engine_dir())]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("serve", *engine, "--port", port)
        assert done.code == 2 and f"port {port}" in done.err and "--host" in done.err
    (tmp_path / "short").write_text("abc\n")
    (tmp_path / "empty").write_text("\n")
    for flags, says in (
        (["--api_key_file", str(tmp_path / "none")], "cannot be read"),
        (["--api_key_file", str(tmp_path / "empty")], "no key"),
        (["--api_key_file", str(tmp_path / "short")], "16"),
        (["--host", "no.such.host.invalid"], "host"),
        (["--port", "70000"], "port 70000"),
        (["--kv_bytes", "1000", "--context_bytes", "1000"], "context_bytes"),
        (["--waiting", "0"], "waiting"),
        (["--context_age_s", "0"], "context_age_s"),
        (["--default_max_tokens", "0"], "default_max_tokens"),
        (["--max_body_bytes", "0"], "max_body_bytes"),
    ):
        done = run("serve", *engine, "--port", "0", *flags)
        assert done.code == 2 and says in done.err, (flags, done.err)


@pytest.mark.deep
@pytest.mark.timeout(1500)
def test_the_second_question_about_a_document_is_answered_20_times_sooner(tmp_path: Path) -> None:
    engine = tmp_path / "smollm2"
    named = ["--checkpoint_dir", str(smollm2()), "--output_dir", str(engine), "--log_level", "error"]
    build_engine.main([*named, "--chunkkv"])
    measured = conversation(engine, 0.2)
    first, second = measured["first"], measured["second"]
    assert first["prompt_tokens"] > 3800 and first["cached_tokens"] == 0
    assert second["prompt_tokens"] - second["cached_tokens"] < 60
    assert first["answer"].strip() and second["answer"].strip()
    assert measured["times_sooner"] >= 20, measured
