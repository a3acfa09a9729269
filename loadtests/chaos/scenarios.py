"""The scenarios of ``faults.py``."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from clients import Clients, outcome
from make_adapters import make_adapters
from server_process import ServerProcess
from support.redis_server import RedisServer
from support.web import web_server
from tiny_server import ADMIN, ADMIN_KEY

HERE = Path(__file__).resolve().parent
DISK_MIB = 6
SLOW_MS = 300


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


async def _prepared(
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


async def _phase(clients: Clients, name: str, answers: int) -> None:
    with clients.during(name):
        await clients.answers(answers)


async def disk_full(place: Place) -> Told:
    """Something fills the disk under the registry and the store, and goes away again."""
    disk = place.folder / "home" / "bases"
    disk.mkdir(parents=True)
    size = f"size={DISK_MIB}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)], check=True)
    names = ["a", "b", "c", "d", "e"]
    clients = Clients([], {"adapters": names})
    try:
        async with place.server() as (server, http):
            clients.servers = [http]
            known = await _prepared(place, http, names, clients)
            with clients.running():
                await _phase(clients, "before", place.answers)
                with clients.during("disk full"):
                    filler = _fill(disk)
                    for folder in place.made[5:8]:
                        await known.register(http, "late", folder)
                    await known.promote(http, "a", 1)
                    await clients.answers(place.answers)
                    await known.promote(http, "a", 2)
                    ready = await http.get("/readyz")
                    clients.seen["disk full", "/readyz"][str(ready.status_code)] += 1
                filler.unlink()
                with clients.during("room again"):
                    await known.register(http, "late", place.made[5])
                    await known.promote(http, "a", 1)
                    await clients.learn(["late"] if "late" in known.versions else [])
                    await clients.answers(place.answers)
            os.kill(server.pid, signal.SIGKILL)
        async with place.server() as (_, http):
            clients.servers = [http]
            with clients.during("after kill -9 and a start"):
                await known.still_there(http)
        whole = sum(1 for _ in disk.glob("*/adapters/[0-9a-f][0-9a-f]/*/manifest.json"))
        versions = 7 if "late" in known.versions else 6
        if whole != versions:
            clients.wrong.append(f"{versions} versions were acknowledged, {whole} are on the disk")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
    return Told(clients.rows(), clients.wrong)


def _fill(disk: Path) -> Path:
    """A file that takes what is left, to the last byte."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
    return path


