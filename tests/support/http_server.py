"""A real server in this process: uvicorn on a free port of the loopback interface."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx

from chunkkv.batching import BatchingLimits, ContinuousBatcher, Load
from chunkkv.serve.app import make_app
from chunkkv.serve.server import HttpServer, listening_socket
from chunkkv.serve.service import Service, ServiceLimits
from chunkkv.session import ChunkKVSession

KV_BYTES = 400_000_000


class ServedEngine:
    """A server, its service and a client of it."""

    def __init__(self, server: HttpServer, service: Service, headers: dict[str, str]) -> None:
        self.server, self.service = server, service
        self.url = f"http://127.0.0.1:{server.port}"
        self.client = httpx.Client(base_url=self.url, timeout=120, headers=headers)

    def post(self, path: str, **body: object) -> httpx.Response:
        """Send a body of these fields."""
        return self.client.post(path, json=body)

    def events(self, path: str, **body: object) -> list[str]:
        """Return the data of the server-sent events that a body of these fields gives."""
        with self.client.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            return [line.removeprefix("data: ") for line in response.iter_lines() if line]

    def wait_until(self, holds: Callable[[Load], bool], seconds: float = 20) -> None:
        """Return when the batcher's load is as it should be; fails after `seconds`."""
        until = time.monotonic() + seconds
        while not holds(load := self.service.batcher.load()):
            assert time.monotonic() < until, load
            time.sleep(0.002)


@contextmanager
def served(
    session: ChunkKVSession,
    limits: ServiceLimits | None = None,
    batching: BatchingLimits | None = None,
    keys: tuple[str, ...] = (),
) -> Iterator[ServedEngine]:
    """Serve `session` until the block ends."""
    with ContinuousBatcher(session, batching or BatchingLimits(kv_bytes=KV_BYTES)) as batcher:
        service = Service(batcher, "needle", limits or ServiceLimits(context_bytes=KV_BYTES))
        server = HttpServer(make_app(service, keys), listening_socket("127.0.0.1", 0), service, 5)
        server.start()
        engine = ServedEngine(server, service, {"Authorization": f"Bearer {keys[0]}"} if keys else {})
        try:
            yield engine
        finally:
            engine.client.close()
            server.stop()
            server.wait()
