"""Sends the answer of one request to its client while it grows, and records how the request ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from chunkkv.errors import ChunkKVError, EngineMismatchError, OverloadedError, RequestError, RequestTimeoutError
from chunkkv.logs import fields
from chunkkv.requests import Request
from chunkkv.results import GenerationResult, StreamEvent
from chunkkv.sampling import TokenChoice
from chunkkv.triton.models.backend import PbError, PbTensor, PythonBackend, ResponseSender
from chunkkv.triton.models.metrics import Metrics

# How a request failed: the code that begins its error. Triton's own codes do not reach every client.
ERROR_CODES = {
    "invalid": "CHUNKKV_INVALID",
    "rejected": "CHUNKKV_OVERLOADED",
    "timeout": "CHUNKKV_TIMEOUT",
    "error": "CHUNKKV_INTERNAL",
}
CANCEL_POLL_S = 0.02  # no client waits for so short a time to be noticed
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResponsePart:
    """What one response carries.

    Parameters
    ----------
    text : text since the response before.
    token_ids : token ids since the response before.
    is_first : whether no response came before.
    request : the checked request.
    result : the whole answer in the last response, None in all others.
    choices : those tokens with their log probabilities, where the request asks for them. Default: none.
    """

    text: str
    token_ids: list[int]
    is_first: bool
    request: Request
    result: GenerationResult | None
    choices: tuple[TokenChoice, ...] = ()


# What a canary is answered with: no token of no request.
CANARY_PART = ResponsePart("", [], True, Request(np.zeros(0, np.int64), 0, 0, 0), None)


@dataclass(frozen=True)
class Responder:
    """Sends the responses of one request, and writes its log line and metrics when it ends.

    Parameters
    ----------
    backend : Triton's module for python models.
    sender : the request's own sender.
    request_id : the id that the client chose, or one made for it.
    metrics : the model's metrics.
    arrived_at : time.perf_counter() when the request came. Default: now.
    """

    backend: PythonBackend
    sender: ResponseSender
    request_id: str
    metrics: Metrics
    arrived_at: float = field(default_factory=time.perf_counter)

    def send(self, outputs: Sequence[PbTensor], is_last: bool) -> None:
        """Send one response."""
        flags = self.backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_last else 0
        self.sender.send(self.backend.InferenceResponse(output_tensors=outputs), flags=flags)

    def end(self) -> None:
        """End the answer without another response."""
        self.sender.send(flags=self.backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def fail(self, error: Exception) -> None:
        """Send an error as the last response; log and count it."""
        outcome = _outcome(error)
        message = str(error) if isinstance(error, ChunkKVError) else f"{type(error).__name__}: {error}"
        level = logging.ERROR if outcome == "error" else logging.WARNING
        _log.log(level, f"request_{outcome}", extra=fields(request_id=self.request_id, message=message))
        self.metrics.count(outcome)
        response = self.backend.InferenceResponse(output_tensors=[], error=triton_error(self.backend, outcome, message))
        self.sender.send(response, flags=self.backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def record(self, result: GenerationResult, first_token_at: float) -> None:
        """Log and count an answer that has just ended; `first_token_at` is the time.perf_counter() of its start."""
        statistics, now = result.statistics, time.perf_counter()
        tpot_s = (now - first_token_at) / (statistics.new_tokens - 1) if statistics.new_tokens > 1 else None
        self.metrics.count(result.finish_reason, result, tpot_s)
        _log.info(
            "request_done",
            extra=fields(
                request_id=self.request_id,
                finish_reason=result.finish_reason,
                prompt_tokens=statistics.prompt_tokens,
                kept_tokens=statistics.kept_tokens,
                new_tokens=statistics.new_tokens,
                ttft_ms=round(statistics.ttft_s * 1e3, 3),
                tpot_ms=None if tpot_s is None else round(tpot_s * 1e3, 3),
                total_ms=round((now - self.arrived_at) * 1e3, 3),
            ),
        )


def _do_nothing() -> None:
    pass


@dataclass
class AnswerListener:
    """Listens to the answer of one request and sends it; the batcher calls it from its own thread.

    Parameters
    ----------
    responder : sends the responses.
    reply : makes the output tensors of one response.
    stream : send a response for each new piece of text; else one for the whole answer.
    stream_interval_s : tokens that come sooner after the last response than this share one. Default: 0 seconds.
    on_end : called once, after the last response or the error. Default: nothing.
    """

    responder: Responder
    reply: Callable[[ResponsePart], Sequence[PbTensor]]
    stream: bool
    stream_interval_s: float = 0.0
    on_end: Callable[[], None] = _do_nothing
    _is_stopped: bool = field(default=False, init=False)
    _is_stopped_by_client: bool = field(default=False, init=False)
    _asked_at: float = field(default=0.0, init=False)
    _request: Request | None = field(default=None, init=False)
    _unsent: list[StreamEvent] = field(default_factory=list, init=False)
    _first_token_at: float | None = field(default=None, init=False)
    _last_response_at: float | None = field(default=None, init=False)

    def stop(self) -> None:
        """End the answer before its next token; its last response then says `cancelled`. Any thread may call it."""
        self._is_stopped = True

    def is_cancelled(self) -> bool:
        """Return whether the client has gone, or stop() was called.

        The batcher asks before every token, and each answer of Triton is a message to the server, so Triton is asked
        every CANCEL_POLL_S seconds.
        """
        if not self._is_stopped and (now := time.perf_counter()) - self._asked_at >= CANCEL_POLL_S:
            self._asked_at, self._is_stopped_by_client = now, self.responder.sender.is_cancelled()
        return self._is_stopped or self._is_stopped_by_client

    def on_accepted(self, request: Request) -> None:
        """Keep the checked request."""
        self._request = request

    def on_event(self, event: StreamEvent) -> None:
        """Send what is unsent if it is time for a response; the last event always is."""
        now = time.perf_counter()
        self._first_token_at = self._first_token_at or now
        self._unsent.append(event)
        if event.finished is None:
            if self._is_due(now):
                self._send(now, None)
            return
        try:
            self.responder.record(event.finished, self._first_token_at)
            if event.finished.finish_reason == "cancelled" and not self._is_stopped:
                self.responder.end()  # nobody would read the tensors
            else:
                self._send(now, event.finished)
        finally:
            self.on_end()

    def on_error(self, error: Exception) -> None:
        """Send an error as the last response."""
        try:
            self.responder.fail(error)
        finally:
            self.on_end()

    def _is_due(self, now: float) -> bool:
        if not self.stream or not any(event.text for event in self._unsent):
            return False
        return self._last_response_at is None or now - self._last_response_at >= self.stream_interval_s

    def _send(self, now: float, result: GenerationResult | None) -> None:
        assert self._request is not None, "the batcher accepts a request before it answers"
        events, self._unsent = self._unsent, []
        token_ids = [token for event in events for token in event.token_ids]
        part = ResponsePart(
            text="".join(event.text for event in events),
            token_ids=token_ids,
            is_first=self._last_response_at is None,
            request=self._request,
            result=result,
            choices=tuple(choice for event in events for choice in event.choices),
        )
        self._last_response_at = now
        self.responder.send(self.reply(part), is_last=result is not None)


def _outcome(error: Exception) -> str:
    if isinstance(error, OverloadedError):
        return "rejected"
    if isinstance(error, RequestTimeoutError):
        return "timeout"
    return "invalid" if isinstance(error, (RequestError, EngineMismatchError)) else "error"


def triton_error(backend: PythonBackend, outcome: str, message: str) -> PbError:
    """Return an error as a response carries it; `outcome` is one of ERROR_CODES."""
    errors = backend.TritonError
    codes = {"invalid": errors.INVALID_ARG, "rejected": errors.UNAVAILABLE, "timeout": errors.UNAVAILABLE}
    return errors(f"{ERROR_CODES[outcome]}: {message}", codes.get(outcome, errors.INTERNAL))
