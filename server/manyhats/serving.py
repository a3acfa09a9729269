"""The listener: uvicorn's server, which says when it answers and goes in steps that lose nobody.

SIGTERM: readiness goes down first; for ``drain_grace_s`` everything is still served, so that load
balancers can look away; then new requests are refused and the running ones end, within ``drain_s``.
Ctrl-C and a second signal leave the grace out.
"""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from manyhats.api.readiness import Readiness
from manyhats.banner import announce
from manyhats.config import Settings
from manyhats.engine.interface import EngineClient
from manyhats.tenancy.directory import TenantDirectory

logger = logging.getLogger(__name__)


class Listener(uvicorn.Server):
    """Serves ``api`` until a signal; ``names`` gives the adapters that the banner shows,
    ``tenants`` counts its keys.
    """

    def __init__(
        self,
        api: ASGIApp,
        settings: Settings,
        *,
        engine: EngineClient,
        tenants: TenantDirectory,
        readiness: Readiness,
        close_door: Callable[[], None],
        names: Callable[[], Sequence[str]],
    ) -> None:
        super().__init__(
            uvicorn.Config(
                api,
                host=settings.host,
                port=settings.port,
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=math.ceil(settings.drain_s),
                timeout_keep_alive=75,
            )
        )
        self._settings = settings
        self._engine = engine
        self._tenants = tenants
        self._readiness = readiness
        self._close_door = close_door
        self._names = names
        self._loop: asyncio.AbstractEventLoop | None = None
        self._announcing: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; says where the server answers, once the base has answered."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            port = self.servers[0].sockets[0].getsockname()[1]
            self._announcing = asyncio.create_task(self._announce(port))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's."""
        if self._announcing is not None:
            self._announcing.cancel()
        await super().shutdown(sockets)

    async def _announce(self, port: int) -> None:
        await self._readiness.wait_proven()
        announce(self._settings, port, self._engine, self._tenants, self._names())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first SIGTERM drains after the grace, a second one at once; a second Ctrl-C stops."""
        grace = self._settings.drain_grace_s
        again, loop = self._readiness.draining, self._loop
        self._readiness.drain()
        if sig == signal.SIGTERM and grace and not again and loop is not None:
            logger.info("draining: not ready any more; requests are refused in %g s", grace)
            end = partial(self._refuse, sig, frame)
            loop.call_soon_threadsafe(loop.call_later, grace, end)
        else:
            self._refuse(sig, frame)

    def _refuse(self, sig: int, frame: FrameType | None) -> None:
        if not self.should_exit or sig == signal.SIGINT:
            self._close_door()
            super().handle_exit(sig, frame)
