"""The scenarios of ``faults.py`` with two servers on one Redis."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
from clients import Clients
from place import Acknowledged, Place, Told, in_phase, prepared
from support.redis_server import RedisServer


@asynccontextmanager
async def _pair(
    place: Place,
) -> AsyncIterator[tuple[RedisServer, Callable[[str], Any], AsyncExitStack]]:
    """A Redis that writes every change to its disk, and how to start servers on it."""
    (place.folder / "redis").mkdir()
    redis = RedisServer(place.folder / "redis", persistent=True)
    redis.start()
    flags = ("--redis-url", redis.url, "--store", str(place.folder / "store"))
    async with AsyncExitStack() as stack:
        stack.callback(redis.stop)
        yield redis, lambda home: place.server(*flags, home=home), stack


async def redis_paused(place: Place) -> Told:
    """Redis answers nobody for a while, with its connections open."""
    names = ["a", "b", "c"]
    clients = Clients([], {"adapters": names})
    async with _pair(place) as (redis, start, stack):
        pairs = [await stack.enter_async_context(start(home)) for home in ("one", "two")]
        clients.servers = [http for _, http in pairs]
        first, second = clients.servers
        known = await prepared(place, first, names, clients)
        with clients.running():
            await in_phase(clients, "before", place.answers)
            with clients.during("Redis paused"):
                redis.pause()
                await known.register(first, "late", place.made[5])
                await known.promote(second, "a", 1)
                await clients.answers(place.answers)
                ready = await second.get("/readyz")
                clients.seen["Redis paused", "/readyz"][
                    f"{ready.status_code} store {ready.json()['store']}"
                ] += 1
                redis.resume()
            with clients.during("Redis back"):
                # after a 503 it is open whether the change was made: the same once more
                for _ in range(100):
                    if (await known.register(first, "late", place.made[5])).is_success:
                        break
                    await asyncio.sleep(0.1)
                await known.promote(second, "a", 1)
                await clients.learn(["late"])
                await clients.answers(place.answers)
        with clients.during("afterwards"):
            await known.still_there(first)
    return Told(clients.rows(), clients.wrong)


async def killed(place: Place) -> Told:
    """One of two servers gets SIGKILL while it registers; its clients go to the other one."""
    names = ["a", "b", "c"]
    clients = Clients([], {"adapters": names})
    async with _pair(place) as (_, start, stack):
        server, first = await stack.enter_async_context(start("one"))
        _, second = await stack.enter_async_context(start("two"))
        clients.servers = [first, second]
        known = await prepared(place, first, names, clients)
        with clients.running(each=3):
            await in_phase(clients, "before", place.answers)
            with clients.during("one killed"):
                await _registrations_until_killed(place, known, first, server.pid)
                await clients.answers(place.answers)
        clients.servers = [second]
        with clients.during("on the other one"):
            await clients.learn([f"late@{n}" for n in range(1, known.versions.get("late", 0) + 1)])
            await known.still_there(second)
        _, again = await stack.enter_async_context(start("one"))
        clients.servers = [again]
        with clients.during("after a start"):
            await known.still_there(again)
    return Told(clients.rows(), clients.wrong)


async def _registrations_until_killed(
    place: Place, known: Acknowledged, http: httpx.AsyncClient, pid: int
) -> None:
    """One after the other; the server is killed amid the fourth."""
    for number, folder in enumerate(place.made[3:10]):
        if number == 3:
            asyncio.get_running_loop().call_later(0.03, os.kill, pid, signal.SIGKILL)
        try:
            await known.register(http, "late", folder)
        except httpx.TransportError:
            return
