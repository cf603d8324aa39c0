"""The routes of the server."""

from __future__ import annotations

import asyncio
import re
import secrets
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from chunkkv.errors import ChunkKVError
from chunkkv.requests import Prompt
from chunkkv.serve.answering import AnswerGroup
from chunkkv.serve.bodies import chat_messages, check_budget
from chunkkv.serve.completions import Completions, cancel_when_gone
from chunkkv.serve.doors import Doors
from chunkkv.serve.errors import ApiError
from chunkkv.serve.fields import BodyFields
from chunkkv.serve.held import Held
from chunkkv.serve.metrics import ServerMetrics
from chunkkv.serve.service import Service

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def make_app(service: Service, api_keys: tuple[str, ...] = ()) -> Starlette:
    """Return the ASGI application of a service; with `api_keys`, every request but /health needs one of them."""
    metrics = ServerMetrics(service)
    doors = Doors(api_keys, service.limits.max_body_bytes, metrics.count_error)
    completions = Completions(service, doors, metrics)
    pages, contexts = Pages(service, doors, metrics), ContextPages(service, doors)
    guarded = doors.guarded
    routes = [
        Route("/health", pages.health, methods=["GET"]),
        Route("/metrics", guarded(pages.metrics_page), methods=["GET"]),
        Route("/v1/models", guarded(pages.models), methods=["GET"]),
        Route("/v1/models/{model:path}", guarded(pages.model), methods=["GET"]),
        Route("/v1/completions", guarded(completions.text), methods=["POST"]),
        Route("/v1/chat/completions", guarded(completions.chat), methods=["POST"]),
        Route("/tokenize", guarded(pages.tokenize), methods=["POST"]),
        Route("/detokenize", guarded(pages.detokenize), methods=["POST"]),
        Route("/v1/contexts", guarded(contexts.make), methods=["POST"]),
        Route("/v1/contexts", guarded(contexts.all), methods=["GET"]),
        Route("/v1/contexts/{name}", guarded(contexts.one), methods=["GET"]),
        Route("/v1/contexts/{name}", guarded(contexts.delete), methods=["DELETE"]),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: doors.on_http_error})


