"""kill -9 at random moments of a real server, over HTTP: registrations by path and by upload, route
changes, evaluations' settings, deletions and collections.

Each round starts ``manyhats serve`` (forked from this process, which has its imports; with a tiny
model), checks what the last kill left, sends admin requests one after the other and kills the
server at a random moment of one. What the server shows then must be what was answered (the request
on its way may have had its effect or not), the audit chain must hold, and the disk must hold the
bytes of the versions and nothing else.

    python loadtests/chaos/kill_http.py --store sqlite --rounds 100
    python loadtests/chaos/kill_http.py --store redis --rounds 20   # a redis-server of its own

Ends with 1 and says what was wrong, else with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import httpx
import torch
from acknowledged import NAMES, Acknowledged, expect, place
from server_process import free_port
from tiny_server import adapters, tiny_model
from tqdm import tqdm

import manyhats.app
from manyhats.adapters.store import AdapterStore
from manyhats.config import Settings

CONTENTS = 4
READY_S = 600.0
_KEY = "admin-of-the-load-test"


def forked(work: Callable[[], None], log: Path) -> int:
    """The id of a process that does ``work``, its output in ``log``."""
    child = os.fork()
    if not child:
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        try:
            work()
        finally:
            os._exit(1)
    return child


@dataclass
class Chaos(Acknowledged):
    """One home over all the rounds, and what must be true of it."""

    home: Path = field(kw_only=True)
    url: str | None = field(kw_only=True)
    operations: int = 0
    refused: int = 0
    interrupted: int = 0
    while_starting: int = 0
    open_names: str = ""
    pid: int = 0

    def settings(self, port: int) -> Settings:
        return Settings(
            home=self.home / "home",
            model=str(self.home / "model"),
            port=port,
            quantization="none",
            dtype="fp32",
            device="cpu",
            kernels="torch",
            kv_cache_mb=16,
            adapter_root=(self.home / "adapters",),
            keep_deleted_s=0,
            max_adapters=10_000,
            drift=False,
            admin_api_keys=(_KEY,),
            redis_url=self.url,
        )

    def round(self, draw: random.Random) -> None:
        port, starting = free_port(), draw.random() < 0.1
        settings = self.settings(port)
        self.pid = forked(lambda: manyhats.app.serve(settings), self.home / "server.log")
        try:
            if starting:
                time.sleep(draw.uniform(0, 1.5))
                self.while_starting += 1
                return
            headers = {"authorization": f"Bearer {_KEY}"}
            with httpx.Client(
                base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=120, trust_env=False
            ) as http:
                self.wait_ready(http)
                self.check(http, settings)
                self.drive(http, draw)
        finally:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def wait_ready(self, http: httpx.Client) -> None:
        until = time.monotonic() + READY_S
        while time.monotonic() < until:
            expect(os.waitpid(self.pid, os.WNOHANG) == (0, 0), "the server ended by itself")
            try:
                if http.get("/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(0.05)
        raise SystemExit("the server was not ready in time")

    def check(self, http: httpx.Client, settings: Settings) -> None:
        """What the kill before has left."""
        self.check_names({name: shown(http, name) for name in NAMES}, self.open_names)
        self.open_names = ""
        self.check_log(audit(http))
        [base] = (settings.home / "bases").iterdir()
        store = AdapterStore(settings.adapter_folder(base.name))
        try:
            entries = [entry for entry in self.known.values() if entry]
            used = {digest for entry in entries for _, digest, _ in entry["versions"]}
            expect(store.list() == sorted(used), "bytes without a version, or the reverse")
            for digest in used:
                store.verified(digest)
        finally:
            store.close()

    def drive(self, http: httpx.Client, draw: random.Random) -> None:
        """A few requests, and one that the server is killed within."""
        for _ in range(draw.randrange(1, 6)):
            self.send(http, *self.operation(draw))
        names, method, path, options = self.operation(draw)
        self.open_names = names
        killer = threading.Timer(draw.uniform(0, 0.12), os.kill, (self.pid, signal.SIGKILL))
        killer.start()
        try:
            self.send(http, names, method, path, options)
        except httpx.TransportError:
            self.interrupted += 1
        killer.join()

    def send(
        self, http: httpx.Client, names: str, method: str, path: str, options: dict[str, Any]
    ) -> None:
        answer = http.request(method, path, **options)
        expect(answer.status_code < 500, f"{method} {path}: {answer.status_code} {answer.text}")
        self.operations += answer.is_success
        self.refused += not answer.is_success
        self.known.update({name: shown(http, name) for name in names})
        self.open_names = ""

    def operation(self, draw: random.Random) -> tuple[str, str, str, dict[str, Any]]:
        """(the names that it may change, method, path, what else is sent)."""
        name, folder = draw.choice(NAMES), self.home / "adapters" / f"a-{draw.randrange(CONTENTS)}"
        entry = self.known[name]
        version = draw.choice(entry["versions"])[0] if entry else 1
        files = {
            "config": (folder / "adapter_config.json").read_bytes(),
            "weights": (folder / "adapter_model.safetensors").read_bytes(),
        }
        data = json.dumps({"prompt": "Two and two is", "completion": f" {draw.randrange(99)}"})
        upload = {"files": files, "data": {"name": name, "evaluation": data}}
        back = draw.choice(["previous", "baseline", version])
        bounds = {"thresholds": {"general_divergence": draw.random()}, "data": data}
        percent = {"version": version, "percent": draw.choice([0, 5, 50])}
        own = f"/admin/adapters/{name}"
        return draw.choice(
            [
                (name, "POST", "/admin/adapters", {"json": {"name": name, "path": str(folder)}}),
                (name, "POST", "/admin/adapters", {"json": {"name": name, "path": str(folder)}}),
                (name, "POST", "/admin/adapters", upload),
                (name, "POST", f"{own}/promote", {"json": {"version": version}}),
                (name, "POST", f"{own}/canary", {"json": percent}),
                (name, "POST", f"{own}/shadow", {"json": percent}),
                (name, "POST", f"{own}/rollback", {"json": {"to": back}}),
                (name, "POST", f"{own}/retire", {"json": {"version": version}}),
                (name, "PUT", f"{own}/evaluation", {"json": bounds}),
                (name, "DELETE", f"{own}@{version}", {"params": {"force": True}}),
                (name, "DELETE", own, {"params": {"force": draw.random() < 0.3}}),
                (NAMES, "POST", "/admin/gc", {"json": {}}),
            ]
        )


def shown(http: httpx.Client, name: str) -> dict[str, Any] | None:
    """A name's versions and route, as the server shows them; None where there is no such name."""
    answer = http.get(f"/admin/adapters/{name}")
    if answer.status_code == 404:
        return None
    answer.raise_for_status()
    found = answer.json()
    versions = [[v["version"], v["digest"], v["state"]] for v in found["versions"]]
    asked = http.get(f"/admin/adapters/{name}/evaluation").raise_for_status().json()
    return {"versions": versions, "route": found["route"], "asked": asked}


