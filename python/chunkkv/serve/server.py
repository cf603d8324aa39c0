"""Runs the application: a socket, uvicorn in a thread, and signals that let open requests end."""

from __future__ import annotations

import ipaddress
import logging
import math
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from chunkkv.errors import ConfigError
from chunkkv.serve.service import Service

_BACKLOG = 2048
_ERRORS_S = 5  # for errors to reach clients
_LEAST_KEY = 16  # letters of an API key; shorter ones can be guessed


def read_api_keys(path: Path) -> tuple[str, ...]:
    """Return the keys in a file, one in a line; raises ConfigError where there is none, or a short one."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_key_file {path} cannot be read: {error}") from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not keys:
        raise ConfigError(f"api_key_file {path} has no key; write one in a line")
    for number, key in enumerate(keys, 1):
        if len(key) < _LEAST_KEY or not key.isascii() or any(letter.isspace() for letter in key):
            raise ConfigError(
                f"api_key_file {path}: key {number} is no word of at least {_LEAST_KEY} ASCII letters; "
                "make one with: openssl rand -hex 24"
            )
    return keys


def listening_socket(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address; raises ConfigError where that fails. It listens once the server runs."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"host {host} is no address of this machine: {error.strerror or error}") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"port {port} of {host} cannot be used: {reason}; give another --port or --host") from None
    return bound


def is_loopback(host: str) -> bool:
    """Return whether an address is reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class HttpServer:
    """Serves an application until a signal comes; then open requests may end.

    Parameters
    ----------
    app : ASGI application
        What answers.
    bound : socket.socket
        Where it listens.
    service : Service
        Is told that the server closes, so that /health says so; its batcher is closed where requests take too long.
    exit_timeout_s : float
        Seconds that open requests have to end.
    """

    def __init__(self, app: ASGIApp, bound: socket.socket, service: Service, exit_timeout_s: float) -> None:
        self._service, self._socket = service, bound
        self._exit_timeout_s, self._cut_off_at = exit_timeout_s, math.inf
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            backlog=_BACKLOG,
            timeout_graceful_shutdown=int(exit_timeout_s) + _ERRORS_S,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([bound],), name="chunkkv-http", daemon=True)

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._socket.getsockname()[1])

    def start(self) -> None:
        """Serve from a thread of its own; requests are taken once this returns."""
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            self._thread.join(0.01)

    def stop(self, at_once: bool = False) -> None:
        """Take no more requests; open ones may end, or with `at_once` get an error."""
        self._service.is_closing = True
        self._cut_off_at = time.monotonic() + (0.0 if at_once else self._exit_timeout_s)
        self._server.should_exit = True

    def wait(self) -> None:
        """Return when the server has ended; open requests that take too long for that get an error."""
        while self._thread.is_alive():
            self._thread.join(0.1)  # signals are handled between two waits
            if time.monotonic() >= self._cut_off_at:
                self._cut_off_at = math.inf
                self._service.batcher.close()

    def run(self, on_ready: Callable[[], None]) -> None:
        """Serve until SIGTERM or Ctrl-C; a second one cuts open requests off. `on_ready` is called once it listens."""
        with _signals(self._on_signal):
            self.start()
            on_ready()
            self.wait()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again = self._service.is_closing
        logging.getLogger(__name__).warning(
            "stopping_at_once" if again else "stopping", extra={"fields": {"signal": signal.Signals(number).name}}
        )
        self.stop(at_once=again)


@contextmanager
def _signals(handler: signal._HANDLER) -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, old in zip(numbers, before, strict=True):
            signal.signal(number, old)
