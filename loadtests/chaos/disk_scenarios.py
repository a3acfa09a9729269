"""The scenarios of ``faults.py`` in which the disk is full, slow, or not what it was."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from clients import Clients, outcome
from place import Place, Told, in_phase, prepared
from support.web import web_server

HERE = Path(__file__).resolve().parent
DISK_MIB = 6
SLOW_MS = 300


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
            known = await prepared(place, http, names, clients)
            with clients.running():
                await in_phase(clients, "before", place.answers)
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
            known = await prepared(place, http, ["a", *cold], clients)
            await http.post("/admin/adapters/a/pin", json={})
            with clients.running():
                await in_phase(clients, "before", place.answers)
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
    names = list("abcdefghi")  # more than device and host tier hold between them
    clients = Clients([], {"damaged adapter": ["a"], "other adapters": names[1:]})
    async with place.server() as (_, http):
        clients.servers = [http]
        known = await prepared(place, http, names, clients)
        digest = next(
            v["digest"]
            for v in (await http.get("/admin/adapters/a")).json()["versions"]
            if v["version"] == 2
        )
        [folder] = place.folder.glob(f"home/bases/*/adapters/*/{digest}")
        await _evicted(http, clients, "a", names[1:])
        _turn_a_bit(folder / "adapter_model.safetensors")
        with clients.running():
            await in_phase(clients, "one bit turned", place.answers)
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
            await in_phase(clients, "manifest cut", place.answers)
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
