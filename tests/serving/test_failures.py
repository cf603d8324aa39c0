"""What dies comes back: no request is lost without an error, no process is left behind, recovery takes seconds."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from chunkkv.triton.models.serving import LOCK_TIMEOUT_S

from .conftest import make_repository
from .server import CHUNKKV, GrpcStream, Server, free_ports, gone, sse, tensor, text_request, wait_for

LONG = {"text_input": "the access code", "max_tokens": 30_000, "ignore_eos": True}
LOST = (OSError, http.client.HTTPException)  # what a client of a broken connection sees


@pytest.fixture(scope="module")
def server(servers):
    return servers(serve_flags=("--canary_s", "0.5"))


def long_requests(server: Server):
    """Two HTTP requests, streamed and not, and a gRPC stream, all in work; returns threads' results and the stream."""
    response = server.open_stream(LONG)
    events = sse(response)
    next(events)
    stream = GrpcStream(server, [*text_request("the access code", 30_000), tensor("ignore_eos", [True], "BOOL")])
    stream.next()
    pool = ThreadPoolExecutor(2)
    waiting = [pool.submit(server.generate, LONG), pool.submit(lambda: list(events))]
    wait_for(lambda: server.metric("chunkkv_requests", state="active") == 3)
    return waiting, stream


def assert_every_client_was_told(waiting, stream, seconds: float) -> None:
    """Each request ends with an error soon; the streamed one without its last event is one too."""
    for future in waiting:
        try:
            answer = future.result(timeout=seconds)
        except LOST:
            continue
        assert isinstance(answer, list) and "finish_reason" not in answer[-1], "cut off in the middle"
    with pytest.raises(InferenceServerException):
        while True:
            stream.next(timeout=seconds)
    stream.close()


@pytest.mark.parametrize("victim", ["model process", "server"])
def test_a_kill_in_the_middle_of_streams(server: Server, victim: str) -> None:
    starts = len(server.events("server_ready"))
    waiting, stream = long_requests(server)
    old, prefix = {server.server_pid, *server.model_processes()}, server.shm_prefix
    killed = server.server_pid if victim == "server" else min(server.model_processes())
    began = time.monotonic()
    os.kill(killed, signal.SIGKILL)
    assert_every_client_was_told(waiting, stream, 5)
    told_s = time.monotonic() - began
    ready = server.wait_ready(starts + 1)
    assert server.generate({"text_input": "a", "max_tokens": 2})[0] == 200
    served_s = time.monotonic() - began
    assert gone(list(old)) and list(Path("/dev/shm").glob(f"{prefix}*")) == []
    print(f"{victim} killed: clients told after {told_s:.2f} s, serving after {served_s:.2f} s, {ready['recovery_s']=}")
    assert told_s < 3 and served_s < 15
    assert ("model process" if victim == "model process" else "ended with code -9") in server.events("restarting")[-1][
        "reason"
    ]


def test_a_stuck_model_process_is_replaced(servers) -> None:
    """SIGSTOP leaves the process there; only the canary notices."""
    server = servers(serve_flags=("--canary_s", "0.3", "--canary_timeout_s", "1"))
    (process,) = server.model_processes()
    os.kill(process, signal.SIGSTOP)
    server.wait_ready(2)
    reason = server.events("restarting")[0]["reason"]
    assert "canaries failed in" in reason and ("model chunkkv" in reason or "TimeoutError" in reason)
    assert server.generate({"text_input": "a", "max_tokens": 2})[0] == 200
    assert gone([process])


def test_sigterm_lets_open_requests_end(servers) -> None:
    server = servers()
    body = {**LONG, "max_tokens": 1500}
    pids = [server.server_pid, *server.model_processes()]
    with ThreadPoolExecutor(3) as pool:
        whole = pool.submit(server.generate, body)
        streamed = [pool.submit(server.stream, body) for _ in range(2)]
        wait_for(lambda: server.metric("chunkkv_requests", state="active") == 3)
        code = server.stop()
        status, answer = whole.result()
        assert (status, answer["finish_reason"], answer["num_output_tokens"]) == (200, "length", 1500)
        for future in streamed:
            events = future.result()
            assert events[-1]["finish_reason"] == "length"
            assert sum(np.size(event["output_ids"]) for event in events) == 1500
    assert code == 0 and gone(pids)
    with pytest.raises(OSError):
        server.generate({"text_input": "a"})
    assert [e["event"] for e in server.events() if e["event"] in ("draining", "server_stopped")] == [
        "draining",
        "server_stopped",
    ]