async def slow_store(place: Place) -> Told:
    """Files of the store open slowly; then a source stops in the middle of a file."""
    shim, said = place.folder / "slow_open.so", place.folder / "ms"
    build = ["cc", "-shared", "-fPIC", "-O2", "-o", str(shim), str(HERE / "slow_open.c"), "-ldl"]
    subprocess.run(build, check=True)
    said.write_text("0")
    slow = {"LD_PRELOAD": str(shim), "SLOW_FOLDER": str(place.folder / "store")}
    slow["SLOW_MS_FILE"] = str(said)
    cold = ["c", "d", "e", "f", "g"]
    clients = Clients([], {"resident adapter": ["a"], "adapters from the disk": cold})
    with web_server() as web:
        flags = ("--store", str(place.folder / "store"))
        flags += ("--source-allow", f"{web.url}/", "--source-allow", "127.0.0.0/8")
        async with place.server(*flags, **slow) as (_, http):
            clients.servers = [http]
            known = await _prepared(place, http, ["a", *cold], clients)
            await http.post("/admin/adapters/a/pin", json={})
            with clients.running():
                await _phase(clients, "before", place.answers)
                said.write_text(str(SLOW_MS))
                await asyncio.sleep(0)
                with clients.during("store slow"):
                    await clients.answers(max(5, place.answers // 4))
                    await _impatient(clients, "c", "d", "e", "f", "g")
                said.write_text("0")
                with clients.during("source stuck"):
                    await _stuck_source(place, web, http, clients)
                    await clients.answers(place.answers)
            with clients.during("afterwards"):
                await known.still_there(http)
    return Told(clients.rows(), clients.wrong)


async def _impatient(clients: Clients, *models: str) -> None:
    """Requests of callers who give half a second."""
    for model in models:
        answer = await clients.ask(model, **{"x-manyhats-timeout": "0.5"})
        clients.seen[clients.phase, "callers who give 0.5 s"][outcome(answer)] += 1


async def _stuck_source(place: Place, web: Any, http: httpx.AsyncClient, clients: Clients) -> None:
    """A registration from a server that sends half a file and waits, then goes on."""
    import threading

    folder = place.made[9]
    web.files = {f"/one/{path.name}": path.read_bytes() for path in folder.iterdir()}
    web.gate = threading.Event()
    body = {"name": "fetched", "source": {"url": f"{web.url}/one"}}
    answer = await http.post("/admin/adapters", json=body)
    clients.seen[clients.phase, "registration from the source"][outcome(answer)] += 1
    path = answer.headers.get("location")
    if path is None:
        clients.wrong.append(f"the registration was not started: {answer.text}")
        return
    await asyncio.to_thread(web.half.wait, 60)
    await clients.answers(place.answers)
    state = (await http.get(path)).json()["state"]
    clients.seen[clients.phase, "registration from the source"][f"{state} while stuck"] += 1
    web.gate.set()
    for _ in range(600):
        state = (await http.get(path)).json()["state"]
        if state in ("succeeded", "failed"):
            break
        await asyncio.sleep(0.1)
    clients.seen[clients.phase, "registration from the source"][f"{state} once it goes on"] += 1
    if state != "succeeded":
        clients.wrong.append(f"the registration is {state}")


async def corrupt(place: Place) -> Told:
    """A version's bytes change on the disk."""
    names = ["a", "b", "c", "d", "e"]
    clients = Clients([], {"damaged adapter": ["a"], "other adapters": names[1:]})
    async with place.server() as (_, http):
        clients.servers = [http]
        known = await _prepared(place, http, names, clients)
        digest = next(
            v["digest"]
            for v in (await http.get("/admin/adapters/a")).json()["versions"]
            if v["version"] == 2
        )
        [folder] = place.folder.glob(f"home/bases/*/adapters/*/{digest}")
        await _evicted(http, clients, "a", names[1:])
        _turn_a_bit(folder / "adapter_model.safetensors")
        with clients.running():
            await _phase(clients, "one bit turned", place.answers)
            with clients.during("rolled back"):
                await known.promote(http, "a", 1)
                await clients.answers(place.answers)
                await known.promote(http, "a", 2)
            with clients.during("registered again"):
                await known.register(http, "a", place.made[0])
                await clients.answers(place.answers)
        await _evicted(http, clients, "a", names[1:])
        (folder / "manifest.json").write_bytes(b"{}")
        with clients.running():
            await _phase(clients, "manifest cut", place.answers)
        with clients.during("afterwards"):
            await known.register(http, "a", place.made[0])
            await known.still_there(http)
    return Told(clients.rows(), clients.wrong)


def _turn_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


async def _evicted(
    http: httpx.AsyncClient, clients: Clients, name: str, others: Sequence[str]
) -> None:
    """Asks for others until the adapter is neither on the device nor in the host tier."""
    for _ in range(3):
        for other in others:
            await clients.ask(other)
    resident = (await http.get("/admin/cache")).json()["device"]["resident"]
    if any(entry["adapter"].startswith(f"{name}@") for entry in resident):
        clients.wrong.append(f"{name} is still resident")


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
        known = await _prepared(place, first, names, clients)
        with clients.running():
            await _phase(clients, "before", place.answers)
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
        known = await _prepared(place, first, names, clients)
        with clients.running(each=3):
            await _phase(clients, "before", place.answers)
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


RUN: dict[str, Callable[[Place], Awaitable[Told]]] = {
    "disk_full": disk_full,
    "slow_store": slow_store,
    "corrupt": corrupt,
    "redis_paused": redis_paused,
    "killed": killed,
}
