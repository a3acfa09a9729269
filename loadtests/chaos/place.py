"""Where a scenario of ``faults.py`` runs: its servers, and what they have acknowledged."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from clients import Clients, outcome
from make_adapters import make_adapters
from server_process import ServerProcess
from tiny_server import ADMIN, ADMIN_KEY


@dataclass
class Told:
    """What a scenario has to say. ``rows``: one a phase and group of clients."""

    rows: list[dict[str, Any]]
    wrong: list[str]


@dataclass
class Place:
    """A scenario's folder, and how long its phases are: so many answers of each group."""

    folder: Path
    tiny: Path
    answers: int
    made: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.made = make_adapters(
            self.tiny / "config.json", self.folder / "made", count=14, rank=32, scale=0.5,
            progress=False,
        )  # fmt: skip

    @asynccontextmanager
    async def server(
        self, *flags: str, home: str = "home", **env: str
    ) -> AsyncIterator[tuple[ServerProcess, httpx.AsyncClient]]:
        """A server with few slots and a small host tier, so that adapters come from the disk."""
        fixed = ("--model", str(self.tiny), "--home", str(self.folder / home))
        fixed += ("--quantization", "none", "--dtype", "fp32", "--kv-cache-mb", "8")
        fixed += ("--kernels", "torch", "--threads", "1", "--slots", "3", "--host-cache-mb", "1")
        fixed += ("--adapter-root", str(self.folder), "--drain-s", "2", "--no-parity-probe")
        before = {name: os.environ.get(name) for name in env}
        os.environ.update({"MANYHATS_ADMIN_API_KEYS": ADMIN_KEY} | env)
        server = ServerProcess([*fixed, *flags], self.folder / f"{home}.log")
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        try:
            await server.wait_ready()
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(
                base_url=server.base_url, timeout=120, limits=limits, headers=ADMIN
            ) as http:
                yield server, http
        finally:
            server.stop()


class Acknowledged:
    """What was answered with success: it must be there at the end, whatever else happened."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        self.versions: dict[str, int] = {}
        self.stable: dict[str, int] = {}

    async def register(self, http: httpx.AsyncClient, name: str, folder: Path) -> httpx.Response:
        """The next version of ``name``; what was answered is counted."""
        body = {"name": name, "path": str(folder)}
        answer = await self._change(http, "/admin/adapters", "registrations", body)
        if answer.is_success:
            self.versions[name] = answer.json()["version"]
            self.stable.setdefault(name, 1)
            if answer.json()["stable"]:
                self.stable[name] = self.versions[name]
        return answer

    async def promote(self, http: httpx.AsyncClient, name: str, version: int) -> httpx.Response:
        """Makes a version stable."""
        path = f"/admin/adapters/{name}/promote"
        answer = await self._change(http, path, "promotes", {"version": version})
        if answer.is_success:
            self.stable[name] = version
        return answer

    async def _change(
        self, http: httpx.AsyncClient, path: str, group: str, body: Any
    ) -> httpx.Response:
        answer = await http.post(path, json=body)
        self._clients.seen[self._clients.phase, group][outcome(answer)] += 1
        if answer.status_code == 500 or "without" in outcome(answer):
            self._clients.wrong.append(f"{path}: {outcome(answer)}: {answer.text[:200]}")
        return answer

    async def still_there(self, http: httpx.AsyncClient) -> None:
        """Every acknowledged version and route, and answers as before."""
        for name, version in self.versions.items():
            shown = (await http.get(f"/admin/adapters/{name}")).json()
            numbers = [v["version"] for v in shown.get("versions", [])]
            if version not in numbers or shown.get("route", {}).get("stable") != self.stable[name]:
                self._clients.wrong.append(f"{name}: {version} was acknowledged, {shown} is there")
                continue
            answer = await self._clients.ask(f"{name}@{version}")
            self._clients.check("all that was acknowledged", answer, 0.0)


async def prepared(
    place: Place, http: httpx.AsyncClient, names: Sequence[str], clients: Clients
) -> Acknowledged:
    """Two versions of the first name, one of the others, and what each of them says."""
    known = Acknowledged(clients)
    with clients.during("before"):
        await known.register(http, names[0], place.made[-1])
        for name, folder in zip(names, place.made, strict=False):
            await known.register(http, name, folder)
    base = (await http.get("/v1/models")).json()["data"][0]["id"]
    clients.groups = {"base": [base], **clients.groups}
    clients.seen.clear()
    await clients.learn([base, f"{names[0]}@1", *names])
    return known


async def in_phase(clients: Clients, name: str, answers: int) -> None:
    with clients.during(name):
        await clients.answers(answers)
