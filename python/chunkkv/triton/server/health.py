"""Whether a server really serves: a canary request, because Triton calls a model ready whose process is dead.

A model answers a canary at once from the heartbeat of its batcher (ContinuousBatcher.check_alive): it takes no slot, no
place in the queue and no token, so a server that is busy answers it, too. Its id is made of the prefix of the server's
shared memory, which the supervisor chooses at random for every start and every model process has in its command line.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

SHM_PREFIX_ARGUMENT = "shm-region-prefix-name"  # of Triton's python backend
ENGINE_CODE = "CHUNKKV_INTERNAL"  # begins an error of the engine itself, which does not go away
_TEXT_INPUTS = {"text_input", "max_tokens"}


def canary_id(shm_prefix: str) -> str:
    """Return the id of the canary requests to a server with this prefix of its shared memory."""
    return f"{shm_prefix}canary"


class Health:
    """Asks the HTTP endpoint of a server for its health.

    Parameters
    ----------
    host : address that the server listens on; for one that stands for all, the loopback interface is asked.
    port : HTTP port.
    timeout_s : longest time for a canary request, in seconds.
    canary : id of the canary requests.
    """

    def __init__(self, host: str, port: int, timeout_s: float, canary: str) -> None:
        address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        self._base_url = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
        self._timeout_s, self._canary = timeout_s, canary
        self._models: list[str] | None = None
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy: the server is here

    def is_ready(self) -> bool:
        """Return whether the server says that all models are loaded."""
        try:
            self._fetch("/v2/health/ready", timeout_s=2)
            return True
        except OSError:
            return False

    def problem(self, is_wanted: Callable[[], bool] = lambda: True) -> str | None:
        """Return what is wrong, None where every model that takes text answers a canary.

        Failures are ignored while `is_wanted()` returns False. Default: none is.
        """
        try:
            if self._models is None:
                self._models = self._text_models()
            for name in self._models:
                if error := self._canary_error(name):
                    return f"model {name}: {error}" if is_wanted() else None
        except (OSError, ValueError) as error:
            return f"{type(error).__name__}: {error}" if is_wanted() else None
        return None

    def _text_models(self) -> list[str]:
        """Return the models to ask."""
        models = []
        for entry in self._fetch("/v2/repository/index", b"{}"):
            config = self._fetch(f"/v2/models/{entry['name']}/config")
            if {tensor["name"] for tensor in config.get("input", [])} >= _TEXT_INPUTS:
                models.append(entry["name"])
        return models

    def _canary_error(self, model: str) -> str | None:
        """Send a canary to a model; returns its error."""
        body = json.dumps({"id": self._canary, "text_input": "a", "max_tokens": 1}).encode()
        try:
            answer = self._fetch(f"/v2/models/{model}/generate", body, self._timeout_s)
        except urllib.error.HTTPError as error:
            answer = {"error": error.read().decode(errors="replace")}
        message = answer.get("error")
        return None if message is None else str(message)

    def _fetch(self, path: str, body: bytes | None = None, timeout_s: float = 10) -> Any:
        """Return the JSON answer to a GET, or to a POST of `body`; None for an empty one."""
        with self._opener.open(urllib.request.Request(self._base_url + path, body), timeout=timeout_s) as response:
            content = response.read()
        return json.loads(content) if content else None


class Canary:
    """Asks again and again from a thread of its own; `problem` is set once the server is not well.

    One failure means little: Triton calls a model process that was frozen for a moment unhealthy at once. The server is
    not well when canaries have failed for `timeout_s` seconds, or twice with an error of the engine itself.

    Parameters
    ----------
    ask : returns what is wrong, or None.
    interval_s : time between two canaries, in seconds.
    timeout_s : time for which they may fail, in seconds.
    """

    def __init__(self, ask: Callable[[], str | None], interval_s: float, timeout_s: float) -> None:
        self._ask, self._interval_s, self._timeout_s = ask, interval_s, timeout_s
        self._stopped = threading.Event()
        self.problem: str | None = None
        threading.Thread(target=self._run, name="chunkkv-canary", daemon=True).start()

    def stop(self) -> None:
        """Ask no more."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            self.problem = self._lasting_problem()
            if self.problem is not None:
                return

    def _lasting_problem(self) -> str | None:
        began, failures = time.monotonic(), 0
        while problem := self._ask():
            failures += 1
            silent_s = time.monotonic() - began
            if failures > 1 and (silent_s >= self._timeout_s or ENGINE_CODE in problem):
                return f"{failures} canaries failed in {silent_s:.1f} s, the last with: {problem}"
            if self._stopped.wait(min(1.0, self._interval_s)):
                return None
        return None
