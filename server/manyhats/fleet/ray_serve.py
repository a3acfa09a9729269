"""An application for Ray Serve: engine replicas, and a gateway that sends each request to the one
that has its adapter.

    serve run manyhats.fleet.ray_serve:build flags="--redis-url redis://..." max_replicas=4

A replica keeps a whole ``manyhats serve`` as a process and passes HTTP through to it. In Ray's own
process it would share the interpreter with Ray's event loops and the CPU's kernels with Ray's
threads (libgomp slows down as soon as a second team is there), and a defect of either would end
both. Passing through costs a hop on loopback; nothing of the server is written twice, and
streaming, errors, limits and draining are the server's.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from manyhats.api.handlers import error_response
from manyhats.fleet.affinity import adapter_key, may_repeat, ranking
from manyhats.fleet.process import EngineGoneError, EngineProcess, NoReplicaError

logger = logging.getLogger(__name__)

_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "host"}
)
_PROXYS = _HOP_BY_HOP | {"date", "server", "x-request-id"}
"""Headers of an answer that Serve's proxy puts there itself; it hands the request's id down."""
_PROBE_S = 5.0


class Fleet(BaseModel):
    """What ``build`` takes. ``flags``: those of ``manyhats serve`` (its settings may come as
    variables too); ``home``: a folder in which each replica gets one of its own.

    ``target_requests``: the running and queued requests a replica that the autoscaler aims at;
    ``max_requests``: from how many on a replica refuses, so that its adapters spill to others.
    ``retry_s``: how long a request of which nothing was heard is tried again.
    """

    model_config = ConfigDict(extra="forbid")

    flags: str = ""
    home: Path = Path("~/.manyhats/fleet")
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=2, ge=1)
    target_requests: float = Field(default=16.0, gt=0)
    max_requests: int = Field(default=64, ge=1)
    gateways: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=1.0, gt=0)
    num_gpus: float = Field(default=0.0, ge=0)
    upscale_delay_s: float = Field(default=15.0, ge=0)
    downscale_delay_s: float = Field(default=300.0, ge=0)
    start_s: float = Field(default=600.0, gt=0)
    drain_s: float = Field(default=60.0, gt=0)
    retry_s: float = Field(default=30.0, ge=0)
    random_routing: bool = Field(default=False, description="To measure what affinity is worth.")


Header = tuple[str, str]


@dataclass(frozen=True)
class Call:
    """One HTTP request on its way to a replica."""

    method: str
    path: str
    query: str
    headers: tuple[Header, ...]
    body: bytes


@dataclass(frozen=True)
class Head:
    """An answer's first item: its status and headers; its body follows in pieces."""

    status: int
    headers: tuple[Header, ...]


class AffinityRouter(RequestRouter):
    """Ranks the replicas by ``affinity.ranking``; Serve takes the first that accepts.

    A replica accepts up to ``max_requests``, so a popular adapter spills to the next in its
    ranking: the bound of consistent hashing with bounded loads. Requests of the base go to
    whichever of all replicas has the shortest queue.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """See ``RequestRouter``."""
        key = "" if pending_request is None else pending_request.metadata.multiplexed_model_id
        if not key:
            return [candidate_replicas]
        named = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[named[name]] for name in ranking(key, named)]


@serve.deployment
class Engine:
    """One server process. Serve replaces the replica when its health check fails."""

    def __init__(self, fleet: Mapping[str, Any]) -> None:
        settings = Fleet(**fleet)
        self._drain_s = settings.drain_s
        self.name = serve.get_replica_context().replica_id.unique_id
        home = settings.home.expanduser() / self.name
        home.mkdir(parents=True, exist_ok=True)
        flags = ["--home", str(home), "--drain-s", str(settings.drain_s)]
        self._process = EngineProcess(
            [*flags, *shlex.split(settings.flags)], log=home / "server.log"
        )
        self._process.wait_ready(settings.start_s)
        # A replica without its server is of no use, and would look idle until its health check
        # has failed often enough: without the process of the replica Ray sees at once.
        self._process.when_it_dies(lambda: os._exit(1))
        self._client = httpx.AsyncClient(
            base_url=self._process.base_url,
            timeout=httpx.Timeout(None, connect=_PROBE_S),
            limits=httpx.Limits(max_connections=None),
        )

    async def base(self) -> str:
        """The id of the base model."""
        return str((await self._client.get("/readyz")).json()["model"])

    async def about(self) -> tuple[str, int, str]:
        """Replica, process id and URL of the server: for tests and for whoever debugs."""
        return self.name, self._process.pid, self._process.base_url

    async def forward(self, call: Call) -> AsyncGenerator[Head | bytes, None]:
        """The server's answer: its head, then its body as it comes.

        Raises EngineGoneError where the server does not answer. Closing it hangs up.
        """
        request = self._client.build_request(
            call.method,
            httpx.URL(path=call.path, query=call.query.encode()),
            headers=list(call.headers),
            content=call.body,
        )
        try:
            response = await self._client.send(request, stream=True)
        except httpx.TransportError as error:
            raise EngineGoneError(f"the server does not answer: {error!r}") from None
        try:
            told = _passed_on(response.headers.multi_items(), _PROXYS)
            yield Head(response.status_code, told)
            async for piece in response.aiter_raw():
                yield piece
        except httpx.TransportError as error:
            raise EngineGoneError(f"the server broke off: {error!r}") from None
        finally:
            await response.aclose()

    async def check_health(self) -> None:
        """Raises EngineGoneError unless the process runs and answers."""
        if not self._process.alive:
            raise EngineGoneError("the server's process has ended")
        try:
            answer = await self._client.get("/healthz", timeout=_PROBE_S)
        except httpx.TransportError as error:
            raise EngineGoneError(f"the server does not answer: {error!r}") from None
        if answer.status_code != 200:
            raise EngineGoneError(f"/healthz says {answer.status_code}")

    async def __del__(self) -> None:
        """Serve has waited for the replica's requests; the server drains and ends."""
        if hasattr(self, "_process"):
            await asyncio.to_thread(self._process.stop, self._drain_s + 5)


