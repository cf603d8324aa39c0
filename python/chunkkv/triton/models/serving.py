"""What every Triton model that holds an engine shares: the session, its batcher, metrics, logs, and its clients."""

from __future__ import annotations

import faulthandler
import json
import os
import threading
import time
from collections.abc import Callable
from itertools import count
from typing import Any

from chunkkv.batching.batcher import BatchingLimits, ContinuousBatcher
from chunkkv.errors import (
    ChunkKVError,
    ConfigError,
    EngineMismatchError,
    OverloadedError,
    RequestError,
    RequestTimeoutError,
)
from chunkkv.requests import Prompt, Request
from chunkkv.results import GenerationResult, StreamEvent
from chunkkv.session import ChunkKVSession
from chunkkv.triton.models.inputs import Wish
from chunkkv.triton.models.logs import LEVELS, Log
from chunkkv.triton.models.metrics import Metrics
from chunkkv.triton.server.health import CANARY_ID

CODES = {"invalid": "CHUNKKV_INVALID", "rejected": "CHUNKKV_OVERLOADED", "timeout": "CHUNKKV_TIMEOUT"}
INTERNAL = "CHUNKKV_INTERNAL"
STUCK_S = 10  # without the interpreter lock for so long, a model process ends itself
_BYTES_PER_TOKEN = 32  # default bound of a prompt's bytes; no tokenizer needs so many for one token of prose
_LEAST_PROMPT_BYTES = 1 << 16


class Parameters:
    """The `parameters` of a model's configuration; raises ConfigError that names the one that is wrong."""

    def __init__(self, model_config: str) -> None:
        self._values = {
            name: entry["string_value"] for name, entry in json.loads(model_config).get("parameters", {}).items()
        }

    def text(self, name: str, default: str | None = None) -> str:
        """Return a parameter, `default` where it is missing or empty."""
        value = self._values.get(name) or default
        if value is None:
            raise ConfigError(f"parameter {name} is missing in config.pbtxt; write the repository again")
        return value

    def number(self, name: str, kind: type, default: Any) -> Any:
        """Return a parameter as int or float."""
        value = self._values.get(name)
        if not value:
            return default
        try:
            return kind(value)
        except ValueError:
            raise ConfigError(f"parameter {name} is {value!r} in config.pbtxt; give a number") from None


class Serving:
    """An engine behind a Triton model; `args` are what the python backend hands to initialize()."""

    def __init__(self, pb_utils: Any, args: dict[str, str]) -> None:
        self._pb = pb_utils
        parameters = Parameters(args["model_config"])
        level = parameters.text("log_level", "info")
        if level not in LEVELS:
            raise ConfigError(f"parameter log_level is {level!r}; allowed is {' or '.join(LEVELS)}")
        self.log = Log(level, model=args["model_name"])
        started = time.perf_counter()
        threads = parameters.number("threads", int, None)
        self.session = ChunkKVSession.from_dir(parameters.text("engine_dir"), threads)
        limits = self.session.limits
        self.batcher = ContinuousBatcher(
            self.session,
            BatchingLimits(
                slots=parameters.number("slots", int, min(BatchingLimits.slots, limits.max_batch_size)),
                waiting=parameters.number("waiting", int, BatchingLimits.waiting),
                queue_timeout_s=parameters.number("queue_timeout_s", float, BatchingLimits.queue_timeout_s),
                request_timeout_s=parameters.number("request_timeout_s", float, BatchingLimits.request_timeout_s),
                kv_bytes=parameters.number("kv_bytes", int, None),
            ),
        )
        bound = max(_LEAST_PROMPT_BYTES, _BYTES_PER_TOKEN * limits.max_input_len)
        self.max_prompt_bytes = parameters.number("max_prompt_bytes", int, bound)
        self.stream_interval_s = parameters.number("stream_interval_ms", float, 0.0) / 1e3
        labels = {"model": args["model_name"], "version": args["model_version"]}
        self.metrics = Metrics(pb_utils, labels, self.batcher.load)
        self._numbers = count(1)
        watch_parent()
        self.log("info", "engine_loaded", seconds=round(time.perf_counter() - started, 3))

    def submit(self, client: Client, make: Callable[[], tuple[Prompt, Wish]]) -> None:
        """Read a request with `make` and queue it; whatever is wrong becomes the client's answer."""
        try:
            prompt, client.wish = make()
            budget = {"keep_ratio": client.wish.keep_ratio, "budget_tokens": client.wish.budget_tokens}
            self.batcher.submit(prompt, client.wish.sampling, client, **budget, probe=client.is_canary)
        except Exception as error:
            client.on_error(error)

    def name_of(self, request: Any) -> str:
        """Return the request's id, or a number where its client gave none."""
        return request.request_id() or f"{os.getpid()}-{next(self._numbers)}"

    def error(self, outcome: str, message: str) -> Any:
        """Return an error that begins with a code, because codes of their own do not reach every client."""
        codes = self._pb.TritonError
        code = {"invalid": codes.INVALID_ARG, "rejected": codes.UNAVAILABLE, "timeout": codes.UNAVAILABLE}
        return codes(f"{CODES.get(outcome, INTERNAL)}: {message}", code.get(outcome, codes.INTERNAL))

    def close(self) -> None:
        """End what is open and stop the threads."""
        self.batcher.close()
        self.metrics.close()
        faulthandler.cancel_dump_traceback_later()
        self.log("info", "model_closed")


