"""Whether a server really serves: a canary request, because Triton calls a model ready whose process is dead."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

CANARY_ID = "chunkkv-canary"  # requests with this id are in no log and no metric
CANARY = {"id": CANARY_ID, "text_input": "a", "max_tokens": 1}
# Codes in the errors of a model that lives but takes no more work.
BUSY_CODES = ("CHUNKKV_OVERLOADED", "CHUNKKV_TIMEOUT")
_FORWARDS = "tensorrt_llm_model_name"  # a parameter that only BLS models have
_TEXT_INPUTS = {"text_input", "max_tokens"}


class Health:
    """Asks the HTTP endpoint of a server for its health.

    Parameters
    ----------
    host : address that the server listens on; for one that stands for all, the loopback interface is asked.
    port : HTTP port.
    timeout_s : longest time for a canary request, in seconds.
    """

    def __init__(self, host: str, port: int, timeout_s: float) -> None:
        address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        self._base_url = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
        self._timeout_s = timeout_s
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
        """Return what is wrong, None where every model that takes text gives a token or is busy with others' requests.

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
        """Return the models to ask.

        Models that only forward to another model are skipped, unless there is no other: each of their processes serves
        one request at a time, so all of them may be at work while the engine is well.
        """
        engine_models: list[str] = []
        forwarding_models: list[str] = []
        for entry in self._fetch("/v2/repository/index", b"{}"):
            config = self._fetch(f"/v2/models/{entry['name']}/config")
            if {tensor["name"] for tensor in config.get("input", [])} >= _TEXT_INPUTS:
                forwards = _FORWARDS in config.get("parameters", {})
                (forwarding_models if forwards else engine_models).append(entry["name"])
        return engine_models or forwarding_models

    def _canary_error(self, model: str) -> str | None:
        """Ask a model for one token; returns its error, None for a token or a model that is busy."""
        try:
            answer = self._fetch(f"/v2/models/{model}/generate", json.dumps(CANARY).encode(), self._timeout_s)
        except urllib.error.HTTPError as error:
            answer = {"error": error.read().decode(errors="replace")}
        message = answer.get("error")
        return None if message is None or any(code in message for code in BUSY_CODES) else str(message)

    def _fetch(self, path: str, body: bytes | None = None, timeout_s: float = 10) -> Any:
        """Return the JSON answer to a GET, or to a POST of `body`; None for an empty one."""
        with self._opener.open(urllib.request.Request(self._base_url + path, body), timeout=timeout_s) as response:
            content = response.read()
        return json.loads(content) if content else None
