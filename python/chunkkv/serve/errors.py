"""Errors as clients of OpenAI's API know them: a status, and a JSON object that names the field."""

from __future__ import annotations

import re
from typing import Any

from chunkkv.errors import (
    CacheFullError,
    ChunkKVError,
    ConfigError,
    EngineMismatchError,
    OverloadedError,
    RequestError,
    RequestTimeoutError,
)

RETRY_QUEUE_S = 1  # a seat of the queue comes free as soon as any answer ends
RETRY_LATER_S = 5
# What the library calls otherwise than OpenAI's API does.
_API_NAMES = {"max_new_tokens": "max_tokens"}
_ONE_WORD = ("logprobs", "scorer", "seed", "stop", "temperature")  # fields without an underscore
_TOO_LONG = re.compile(r"this engine takes at most \d+")


class ApiError(ChunkKVError):
    """A request that is answered with an error.

    Parameters
    ----------
    status : int
        HTTP status.
    message : str
        What was given, what is allowed, what to do.
    param : str or None, default None
        The field of the body that is wrong.
    code : str or None, default None
        A word that programs compare.
    retry_after_s : int or None, default None
        When to try again, in seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after_s = status, param, code, retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        param = None if self.param is None else _encodable(self.param)
        return {"error": {"message": _encodable(str(self)), "type": kind, "param": param, "code": self.code}}


def _encodable(text: str) -> str:
    """Return a text with what UTF-8 cannot hold, lone surrogates of the client's JSON, written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def api_error(error: Exception, prompt_field: str = "prompt", has_begun: bool = False) -> ApiError:
    """Return any error as one for the client.

    Parameters
    ----------
    error : Exception
        What went wrong.
    prompt_field : str, default "prompt"
        The field of the body that holds the prompt.
    has_begun : bool, default False
        Whether tokens were made, so that a time-out is not that of the queue.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, (OverloadedError, RequestTimeoutError, CacheFullError)):
        return _not_now(error, has_begun)
    if isinstance(error, (RequestError, EngineMismatchError, ConfigError)):
        return _invalid(str(error), prompt_field)
    message = str(error) if isinstance(error, ChunkKVError) else f"{type(error).__name__}: {error}"
    return ApiError(500, message, None, "internal_error")


def _not_now(error: ChunkKVError, has_begun: bool) -> ApiError:
    """Return the error of a request that may succeed later."""
    if isinstance(error, CacheFullError):
        return ApiError(503, str(error), None, "cache_full", RETRY_LATER_S)
    if isinstance(error, RequestTimeoutError):
        return ApiError(504 if has_begun else 503, str(error), None, "timeout", None if has_begun else RETRY_LATER_S)
    if "queue is full" in str(error):
        return ApiError(429, str(error), None, "queue_full", RETRY_QUEUE_S)
    return ApiError(503, str(error), None, "closing", RETRY_LATER_S)


def _invalid(message: str, prompt_field: str) -> ApiError:
    """Return the error of a wrong request; the library's messages begin with the name of what is wrong."""
    for name, field in _API_NAMES.items():
        message = message.replace(name, field)
    field = message.partition(" ")[0]
    if re.match(r"(prompts?|the context|question) ", message):
        code = "context_length_exceeded" if _TOO_LONG.search(message) else None
        return ApiError(400, re.sub(r"^prompt 0 ", "the prompt ", message), prompt_field, code)
    if (re.fullmatch(r"[a-z_]+", field) and "_" in field) or field in _ONE_WORD:
        return ApiError(400, message, field)
    return ApiError(400, message, prompt_field)