class Client:
    """The sender of one request: listens to its answer, and keeps the books about it.

    A model gives `tensors`, which makes the output tensors of one response.
    """

    wish: Wish
    request: Request
    prompt = ""  # what the first response repeats of the prompt

    def __init__(self, serving: Serving, request: Any, pb_utils: Any, tensors: Callable[..., list]) -> None:
        self._serving, self._pb, self._tensors = serving, pb_utils, tensors
        self._sender = request.get_response_sender()
        self.name = serving.name_of(request)
        self.is_canary = self.name == CANARY_ID
        self.stopped = threading.Event()
        self._arrived = time.perf_counter()
        self._first = 0.0
        self._sent = -serving.stream_interval_s
        self._held: list[StreamEvent] = []

    def on_accepted(self, request: Request) -> None:
        """Keep the checked request."""
        self.request = request

    def on_event(self, event: StreamEvent) -> None:
        """Send the event's tensors, those of a whole answer at once where the client does not stream."""
        now = time.perf_counter()
        self._first = self._first or now
        self._held.append(event)
        if event.finished is None and not (
            self.wish.stream
            and now - self._sent >= self._serving.stream_interval_s
            and any(held.text for held in self._held)
        ):
            return
        held, self._held, self._sent = self._held, [], now
        final = event.finished is not None
        if final:
            self._keep_books(event.finished)
        if final and event.finished.finish_reason == "cancelled" and not self.stopped.is_set():
            self._sender.send(flags=self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            return
        response = self._pb.InferenceResponse(output_tensors=self._tensors(self, held))
        self._sender.send(response, flags=self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)

    def on_error(self, error: Exception) -> None:
        """Send an error as the last response."""
        outcome = _outcome(error)
        shown = str(error) if isinstance(error, ChunkKVError) else f"{type(error).__name__}: {error}"
        if not self.is_canary:
            level = "error" if outcome == "error" else "warning"
            self._serving.log(level, f"request_{outcome}", request_id=self.name, message=shown)
            self._serving.metrics.count(outcome)
        response = self._pb.InferenceResponse(output_tensors=[], error=self._serving.error(outcome, shown))
        self._sender.send(response, flags=self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def is_cancelled(self) -> bool:
        """Return whether the client has gone or has sent a stop request."""
        return self.stopped.is_set() or self._sender.is_cancelled()

    def _keep_books(self, result: GenerationResult) -> None:
        if self.is_canary:
            return
        costs, now = result.statistics, time.perf_counter()
        tpot = (now - self._first) / (costs.new_tokens - 1) if costs.new_tokens > 1 else None
        self._serving.metrics.count(result.finish_reason, result, tpot)
        self._serving.log(
            "info",
            "request_done",
            request_id=self.name,
            finish_reason=result.finish_reason,
            prompt_tokens=costs.prompt_tokens,
            kept_tokens=costs.kept_tokens,
            new_tokens=costs.new_tokens,
            ttft_ms=round(costs.ttft_s * 1e3, 3),
            tpot_ms=None if tpot is None else round(tpot * 1e3, 3),
            total_ms=round((now - self._arrived) * 1e3, 3),
        )


def _outcome(error: Exception) -> str:
    if isinstance(error, OverloadedError):
        return "rejected"
    if isinstance(error, RequestTimeoutError):
        return "timeout"
    return "invalid" if isinstance(error, (RequestError, EngineMismatchError)) else "error"


def watch_parent() -> None:
    """End this process when the server dies: Triton leaves the process of a decoupled model behind.

    A timer in C, which needs no interpreter lock, ends the process if this thread does not put it off any more.
    """
    parent, nowhere = os.getppid(), open(os.devnull, "w")  # noqa: SIM115 - lives as long as the process

    def watch() -> None:
        while os.getppid() == parent:
            faulthandler.dump_traceback_later(STUCK_S, exit=True, file=nowhere)
            time.sleep(0.2)
        os._exit(17)

    threading.Thread(target=watch, name="chunkkv-parent", daemon=True).start()