def test_a_second_signal_ends_it_at_once(servers) -> None:
    server = servers()
    waiting, stream = long_requests(server)
    pids = [server.server_pid, *server.model_processes()]
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: server.events("draining"))
    began = time.monotonic()
    server.stop()
    assert time.monotonic() - began < 5 and gone(pids)
    assert_every_client_was_told(waiting, stream, 5)


def test_a_killed_supervisor_leaves_nothing(servers) -> None:
    server = servers(serve_flags=("--exit_timeout_s", "2"))
    server.generate({"text_input": "a", "max_tokens": 2})
    pids = [server.server_pid, *server.model_processes()]
    server.stop(signal.SIGKILL)
    wait_for(lambda: gone(pids), 15)


def test_the_next_start_removes_what_a_killed_supervisor_left(servers) -> None:
    """A request is open when everything is killed at once, so that nobody can clean up."""
    server = servers()
    response = server.open_stream(LONG)
    next(sse(response))
    prefix, server_pid = server.shm_prefix, server.server_pid
    server.stop(signal.SIGKILL)
    os.killpg(server_pid, signal.SIGKILL)
    assert list(Path("/dev/shm").glob(f"{prefix}*")), "there is something to remove"
    other = servers()
    assert list(Path("/dev/shm").glob(f"{prefix}*")) == []
    assert other.generate({"text_input": "a", "max_tokens": 2})[0] == 200


def test_a_reader_of_the_log_that_stalls_stops_nothing(servers, engine_dir, tmp_path) -> None:
    """Standard error is a pipe that nobody reads; it holds 64 kB, and 400 requests log more than that."""
    repository = make_repository(engine_dir, tmp_path / "repository")
    http_port, grpc_port, metrics_port = free_ports(3)
    ports = ["--http_port", str(http_port), "--grpc_port", str(grpc_port), "--metrics_port", str(metrics_port)]
    command = [*CHUNKKV, "triton", "serve", "--model_repository", str(repository), *ports, "--exit_timeout_s", "2"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        server = Server.__new__(Server)
        server.http = http_port

        def answers() -> bool:
            try:
                return server.generate({"text_input": "a", "max_tokens": 1}, timeout=10)[0] == 200
            except LOST:
                return False

        try:
            wait_for(answers, 60)
            assert all(answers() for _ in range(400))
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_a_server_killed_without_a_supervisor_takes_its_models_along(servers) -> None:
    """The model's own watch on its parent: the supervisor is stopped, so only the model can notice."""
    server = servers()
    response = server.open_stream(LONG)
    next(sse(response))
    models = server.model_processes()
    os.kill(server.process.pid, signal.SIGSTOP)
    os.kill(server.server_pid, signal.SIGKILL)
    wait_for(lambda: gone(models), LOCK_TIMEOUT_S + 15)
    os.kill(server.process.pid, signal.SIGCONT)
    server.wait_ready(2)


def test_a_server_that_cannot_start_is_given_up(engine_dir, tmp_path) -> None:
    repository = make_repository(engine_dir, tmp_path / "repository")
    config = repository / "chunkkv" / "config.pbtxt"
    config.write_text(config.read_text().replace(str(engine_dir), "/nowhere"), encoding="utf-8")
    server = Server(repository, tmp_path / "log", "--restarts", "1")
    assert server.process.wait(60) == 1
    assert server.events("gave_up")[0]["reason"] == "the server exited with code 1 before it was ready"
    assert "engine directory /nowhere does not exist" in server.text()


def test_load_goes_on_through_a_crash(server: Server) -> None:
    """Eight clients ask again and again over a kill: each call ends with an answer or an error, none hangs."""
    stop, calls = threading.Event(), []
    body = {"text_input": "a b c", "max_tokens": 50, "ignore_eos": True}

    def ask(number: int) -> None:
        while not stop.is_set():
            try:
                calls.append(server.generate(body, timeout=15)[0])
            except LOST as error:
                calls.append(type(error).__name__)
                assert not isinstance(error, TimeoutError), "a client was left waiting"
                time.sleep(0.05)

    starts = len(server.events("server_ready"))
    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(ask, number) for number in range(8)]
        wait_for(lambda: calls.count(200) > 20)
        os.kill(min(server.model_processes()), signal.SIGKILL)
        server.wait_ready(starts + 1)
        after = calls.count(200)
        wait_for(lambda: calls.count(200) > after + 20)
        stop.set()
        for client in clients:
            client.result()
    assert set(calls) - {200}, "the kill was felt"