def audit(http: httpx.Client) -> list[dict[str, Any]]:
    """The whole log."""
    entries: list[dict[str, Any]] = []
    while True:
        after = entries[-1]["seq"] if entries else 0
        page = http.get("/admin/audit", params={"after": after, "limit": 1000})
        entries += page.raise_for_status().json()["data"]
        if not page.json()["has_more"]:
            return entries


def prepare(home: Path) -> None:
    """The model and the adapters, made in a process of its own: threads do not outlive a fork."""

    def make() -> None:
        model = tiny_model(home / "model", hidden=32, layers=2)
        folders = adapters(home / "made", model, CONTENTS)
        (home / "adapters").mkdir()
        for number, folder in enumerate(folders):
            folder.rename(home / "adapters" / f"a-{number}")
        os._exit(0)

    _, status = os.waitpid(forked(make, home / "prepare.log"), 0)
    expect(status == 0, (home / "prepare.log").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", choices=("sqlite", "redis"), default="sqlite")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began, draw = time.monotonic(), random.Random(options.seed)
    with place(options.store) as (home, url):
        prepare(home)
        chaos = Chaos(home=home, url=url)
        for number in tqdm(range(options.rounds), unit="kill"):
            try:
                chaos.round(draw)
            except SystemExit as wrong:
                tail = (home / "server.log").read_text()[-3000:]
                raise SystemExit(f"round {number}: {wrong}\n{tail}") from None
    told = {
        "store": options.store,
        "kills": options.rounds,
        "acknowledged": chaos.operations,
        "refused": chaos.refused,
        "killed_within_one": chaos.interrupted,
        "killed_while_starting": chaos.while_starting,
        "audit_entries": len(chaos.hashes),
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
