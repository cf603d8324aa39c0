"""Whether a server really serves: a canary request, because Triton calls a model ready whose process is dead."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

CANARY_ID = "chunkkv-canary"  # of requests that are in no log and no metric
CANARY = {"id": CANARY_ID, "text_input": "a", "max_tokens": 1}
# Words of a model that lives but takes no more work.
BUSY = ("CHUNKKV_OVERLOADED", "CHUNKKV_TIMEOUT")
_HANDS_ON = "tensorrt_llm_model_name"  # a parameter of BLS models
_WANTED = {"text_input", "max_tokens"}


class Health:
    """Asks the HTTP endpoint of the server at `host`; a canary may take `timeout_s`."""

    def __init__(self, host: str, port: int, timeout_s: float) -> None:
        there = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        self._base = f"http://[{there}]:{port}" if ":" in there else f"http://{there}:{port}"
        self._timeout_s = timeout_s
        self._models: list[str] | None = None
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def is_ready(self) -> bool:
        """Return whether the server says that all models are loaded."""
        try:
            self._ask("/v2/health/ready", timeout_s=2)
            return True
        except OSError:
            return False

    def problem(self, is_wanted: Callable[[], bool] = lambda: True) -> str | None:
        """Return what is wrong, None where every model that takes text gives a token or is busy with others' requests.

        A failure that comes while `is_wanted` says False is none.
        """
        try:
            if self._models is None:
                self._models = self._text_models()
            for name in self._models:
                if wrong := self._canary(name):
                    return f"model {name}: {wrong}" if is_wanted() else None
        except (OSError, ValueError) as error:
            return f"{type(error).__name__}: {error}" if is_wanted() else None
        return None

    def _text_models(self) -> list[str]:
        """Return the models to ask; one that hands on to another's engine is left out where others are there, because
        it may have all its processes at work on one request each."""
        found, hand_on = [], []
        for entry in self._ask("/v2/repository/index", b"{}", 10):
            config = self._ask(f"/v2/models/{entry['name']}/config", timeout_s=10)
            if {value["name"] for value in config.get("input", [])} >= _WANTED:
                (hand_on if _HANDS_ON in config.get("parameters", {}) else found).append(entry["name"])
        return found or hand_on

    def _canary(self, model: str) -> str | None:
        try:
            answer = self._ask(f"/v2/models/{model}/generate", json.dumps(CANARY).encode(), self._timeout_s)
        except urllib.error.HTTPError as error:
            answer = {"error": error.read().decode(errors="replace")}
        wrong = answer.get("error")
        return None if wrong is None or any(word in wrong for word in BUSY) else str(wrong)

    def _ask(self, path: str, body: bytes | None = None, timeout_s: float = 10) -> Any:
        with self._opener.open(urllib.request.Request(self._base + path, body), timeout=timeout_s) as response:
            content = response.read()
        return json.loads(content) if content else None
