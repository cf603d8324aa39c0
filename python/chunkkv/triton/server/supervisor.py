"""Keeps a tritonserver alive: starts it, asks for a token now and then, restarts it, ends all that belongs to it.

Triton never restarts a model process that died: its clients wait for ever, and the server goes on saying that it is
ready. So the supervisor watches the processes, and a death ends the whole group: open connections break, which every
client notices, and a new server serves again within seconds.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from chunkkv.errors import ConfigError
from chunkkv.logs import fields
from chunkkv.triton.repository.write import check_path
from chunkkv.triton.server.files import ServerFiles
from chunkkv.triton.server.health import SHM_PREFIX_ARGUMENT, Canary, Health, canary_id
from chunkkv.triton.server.processes import is_running, kill_group, model_processes, wait_for_group
from chunkkv.triton.server.shared_memory import new_shm_prefix, remove_shared_memory, sweep_shared_memory

POLL_S = 0.1
STEADY_S = 60.0  # a server that was ready for this long failed for a new reason
DYING_S = 5.0  # a server whose model process ended while it starts ends by itself within this time, or hangs
MAX_DELAY_S = 30.0  # longest pause before a restart; it doubles with each failure
# Ask the kernel for SIGTERM at the death of the parent, and become the server.
_LAUNCH = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15, 0, 0, 0); "
    "os.getppid() == int(sys.argv[1]) or sys.exit('the supervisor is gone'); os.execv(sys.argv[2], sys.argv[2:])"
)
_log = logging.getLogger(__name__)
_Process = subprocess.Popen[bytes]


@dataclass(frozen=True)
class ServeSettings:
    """How to run a server; raises ConfigError for a value out of range.

    Parameters
    ----------
    repository : the model repository.
    host : address that the server listens on. Default: the loopback interface.
    http_port, grpc_port, metrics_port : ports, 1 to 65535; they must differ. Defaults: 8000, 8001, 8002.
    start_timeout_s : longest time from a start to the first token, in seconds. Default: 300.
    canary_s : time between two canary requests, in seconds. Default: 5.
    canary_timeout_s : longest time for a canary request, and time for which canaries may fail, in seconds. Default: 60.
    exit_timeout_s : time that open requests have to end after SIGTERM, in whole seconds. Default: 30.
    restarts : the supervisor gives up after this many restarts without success; a server that was ready for STEADY_S
        seconds resets the count. Default: 5.
    server_arguments : further arguments for tritonserver. Default: none.
    """

    repository: Path
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    start_timeout_s: float = 300.0
    canary_s: float = 5.0
    canary_timeout_s: float = 60.0
    exit_timeout_s: int = 30
    restarts: int = 5
    server_arguments: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.repository.is_dir():
            raise ConfigError(f"model_repository {self.repository} is no directory; make one with chunkkv triton init")
        check_path(self.repository)
        ports = {"http_port": self.http_port, "grpc_port": self.grpc_port, "metrics_port": self.metrics_port}
        for name, port in ports.items():
            if not 1 <= port <= 65535:
                raise ConfigError(f"{name} is {port}; allowed is 1 to 65535")
        if len(set(ports.values())) < len(ports):
            raise ConfigError(f"the ports {', '.join(map(str, ports.values()))} must differ")
        for name in ("start_timeout_s", "canary_s", "canary_timeout_s", "exit_timeout_s"):
            if not 0 < getattr(self, name) <= threading.TIMEOUT_MAX:
                raise ConfigError(f"{name} is {getattr(self, name)}; give seconds above 0")

    def check_ports(self) -> None:
        """Raise ConfigError for a port that is taken: the server there would be asked for its health instead."""
        for name in ("http_port", "grpc_port", "metrics_port"):
            port = getattr(self, name)
            family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
            try:
                socket.create_server((self.host, port), family=family).close()
            except OSError as error:
                raise ConfigError(f"{name} {port} on {self.host} cannot be used: {error.strerror or error}") from None


class Supervisor:
    """Runs one server until it is told to stop, by stop() or by SIGTERM or SIGINT; a second signal kills it.

    Parameters
    ----------
    settings : how to run the server.
    files : its program and the environment to start it in.
    """

    def __init__(self, settings: ServeSettings, files: ServerFiles) -> None:
        self._settings, self._files = settings, files
        self._ready_at: float | None = None  # of the server of now
        self._stopping, self._killing = threading.Event(), threading.Event()

    def stop(self) -> None:
        """Ask run() to let open requests end and then return."""
        self._stopping.set()

    def handle_signals(self) -> None:
        """Let SIGTERM and SIGINT stop the server; call from the main thread."""

        def on_signal(number: int, frame: object) -> None:
            (self._killing if self._stopping.is_set() else self._stopping).set()

        signal.signal(signal.SIGTERM, on_signal)
        signal.signal(signal.SIGINT, on_signal)

    def run(self) -> int:
        """Serve until stopped; returns 0 after a stop, 1 where the server does not stay up.

        Raises ConfigError for a port that is taken.
        """
        self._settings.check_ports()
        sweep_shared_memory()
        failures, failed_at = 0, None
        while True:
            reason = self._serve(failed_at)
            if reason is None:
                return 0
            failed_at = time.monotonic()
            was_steady = self._ready_at is not None and failed_at - self._ready_at > STEADY_S
            failures = 1 if was_steady else failures + 1
            if failures > self._settings.restarts:
                _log.error("gave_up", extra=fields(reason=reason, failures=failures))
                return 1
            delay = 0.0 if failures == 1 else min(2.0 ** (failures - 2), MAX_DELAY_S)
            _log.error("restarting", extra=fields(reason=reason, delay_s=delay))
            if self._stopping.wait(delay):
                return 0

    def _serve(self, failed_at: float | None) -> str | None:
        """Run one server to its end; returns why it ended, None where it was told to."""
        shm_prefix = new_shm_prefix()
        settings, self._ready_at = self._settings, None
        health = Health(settings.host, settings.http_port, settings.canary_timeout_s, canary_id(shm_prefix))
        process = self._start(shm_prefix)
        watched = _Watched(process, shm_prefix, health, self._stopping)
        try:
            reason = self._wait_until_ready(watched, failed_at) or self._watch(watched)
            if reason is None:
                self._drain(process)
            return reason
        finally:
            self._clean_up(process, shm_prefix)

    def _start(self, shm_prefix: str) -> _Process:
        settings, host = self._settings, self._settings.host
        command = [
            str(self._files.binary),
            f"--model-repository={settings.repository}",
            f"--backend-config=python,{SHM_PREFIX_ARGUMENT}={shm_prefix}",
            "--disable-auto-complete-config",
            f"--exit-timeout-secs={settings.exit_timeout_s}",
            *(f"--{kind}-address={host}" for kind in ("http", "grpc", "metrics")),
            f"--http-port={settings.http_port}",
            f"--grpc-port={settings.grpc_port}",
            f"--metrics-port={settings.metrics_port}",
            *settings.server_arguments,
        ]
        if self._files.backends is not None:
            command.append(f"--backend-directory={self._files.backends}")
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid())]
        process = subprocess.Popen(
            [*launcher, *command], env=self._files.environment, start_new_session=True, stdin=subprocess.DEVNULL
        )
        _log.info("server_started", extra=fields(pid=process.pid, http=f"{host}:{settings.http_port}"))
        return process

    def _wait_until_ready(self, watched: _Watched, failed_at: float | None) -> str | None:
        """Return None once the server answers a canary, or is to stop; else what is wrong."""
        began, problem = time.monotonic(), "it does not listen yet"
        while not self._stopping.is_set():
            if reason := watched.end_before_ready():
                return reason
            if watched.health.is_ready():
                problem = watched.problem() or ""
                if not problem and not self._stopping.is_set():
                    self._ready_at = time.monotonic()
                    times = {"start_s": round(self._ready_at - began, 3)}
                    if failed_at is not None:
                        times["recovery_s"] = round(self._ready_at - failed_at, 3)
                    _log.info("server_ready", extra=fields(**times))
                    return None
            if time.monotonic() - began > self._settings.start_timeout_s:
                return f"the server was not ready after {self._settings.start_timeout_s:g} s: {problem}"
            time.sleep(POLL_S)
        return None

    def _watch(self, watched: _Watched) -> str | None:
        """Return what is wrong with a running server once something is, None once it is to stop."""
        model_pids = model_processes(watched.shm_prefix)
        canary = Canary(watched.problem, self._settings.canary_s, self._settings.canary_timeout_s)
        try:
            while not self._stopping.is_set():
                if (code := watched.process.poll()) is not None:
                    return f"the server ended with code {code}"
                if dead := [pid for pid in model_pids if not is_running(pid)]:
                    return f"model process {min(dead)} died"
                if canary.problem:
                    return canary.problem
                time.sleep(POLL_S)
            return None
        finally:
            canary.stop()

    def _drain(self, process: _Process) -> None:
        """Let open requests end: on SIGTERM the server takes no new ones and exits after the last."""
        _log.info("draining", extra=fields(at_most_s=self._settings.exit_timeout_s))
        process.send_signal(signal.SIGTERM)
        until = time.monotonic() + self._settings.exit_timeout_s + 5
        while process.poll() is None and time.monotonic() < until and not self._killing.is_set():
            time.sleep(POLL_S)
        if (code := process.poll()) is None:
            reason = "signal" if self._killing.is_set() else "it did not end in time"
            _log.warning("killed", extra=fields(reason=reason))
        else:
            _log.info("server_stopped", extra=fields(code=code))

    def _clean_up(self, process: _Process, shm_prefix: str) -> None:
        """End every process of the server's group and remove its shared memory."""
        if self._stopping.is_set() and process.poll() is not None:
            wait_for_group(process.pid, timeout_s=1.0)  # model processes end by themselves after a clean exit
        kill_group(process.pid)
        process.wait()
        remove_shared_memory(shm_prefix)


@dataclass
class _Watched:
    """One run of a server, and what tells how it is."""

    process: _Process
    shm_prefix: str
    health: Health
    stopping: threading.Event
    _model_pids: frozenset[int] = frozenset()

    def problem(self) -> str | None:
        """Send a canary; returns what is wrong, None also once the server has ended or is to stop."""
        return self.health.problem(lambda: self.process.poll() is None and not self.stopping.is_set())

    def end_before_ready(self) -> str | None:
        """Return how the server ended, None while it starts; a model process that dies takes it along, or hangs it."""
        if (code := self.process.poll()) is None and any(not is_running(pid) for pid in self._model_pids):
            try:
                code = self.process.wait(DYING_S)
            except subprocess.TimeoutExpired:
                return "a model process ended before the server was ready; its own lines in this log say why"
        self._model_pids |= model_processes(self.shm_prefix)
        return None if code is None else f"the server exited with code {code} before it was ready"