class Pages:
    """Small pages beside the answers.

    Parameters
    ----------
    service : Service
        What they tell about.
    doors : Doors
        Reads bodies.
    metrics : ServerMetrics
        The page /metrics.
    """

    def __init__(self, service: Service, doors: Doors, metrics: ServerMetrics) -> None:
        self._service, self._doors, self._metrics = service, doors, metrics

    async def health(self, request: Request) -> Response:
        """GET /health: 200 while answers grow, 503 where they do not."""
        try:
            self._service.batcher.check_alive()
        except ChunkKVError as error:
            return JSONResponse({"status": "failed", "message": str(error)}, 503)
        if self._service.is_closing:
            return JSONResponse({"status": "closing"}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics_page(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(self._metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{model}."""
        if (name := request.path_params["model"]) != self._service.model:
            known = self._service.model
            raise ApiError(404, f"there is no model {name!r}; this server has {known!r}", "model", "model_not_found")
        return JSONResponse(self._model_card())

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize: the token ids of `prompt`, or of `messages` in the model's chat template."""
        body = BodyFields(await self._doors.json_body(request))
        body.ignore(("model",))
        add_special_tokens = body.flag("add_special_tokens", True)
        add_generation_prompt = body.flag("add_generation_prompt", True)
        prompt: Prompt
        if body.has("messages"):
            prompt = chat_messages(body)
        elif (text := body.text("prompt")) is not None:
            prompt = text
        else:
            raise ApiError(400, "prompt is missing; give a text as prompt, or messages", "prompt")
        body.refuse_others()
        ids = (
            []
            if prompt == ""
            else await asyncio.to_thread(
                lambda: self._service.encode(prompt, add_special_tokens, add_generation_prompt).tolist()
            )
        )
        return JSONResponse(
            {"count": len(ids), "max_model_len": self._service.session.limits.max_seq_len, "tokens": ids}
        )

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize: the text of `tokens`, special tokens included."""
        body = BodyFields(await self._doors.json_body(request))
        body.ignore(("model",))
        tokens, tokenizer = body.items("tokens"), self._service.session.tokenizer
        body.refuse_others()
        if tokenizer is None:
            raise ApiError(400, "this engine was built without a tokenizer")
        size = self._service.session.limits.vocab_size
        for number, token in enumerate(tokens):
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < size:
                raise ApiError(400, f"tokens[{number}] is {token!r}; give a token id from 0 to {size - 1}", "tokens")
        return JSONResponse({"prompt": tokenizer.decode(tokens, skip_special_tokens=False)})

    def _model_card(self) -> dict[str, Any]:
        limits = self._service.session.limits
        return {
            "id": self._service.model,
            "object": "model",
            "created": self._service.created,
            "owned_by": "chunkkv",
            "max_model_len": limits.max_seq_len,
            "max_input_len": limits.max_input_len,
        }


class ContextPages:
    """Named contexts: documents and conversations that are compressed once.

    Parameters
    ----------
    service : Service
        Makes and holds them.
    doors : Doors
        Reads bodies.
    """

    def __init__(self, service: Service, doors: Doors) -> None:
        self._service, self._doors = service, doors

    async def make(self, request: Request) -> Response:
        """POST /v1/contexts: compress `document`, `messages` or `prompt`."""
        body = BodyFields(await self._doors.json_body(request))
        name = body.text("id") or f"ctx-{secrets.token_hex(8)}"
        if not _NAME.fullmatch(name):
            raise body.error("id", "give up to 128 letters, digits, '.', '_' and '-', the first a letter or digit")
        prompt = self._prompt(body)
        keep_ratio, budget_tokens = body.number("keep_ratio"), body.whole("budget_tokens", low=1)
        scorer = body.text("scorer")
        body.refuse_others()
        check_budget(keep_ratio, budget_tokens, scorer)
        group = AnswerGroup(asyncio.get_running_loop())
        leaving = asyncio.create_task(cancel_when_gone(request.receive, group))
        try:
            hold = await asyncio.to_thread(
                self._service.begin_context, name, prompt, keep_ratio, budget_tokens, scorer, group
            )
            async for _ in group.pieces():
                pass
            return JSONResponse(_described(hold()), 201)
        finally:
            leaving.cancel()

    async def all(self, request: Request) -> Response:
        """GET /v1/contexts."""
        held = self._service.store.all_named()
        return JSONResponse({"object": "list", "data": [_described(each) for each in held]})

    async def one(self, request: Request) -> Response:
        """GET /v1/contexts/{id}."""
        name = request.path_params["name"]
        held = self._service.store.named(name)
        if held is None:
            raise ApiError(404, f"there is no context {name!r}", "id", "not_found")
        return JSONResponse(_described(held))

    async def delete(self, request: Request) -> Response:
        """DELETE /v1/contexts/{id}: requests that use it already go on."""
        name = request.path_params["name"]
        if not self._service.store.delete(name):
            raise ApiError(404, f"there is no context {name!r}", "id", "not_found")
        return JSONResponse({"id": name, "object": "context.deleted", "deleted": True})

    def _prompt(self, body: BodyFields) -> Prompt:
        """Return what to compress; a document is a message of the user where the model has a chat template."""
        given = [name for name in ("document", "messages", "prompt") if body.has(name)]
        if len(given) != 1:
            raise ApiError(400, "give one of document, messages and prompt", given[0] if given else "document")
        if given[0] == "messages":
            return chat_messages(body)
        value = body.any(given[0])
        if given[0] == "document":
            text = body.text("document") or ""
            if not text.strip():
                raise body.error("document", "give at least one word")
            tokenizer = self._service.session.tokenizer
            chats = tokenizer is not None and tokenizer.chat_template is not None
            return [{"role": "user", "content": text}] if chats else text
        if not isinstance(value, (str, list)):
            raise body.error("prompt", "give text or token ids")
        return value


def _described(held: Held) -> dict[str, Any]:
    context = held.context
    return {
        "id": held.name,
        "object": "context",
        "created": int(context.created_at),
        "tokens": len(context),
        "kept_tokens": context.kept_tokens,
        "bytes": held.nbytes,
        "scorer": context.scorer,
    }
