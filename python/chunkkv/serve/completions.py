"""/v1/completions and /v1/chat/completions: whole answers, or a stream of server-sent events."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from chunkkv.errors import OverloadedError
from chunkkv.results import StreamEvent
from chunkkv.serve.answering import AnswerGroup, AnswerPiece
from chunkkv.serve.bodies import Ask, chat_ask, completion_ask
from chunkkv.serve.doors import Doors, elapsed_ms
from chunkkv.serve.errors import api_error
from chunkkv.serve.metrics import ServerMetrics
from chunkkv.serve.service import Service
from chunkkv.serve.shapes import DONE, Reply, server_event

_log = logging.getLogger(__name__)


class Completions:
    """Answers prompts.

    Parameters
    ----------
    service : Service
        Answers.
    doors : Doors
        Reads bodies.
    metrics : ServerMetrics
        Counts answers.
    """

    def __init__(self, service: Service, doors: Doors, metrics: ServerMetrics) -> None:
        self._service, self._doors, self._metrics = service, doors, metrics

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, chat_ask)

    async def text(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, completion_ask)

    async def _answer(self, request: Request, read: Callable[[Mapping[str, Any], str], Ask]) -> Response:
        began = time.perf_counter()
        ask = read(await self._doors.json_body(request), self._service.model)
        group = AnswerGroup(asyncio.get_running_loop())
        has_begun = False
        leaving = asyncio.create_task(cancel_when_gone(request.receive, group))
        pieces = group.pieces()
        try:
            await asyncio.to_thread(self._service.begin, ask, group)
            reply = Reply(ask, self._service.model, self._service.session.tokenizer, group.requests)
            # The status is sent with the first token, so that what ends a request in the queue has a status of its own.
            first = await anext(pieces)
            has_begun = True
            if ask.stream:
                leaving.cancel()
                return EventStream(self._events(request, reply, first, pieces, began), group)
            events: list[list[StreamEvent]] = [[] for _ in group.requests]
            events[first.number].append(first.event)
            self._note(request, first.event, began)
            async for piece in pieces:
                events[piece.number].append(piece.event)
                self._note(request, piece.event, began)
            return JSONResponse(reply.whole(events))
        except Exception as error:
            group.cancel()
            return self._doors.refusal(request, api_error(error, ask.prompt_field, has_begun), began)
        except asyncio.CancelledError:  # the server has to end before a block of the engine does
            closing = OverloadedError("the server was stopped before the answer was complete; ask again")
            return self._doors.refusal(request, api_error(closing, ask.prompt_field, has_begun), began)
        finally:
            leaving.cancel()

    async def _events(
        self, request: Request, reply: Reply, first: AnswerPiece, pieces: AsyncIterator[AnswerPiece], began: float
    ) -> AsyncIterator[bytes]:
        """Yield the server-sent events of a stream; an error is the last event before the end."""
        try:
            self._note(request, first.event, began)
            yield server_event(reply.chunk(first))
            async for piece in pieces:
                self._note(request, piece.event, began)
                yield server_event(reply.chunk(piece))
            if reply.ask.include_usage:
                yield server_event(reply.usage_chunk())
        except Exception as error:
            failed = api_error(error, reply.ask.prompt_field, has_begun=True)
            self._doors.refusal(request, failed, began)
            yield server_event(failed.body())
        yield DONE

    def _note(self, request: Request, event: StreamEvent, began: float) -> None:
        """Count and log an answer at its end."""
        if event.finished is None:
            return
        statistics = event.finished.statistics
        self._metrics.count(event.finished)
        values = {
            "path": request.url.path,
            "finish_reason": event.finished.finish_reason,
            "prompt_tokens": statistics.prompt_tokens,
            "cached_tokens": statistics.context_tokens,
            "kept_tokens": statistics.kept_tokens,
            "new_tokens": statistics.new_tokens,
            "ttft_ms": round(statistics.ttft_s * 1e3, 3),
            "total_ms": elapsed_ms(began),
        }
        _log.info("request_done", extra={"fields": values})


class EventStream(Response):
    """Sends server-sent events; a client that leaves cancels the answers at once.

    Parameters
    ----------
    events : async iterator of bytes
        The events.
    group : AnswerGroup
        The answers.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], group: AnswerGroup) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._group = events, group

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        leaving = asyncio.create_task(cancel_when_gone(receive, self._group))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._group.cancel()
            leaving.cancel()


async def cancel_when_gone(receive: Receive, group: AnswerGroup) -> None:
    """Cancel the answers as soon as the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
    group.cancel()