def test_nothing_is_listened_to_but_loopback(server: Server) -> None:
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    sockets = [line.split() for table in tables for line in table]
    addresses = {local[-4:]: local[:-5] for _, local, _, state, *_ in sockets if state == "0A"}
    listening = [addresses[f"{port:04X}"] for port in (server.http, server.grpc, server.metrics)]
    assert set(listening) <= {"0100007F", "0000000000000000FFFF00000100007F"}


def test_flags_are_checked_before_anything_starts(tmp_path) -> None:
    def refused(*flags: str) -> str:
        done = subprocess.run([*CHUNKKV, "triton", "serve", *flags], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    assert "model_repository" in refused("--model_repository", str(tmp_path / "none"))
    assert "http_port is 0" in refused("--model_repository", str(tmp_path), "--http_port", "0")
    assert "must differ" in refused("--model_repository", str(tmp_path), "--http_port", "8001")
    assert "canary_s is inf" in refused("--model_repository", str(tmp_path), "--canary_s", "inf")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"grpc_port {port} on 127.0.0.1 cannot be used: Address already in use" in refused(
            "--model_repository", str(tmp_path), "--grpc_port", str(port)
        )
    assert "http_port 8000 on no.such.host cannot be used" in refused(
        "--model_repository", str(tmp_path), "--host", "no.such.host"
    )


@pytest.mark.parametrize("layout", ["single", "trtllm"])
def test_a_server_with_every_place_taken_is_not_taken_for_a_dead_one(servers, layout: str) -> None:
    """Canaries go on while one client holds the only slot and one waits; no restart, no line, no count."""
    flags = ("--layout", layout, "--slots", "1", "--waiting", "1")
    server = servers(*flags, serve_flags=("--canary_s", "0.2", "--canary_timeout_s", "1.2"))
    model = "chunkkv" if layout == "single" else "tensorrt_llm_bls"
    body = {"text_input": "the access code", "max_tokens": 20_000, "ignore_eos": True}
    clients = [ThreadPoolExecutor(1).submit(lambda: server.stream(body, model)) for _ in range(2)]
    wait_for(lambda: server.metric("chunkkv_requests", state="active") == 1)
    time.sleep(5)
    assert [client.done() for client in clients] == [False, False], "the server was busy all the time"
    assert not server.events("restarting") and not server.events("request_rejected")
    assert server.metric("chunkkv_requests_total") == 0, "canaries are not counted"
    server.stop(signal.SIGKILL)


@pytest.mark.parametrize(("layout", "model"), [("single", "chunkkv"), ("trtllm", "ensemble")])
def test_model_processes_stop_without_a_crash(servers, layout: str, model: str) -> None:
    """An object of Triton's python backend that outlives its connection to the server ends its process by SIGSEGV.

    Nothing but the kernel's log tells of that.
    """

    def kernel_log() -> str:
        return subprocess.run(["dmesg"], capture_output=True, text=True, check=False).stdout

    if not kernel_log():
        pytest.skip("the kernel's log cannot be read here (dmesg)")
    server = servers("--layout", layout)
    for name in {model, "chunkkv" if layout == "single" else "tensorrt_llm_bls"}:
        assert server.generate({"text_input": "a", "max_tokens": 3}, name)[0] == 200
        assert len(server.stream({"text_input": "a", "max_tokens": 3}, name)) >= 3
    pids = server.model_processes()
    assert server.stop() == 0
    assert [line for line in kernel_log().splitlines() for pid in pids if f"[{pid}]: segfault" in line] == []