@serve.deployment
class Gateway:
    """What the proxy speaks to: reads the adapter out of the body and asks a replica.

    A request that may be repeated goes to another replica as long as nothing was heard of the
    first, so the death of a replica costs its callers time and no error.
    """

    def __init__(self, engines: DeploymentHandle, retry_s: float, affine: bool) -> None:
        self._engines = engines
        self._retry_s = retry_s
        self._affine = affine
        self._base: str | None = None

    async def __call__(self, request: Request) -> Response:
        """One HTTP request."""
        if self._base is None:
            self._base = str(await self._engines.base.remote())
        body = await request.body()
        call = Call(
            request.method,
            request.url.path,
            request.url.query,
            _passed_on(request.headers.items()),
            body,
        )
        key = adapter_key(call.path, body, self._base) if self._affine else ""
        retry_s = self._retry_s if may_repeat(call.method, call.path) else 0.0
        deadline, pause = time.monotonic() + retry_s, 0.1
        while True:
            try:
                return await self._ask(call, key)
            except (ActorDiedError, ActorUnavailableError, EngineGoneError, RayTaskError) as error:
                if isinstance(error, RayTaskError) and not isinstance(error.cause, EngineGoneError):
                    raise
                logger.warning("a replica did not answer: %s", type(error).__name__)
            except BackPressureError:
                break
            if time.monotonic() + pause > deadline:
                break
            await asyncio.sleep(pause)
            pause = min(2 * pause, 2.0)
        return error_response(NoReplicaError("no replica can answer now", retry_after_s=1.0))

    async def _ask(self, call: Call, key: str) -> Response:
        handle = self._engines.options(stream=True, multiplexed_model_id=key)
        pieces = handle.forward.remote(call)
        answer: Response
        try:
            head = await anext(pieces)
            if _streams(head):
                first = await anext(pieces, b"")
                answer = StreamingResponse(_body(first, pieces), status_code=head.status)
            else:
                # Whole before a byte is sent: until then another replica can still answer.
                whole = b"".join([piece async for piece in pieces])
                answer = Response(whole, status_code=head.status)
        except BaseException:
            pieces.cancel()
            raise
        answer.raw_headers = [(n.encode("latin-1"), v.encode("latin-1")) for n, v in head.headers]
        return answer


async def _body(first: bytes, pieces: Any) -> AsyncIterator[bytes]:
    """The rest of an answer. Cancelled where the caller has gone: the server then sees that too."""
    try:
        yield first
        async for piece in pieces:
            yield piece
    finally:
        pieces.cancel()


def _streams(head: Head) -> bool:
    return any(n.lower() == "content-type" and "event-stream" in v for n, v in head.headers)


def _passed_on(headers: Any, left_out: frozenset[str] = _HOP_BY_HOP) -> tuple[Header, ...]:
    return tuple((n, v) for n, v in headers if n.lower() not in left_out)


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application; ``args`` are the fields of ``Fleet``. Raises ValidationError."""
    fleet = Fleet(**args)
    router = {} if fleet.random_routing else {"request_router_config": _router()}
    engines = Engine.options(  # type: ignore[attr-defined]
        autoscaling_config={
            "min_replicas": fleet.min_replicas,
            "max_replicas": fleet.max_replicas,
            "target_ongoing_requests": fleet.target_requests,
            "upscale_delay_s": fleet.upscale_delay_s,
            "downscale_delay_s": fleet.downscale_delay_s,
        },
        max_ongoing_requests=fleet.max_requests,
        ray_actor_options={"num_cpus": fleet.num_cpus, "num_gpus": fleet.num_gpus},
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=fleet.drain_s + 10,
        **router,
    ).bind(fleet.model_dump(mode="json"))
    gateway = Gateway.options(  # type: ignore[attr-defined]
        num_replicas=fleet.gateways,
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0.1},
    )
    return gateway.bind(engines, fleet.retry_s, not fleet.random_routing)


def _router() -> Any:
    from ray.serve.config import RequestRouterConfig

    return RequestRouterConfig(request_router_class=AffinityRouter)
