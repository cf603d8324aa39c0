"""What every request passes: the key, the size and type of its body, and errors as OpenAI's clients know them."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from chunkkv.serve.errors import ApiError, api_error
from chunkkv.serve.fields import json_object

Handler = Callable[[Request], Awaitable[Response]]
_log = logging.getLogger(__name__)


class Doors:
    """Wraps handlers.

    Parameters
    ----------
    api_keys : tuple of str
        Who may ask; empty lets everybody.
    max_body_bytes : int
        Largest body.
    count_error : callable
        Is told of every request that fails.
    """

    def __init__(self, api_keys: tuple[str, ...], max_body_bytes: int, count_error: Callable[[ApiError], None]) -> None:
        self._keys = tuple(key.encode() for key in api_keys)
        self._max_body_bytes, self._count_error = max_body_bytes, count_error

    def guarded(self, handler: Handler) -> Handler:
        """Return a handler that asks for the key first, and answers with an error object whatever it raises."""

        async def run(request: Request) -> Response:
            began = time.perf_counter()
            try:
                self._check_key(request)
                return await handler(request)
            except ClientDisconnect:
                return Response(status_code=499)  # nobody reads it
            except Exception as error:
                return self.refusal(request, api_error(error), began)

        return run

    async def on_http_error(self, request: Request, error: Exception) -> Response:
        """Return what Starlette refuses, an unknown path for example, as an error object."""
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}"
        return self.refusal(request, ApiError(error.status_code, message), time.perf_counter())

    def refusal(self, request: Request, error: ApiError, began: float) -> Response:
        """Log, count and return an error."""
        self._count_error(error)
        level = logging.ERROR if error.status == 500 else logging.WARNING
        values = {"path": request.url.path, "status": error.status, "param": error.param, "message": str(error)}
        _log.log(level, "request_refused", extra={"fields": {**values, "total_ms": elapsed_ms(began)}})
        return JSONResponse(error.body(), error.status, error.headers)

    async def json_body(self, request: Request) -> dict[str, Any]:
        """Return the JSON object of a body, which is never larger in memory than allowed."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a page in a browser cannot send this type to another server unasked
            raise ApiError(415, f"the content type is {kind!r}; send application/json")
        most, length = self._max_body_bytes, request.headers.get("content-length", "0")
        too_large = ApiError(
            413, f"the body is larger than the {most} bytes that this server takes: send less", None, "body_too_large"
        )
        if not length.isdecimal() or int(length) > most:
            raise too_large
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise too_large
            parts.append(part)
        return json_object(b"".join(parts))

    def _check_key(self, request: Request) -> None:
        if not self._keys:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = key.strip().encode() if scheme.lower() == "bearer" else b""
        # All keys are compared, so that the time says nothing.
        if not sum(hmac.compare_digest(given, known) for known in self._keys):
            raise ApiError(
                401, "the API key is missing or wrong; send Authorization: Bearer KEY", None, "invalid_api_key"
            )


def elapsed_ms(began: float) -> float:
    """Return the milliseconds since a time.perf_counter()."""
    return round((time.perf_counter() - began) * 1e3, 3)
