"""The traffic of a soak: callers who come when they like and sometimes hang up, an operator who
moves a route, adapters that come and go.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from bench_http import Address, Connection, ProtocolError, sse_data
from workload import AdapterChoice

ROLLED, CHURNED = "soak-rolled", "soak-churned"
CHANGES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("canary", {"version": 2, "percent": 25}),
    ("promote", {}),
    ("rollback", {"to": "previous"}),
    ("rollback", {"to": "baseline"}),
    ("promote", {"version": 1}),
)


@dataclass(slots=True)
class Tally:
    """What happened. ``problems``: whatever was neither a whole answer nor a stated 429."""

    answered: int = 0
    events: int = 0
    tokens: int = 0
    refused: int = 0
    hung_up: int = 0
    changes: int = 0
    lives: int = 0
    problems: list[str] = field(default_factory=list)
    ttfts: list[float] = field(default_factory=list)
    served: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Mix:
    """Whom callers ask: a base in one request of ten, the names by a power law, in an order of
    popularity. Lengths are uniform over both bounds, which are included.
    """

    base: str
    names: Sequence[str]
    alpha: float
    input_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    vocab_size: int
    hang_ups: float

    @property
    def mean_tokens(self) -> float:
        """Of an answer."""
        return sum(self.output_tokens) / 2

    def body(self, rng: random.Random, model: str | None = None) -> dict[str, Any]:
        """One request; its prompt is like no other, so no prefix cache helps."""
        if model is None:
            drawn = self.names[AdapterChoice(len(self.names), self.alpha).draw(rng)]
            model = self.base if rng.random() < 0.1 else drawn
        length = rng.randint(*self.input_tokens)
        return {
            "model": model,
            "prompt": [rng.randrange(1000, self.vocab_size) for _ in range(length)],
            "max_tokens": rng.randint(*self.output_tokens),
            "ignore_eos": True,
            "temperature": 0.8,
            "stream": rng.random() < 0.8,
            "user": f"caller-{rng.randrange(1000)}",
        }


class Traffic:
    """Everything that is asked of one server, over a pool of kept connections."""

    def __init__(self, base_url: str, headers: Mapping[str, str], mix: Mix, seed: int) -> None:
        self.tally = Tally()
        self.mix = mix
        self._address = Address.parse(base_url)
        self._headers = headers
        self._free: list[Connection] = []
        self._rng = random.Random(seed)

    async def ask(self, body: Mapping[str, Any], leave_after: int | None = None) -> None:
        """One request, hung up on after ``leave_after`` events (0: before it is answered)."""
        connection = self._free.pop() if self._free else self._connection()
        try:
            if leave_after == 0:
                await self._leave(connection, body)
            else:
                await self._whole(connection, body, leave_after)
        except (OSError, ProtocolError, ValueError, asyncio.IncompleteReadError) as error:
            self.tally.problems.append(f"{body['model']}: {type(error).__name__}: {error}")
            await connection.close()
        self._free.append(connection)

    async def _leave(self, connection: Connection, body: Mapping[str, Any]) -> None:
        """Sends the request and closes the connection while the server works on it."""
        sent = connection.request("POST", "/v1/completions", orjson.dumps(body))
        try:
            async with asyncio.timeout(self._rng.uniform(0, 0.3)):
                await sent
        except TimeoutError:
            pass  # this is the caller who did not wait
        await connection.close()
        self.tally.hung_up += 1

    async def _whole(
        self, connection: Connection, body: Mapping[str, Any], leave_after: int | None
    ) -> None:
        started, events, done = time.perf_counter(), 0, False
        response = await connection.request("POST", "/v1/completions", orjson.dumps(body))
        if response.status != 200:
            self._refusal(body, response.status, response.headers, await connection.read_all())
            return
        served = response.headers.get("x-manyhats-served-by", "")
        self._check_served(str(body["model"]), served)
        if not body["stream"]:
            usage = orjson.loads(await connection.read_all())["usage"]
            self._count(usage["completion_tokens"], body)
            return
        async for data in sse_data(connection.body()):
            done = data == b"[DONE]"
            if not done and "error" in orjson.loads(data):
                raise ValueError(data.decode()[:200])
            events += not done
            self.tally.events += not done
            if events == 1 and not done:
                self.tally.ttfts.append(time.perf_counter() - started)
            if events == leave_after:
                await connection.close()
                self.tally.hung_up += 1
                return
        if not done:
            raise ValueError("the stream ended without [DONE]")
        self._count(int(body["max_tokens"]), body)

    def _count(self, tokens: int, body: Mapping[str, Any]) -> None:
        if tokens != body["max_tokens"]:
            raise ValueError(f"{tokens} tokens where {body['max_tokens']} were asked for")
        self.tally.answered += 1
        self.tally.tokens += tokens

    def _refusal(
        self, body: Mapping[str, Any], status: int, headers: Mapping[str, str], text: bytes
    ) -> None:
        if status == 429 and "retry-after" in headers:
            self.tally.refused += 1
        else:
            self.tally.problems.append(f"{body['model']}: HTTP {status}: {text.decode()[:200]}")

    def _check_served(self, model: str, served: str) -> None:
        self.tally.served[served] += 1
        name, _, version = served.partition("@")
        baseline = model in (self.mix.base, ROLLED) and served == "baseline"
        if not baseline and (name != model or not version.isdigit()):
            self.tally.problems.append(f"{model} was served by {served!r}")

    async def caller(self) -> None:
        """One request of the mix, whole or not."""
        body = self.mix.body(self._rng)
        leave = None
        if self._rng.random() < self.mix.hang_ups:
            leave = self._rng.choice((0, 1, 3, 8))
            body["stream"] = leave > 0 or self._rng.random() < 0.5
        await self.ask(body, leave)

    async def closed_loop(self, clients: int, seconds: float) -> float:
        """Tokens a second that the server generates with so many requests of the mix always in
        flight, over the last three quarters of the time.
        """
        ends = time.monotonic() + seconds

        async def client() -> None:
            while time.monotonic() < ends:
                await self.ask({**self.mix.body(self._rng), "stream": True})

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())
            await asyncio.sleep(seconds / 4)
            began, before = time.monotonic(), self.tally.events
            await asyncio.sleep(ends - began)
            return (self.tally.events - before) / (time.monotonic() - began)

    async def admin(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        """A call that must succeed; its answer's body."""
        return (await self._call(method, path, body))[1]

    async def _call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> tuple[int, bytes]:
        connection = self._connection()
        try:
            content = None if body is None else orjson.dumps(body)
            response = await connection.request(method, path, content)
            text = await connection.read_all()
        finally:
            await connection.close()
        if response.status >= 300:
            self.tally.problems.append(f"{method} {path}: HTTP {response.status}: {text[:200]!r}")
        return response.status, text

    async def register(self, name: str, folder: Path) -> bool:
        """A version of ``name``; whether there is one now."""
        body = {"name": name, "path": str(folder)}
        return (await self._call("POST", "/admin/adapters", body))[0] < 300

    async def roll(self, pause_s: float) -> None:
        """Moves the route of ``ROLLED``, over and over, until cancelled."""
        for action, body in itertools.cycle(CHANGES):
            await self.admin(
                "POST", f"/admin/adapters/{ROLLED}/{action}", {**body, "reason": "soak"}
            )
            self.tally.changes += 1
            await asyncio.sleep(pause_s)

    async def churn(self, folders: Sequence[Path], pause_s: float) -> None:
        """Registers an adapter, asks it, removes it, over and over, until cancelled.

        Every second one is removed while a request of it runs, which must end whole.
        """
        for number in itertools.count():
            await asyncio.sleep(pause_s)
            if not await self.register(CHURNED, folders[number % len(folders)]):
                continue
            asked = asyncio.create_task(self.ask(self.mix.body(self._rng, CHURNED)))
            if number % 2:
                await asked
            else:
                await self._until_held()
            await self.admin("DELETE", f"/admin/adapters/{CHURNED}?force=true&reason=soak")
            await asked
            self.tally.lives += 1

    async def _until_held(self) -> None:
        """Until the device has the churned adapter, so that a request of it has begun."""
        for _ in range(400):
            cache = orjson.loads(await self.admin("GET", "/admin/cache"))
            resident = [entry["adapter"] for entry in cache["device"]["resident"]]
            if any(name.startswith(f"{CHURNED}@") for name in resident):
                return
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        """Closes the kept connections."""
        for connection in self._free:
            await connection.close()
        self._free.clear()

    def _connection(self) -> Connection:
        return Connection(self._address, self._headers)
