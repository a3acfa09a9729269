"""The real application over a fake engine, called in process or over a loopback socket."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson
import uvicorn
from fastapi import APIRouter, FastAPI
from support.fake_engine import FakeDirectory, FakeEngine, FakeGrammar

from manyhats.api.factory import create_api
from manyhats.api.readiness import Readiness
from manyhats.api.shadows import Shadows
from manyhats.api.state import ApiState
from manyhats.config import Settings
from manyhats.drift.build import Drift
from manyhats.lifecycle.evaluation.service import EvaluationService
from manyhats.lifecycle.operations import Operations
from manyhats.lifecycle.pins import Pins
from manyhats.metrics import Metrics
from manyhats.telemetry.record import Tracer
from manyhats.tenancy.directory import TenantDirectory
from manyhats.tenancy.store_sqlite import SqliteTenantStore


def settings_of(**changes: Any) -> Settings:
    """Settings with small bounds, so that tests can pass them."""
    small = {"max_body_kb": 16, "max_adapter_mb": 1, "max_n": 4, "max_stops": 3, "max_logprobs": 5}
    return Settings(**{**small, "default_max_tokens": 32, **changes})


@dataclass
class Api:
    """An application and what is behind it. Every call runs in an event loop of its own."""

    settings: Settings = field(default_factory=settings_of)
    engine: FakeEngine = field(default_factory=FakeEngine)
    directory: FakeDirectory = field(default_factory=FakeDirectory)
    grammar: FakeGrammar = field(default_factory=FakeGrammar)
    metrics: Metrics = field(default_factory=lambda: Metrics(10, clock=lambda: 1234.5))
    routers: Sequence[APIRouter] = ()
    drift: Drift | None = None
    tenants: TenantDirectory = field(
        default_factory=lambda: TenantDirectory(SqliteTenantStore(":memory:"))
    )

    evaluations: EvaluationService | None = None
    operations: Operations | None = None
    pins: Pins | None = None
    shadows: Shadows | None = None
    readiness: Readiness = field(default_factory=lambda: Readiness(proven=True))
    tracer: Tracer | None = None

    def __post_init__(self) -> None:
        self.app: FastAPI = create_api(
            ApiState(
                self.settings,
                self.engine,
                self.directory,
                self.metrics,
                self.grammar,
                self.tenants,
                readiness=self.readiness,
                drift_detection=self.drift,
                evaluations=self.evaluations,
                operations=self.operations,
                pins=self.pins,
                shadows=self.shadows,
                tracer=self.tracer,
            ),
            self.routers,
        )

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request through the application."""

        async def run() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **options)

        return asyncio.run(run())

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.send("GET", path, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """Posts JSON; ``body`` may be bytes, sent as they are."""
        content = body if isinstance(body, bytes) else orjson.dumps(body)
        headers = {"content-type": "application/json", **options.pop("headers", {})}
        return self.send("POST", path, content=content, headers=headers, **options)

    def complete(self, *, headers: Mapping[str, Any] | None = None, **body: Any) -> httpx.Response:
        body = {"model": "org/base", "prompt": "Hi", **body}
        return self.post("/v1/completions", body, headers=headers or {})

    def chat(self, *, headers: Mapping[str, Any] | None = None, **body: Any) -> httpx.Response:
        body = {"model": "org/base", "messages": [{"role": "user", "content": "Hi"}], **body}
        return self.post("/v1/chat/completions", body, headers=headers or {})

    def series(self) -> dict[str, float]:
        """The samples of /metrics by their text."""
        lines = self.get("/metrics").text.splitlines()
        samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}


def events(response: httpx.Response) -> list[Any]:
    """The JSON of a stream's events; the end mark stays the string ``[DONE]``."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    data = [block.removeprefix("data: ") for block in blocks]
    return [item if item == "[DONE]" else orjson.loads(item) for item in data]


def assert_error(
    response: httpx.Response, status: int, code: str, param: str | None, *words: str
) -> Mapping[str, Any]:
    """The response is an OpenAI-shaped error of exactly this kind, ``words`` in its message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    error: Mapping[str, Any] = body["error"]
    assert set(error) == {"message", "type", "code", "param"}
    assert (error["code"], error["param"]) == (code, param), error
    for word in words:
        assert word in error["message"], (word, error["message"])
    return error


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = threading.Event()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.up.set()


@contextmanager
def serving(app: FastAPI) -> Iterator[tuple[str, int]]:
    """Serves ``app`` on a free loopback port, in a thread; gives the address."""
    server = _Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert server.up.wait(30)
        yield server.servers[0].sockets[0].getsockname()[:2]
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
