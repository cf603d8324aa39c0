"""What every Triton model that holds an engine shares: parameters, the session, its batcher, metrics and logs."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import TypeVar

from chunkkv.batching import BatchingLimits, ContinuousBatcher
from chunkkv.errors import ChunkKVError, ConfigError
from chunkkv.logs import LEVELS, configure, fields
from chunkkv.session import ChunkKVSession
from chunkkv.triton.models.answers import AnswerListener, Responder, triton_error
from chunkkv.triton.models.backend import PbRequest, PbTensor, PythonBackend, ReadTensor
from chunkkv.triton.models.inputs import ParsedRequest
from chunkkv.triton.models.metrics import Metrics
from chunkkv.triton.server.health import canary_id

LOCK_TIMEOUT_S = 30  # without the interpreter lock for so long, a model process ends itself
_BYTES_PER_TOKEN = 32  # default bound of a prompt's bytes; no tokenizer needs so many for one token of prose
_LEAST_PROMPT_BYTES = 1 << 16
STANDARD_ERROR = 2  # the file number
_COMMAND_LINE = Path("/proc/self/cmdline")
_RANDOM_NAME = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"  # what Triton adds to the prefix
_Number = TypeVar("_Number", int, float)
_Default = TypeVar("_Default")
_log = logging.getLogger(__name__)


class Parameters:
    """The `parameters` of a model's configuration; raises ConfigError that names the one that is wrong.

    Parameters
    ----------
    model_config : the configuration as JSON, which tritonserver hands to initialize().
    """

    def __init__(self, model_config: str) -> None:
        self._values: dict[str, str] = {
            name: entry["string_value"] for name, entry in json.loads(model_config).get("parameters", {}).items()
        }

    def text(self, name: str, default: str | None = None) -> str:
        """Return a parameter, `default` where it is missing or empty."""
        value = self._values.get(name) or default
        if value is None:
            raise ConfigError(f"parameter {name} is missing in config.pbtxt; write the repository again")
        return value

    def number(self, name: str, kind: Callable[[str], _Number], default: _Default) -> _Number | _Default:
        """Return a parameter as `kind`, int or float, and `default` where it is missing or empty."""
        value = self._values.get(name)
        if not value:
            return default
        try:
            return kind(value)
        except ValueError:
            raise ConfigError(f"parameter {name} is {value!r} in config.pbtxt; give a number") from None


class Serving:
    """An engine behind a Triton model.

    Parameters
    ----------
    backend : Triton's module for python models.
    args : what the python backend hands to initialize().
    """

    def __init__(self, backend: PythonBackend, args: dict[str, str]) -> None:
        self._backend = backend
        parameters = Parameters(args["model_config"])
        level = parameters.text("log_level", "info")
        if level not in LEVELS:
            raise ConfigError(f"parameter log_level is {level!r}; allowed is {' or '.join(LEVELS)}")
        configure(level, model=args["model_name"])
        started = time.perf_counter()
        threads = parameters.number("threads", int, None)
        self.session = ChunkKVSession.from_dir(parameters.text("engine_dir"), threads)
        limits = self.session.limits
        self.batcher = ContinuousBatcher(
            self.session,
            BatchingLimits(
                slots=parameters.number("slots", int, None),
                waiting=parameters.number("waiting", int, BatchingLimits.waiting),
                queue_timeout_s=parameters.number("queue_timeout_s", float, BatchingLimits.queue_timeout_s),
                request_timeout_s=parameters.number("request_timeout_s", float, BatchingLimits.request_timeout_s),
                kv_bytes=parameters.number("kv_bytes", int, None),
            ),
        )
        max_prompt_bytes = max(_LEAST_PROMPT_BYTES, _BYTES_PER_TOKEN * limits.max_input_len)
        self.max_prompt_bytes = parameters.number("max_prompt_bytes", int, max_prompt_bytes)
        self.stream_interval_s = parameters.number("stream_interval_ms", float, 0.0) / 1e3
        labels = {"model": args["model_name"], "version": args["model_version"]}
        self._metrics = Metrics(backend, labels, self.batcher.load)
        self._next_number = count(1).__next__
        self._canary_id = canary_id(_shm_prefix())
        watch_parent()
        _log.info("engine_loaded", extra=fields(seconds=round(time.perf_counter() - started, 3)))

    def responder(self, request: PbRequest, backend: PythonBackend | None = None) -> Responder:
        """Return what sends the responses of a request; one whose client gave no id gets one.

        `backend` makes its responses. Default: Triton's own.
        """
        request_id = request.request_id() or f"{os.getpid()}-{self._next_number()}"
        return Responder(backend or self._backend, request.get_response_sender(), request_id, self._metrics)

    def answer_canary(
        self,
        request: PbRequest,
        read: ReadTensor,
        max_tokens: str,
        outputs: Callable[[], Sequence[PbTensor]],
        backend: PythonBackend | None = None,
    ) -> bool:
        """Answer a canary from the heartbeat of the batcher; returns whether the request was one.

        Parameters
        ----------
        request : the request; a canary has the supervisor's id.
        read : reads its tensors.
        max_tokens : name of the tensor that has its greatest length; a canary's is 1.
        outputs : makes the tensors of an answer without a token.
        backend : makes the response. Default: Triton's own.
        """
        length = read(max_tokens) if request.request_id() == self._canary_id else None
        if length is None or length.reshape(-1).tolist() != [1]:
            return False
        backend = backend or self._backend
        try:
            self.batcher.check_alive()
            response = backend.InferenceResponse(output_tensors=outputs())
        except ChunkKVError as error:
            response = backend.InferenceResponse(output_tensors=[], error=triton_error(backend, "error", str(error)))
        request.get_response_sender().send(response, flags=backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return True

    def submit(self, request: ParsedRequest, listener: AnswerListener) -> None:
        """Queue a request; whatever is wrong with it becomes its client's answer."""
        try:
            self.batcher.submit(
                request.prompt,
                request.sampling,
                listener,
                keep_ratio=request.keep_ratio,
                budget_tokens=request.budget_tokens,
                add_special_tokens=request.add_special_tokens,
            )
        except Exception as error:
            listener.on_error(error)

    def close(self) -> None:
        """End what is open and stop the threads."""
        self.batcher.close()
        self._metrics.close()
        faulthandler.cancel_dump_traceback_later()
        _log.info("model_closed")


def _shm_prefix() -> str:
    """Return the prefix of the server's shared memory, which tritonserver hands to every model process."""
    words = _COMMAND_LINE.read_text(encoding="utf-8", errors="replace").split("\0") if _COMMAND_LINE.exists() else []
    regions = (re.fullmatch(f"(.*){_RANDOM_NAME}", word) for word in words)
    return next((region[1] for region in regions if region), "")


def watch_parent() -> None:
    """End this process when the server dies: Triton leaves the process of a decoupled model behind.

    A timer in C ends the process when this thread stops postponing it, and writes where every thread was to standard
    error. The timer needs no interpreter lock, so it works even if an engine holds that for ever.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            faulthandler.dump_traceback_later(LOCK_TIMEOUT_S, exit=True, file=STANDARD_ERROR)
            time.sleep(0.2)
        os._exit(17)

    threading.Thread(target=watch, name="chunkkv-parent", daemon=True).start()
