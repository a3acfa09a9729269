"""kill -9 at random moments of registrations, route changes, deletions and collections.

Each round forks a process that drives the adapter service over small real adapters, as the admin
API does: it says on a pipe what it is about to do, and what the names are once that is done. It is
killed at a random moment, now and then while it opens the registry. Then the registry is opened
again: it must hold what was acknowledged (the one operation on its way may have happened or not),
the audit chain must hold, and the disk must hold the bytes of the versions and nothing else.

    python loadtests/chaos/kill.py --store sqlite --rounds 100
    python loadtests/chaos/kill.py --store redis --rounds 100   # starts a redis-server of its own

Ends with 1 and says what was wrong, else with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from acknowledged import NAMES, Acknowledged, expect, place
from support.adapter_service import Adapters, open_adapters, write_adapter

from manyhats.errors import ManyhatsError
from manyhats.lifecycle.audit import Cause
from manyhats.lifecycle.collector import Retention
from manyhats.lifecycle.compositions import NamedComposition
from manyhats.types import DEFAULT_TENANT as T
from manyhats.types import CompositionKind

CONTENTS = 6
COMPOSED = "d"


def opened(home: Path, url: str | None) -> Any:
    return open_adapters(home, max_versions=10**6, redis_url=url, retention=Retention(0, 0))


def states(adapters: Adapters) -> dict[str, Any]:
    """Each name's versions and route, as JSON has them."""
    found: dict[str, Any] = {}
    for name in NAMES:
        entry = adapters.registry.entry(name)
        found[name] = entry and {
            "versions": [[r.ref.version, r.ref.digest, r.state.value] for r in entry.versions],
            "route": entry.route.shown(),
        }
    return json.loads(json.dumps(found))


def operation(adapters: Adapters, draw: random.Random) -> tuple[str, Callable[[], Any]]:
    """(the names that it may change, what to do)."""
    routes, why, service = adapters.service.rollouts, Cause("driver", "chaos"), adapters.service
    name = draw.choice(NAMES)
    entry = adapters.registry.entry(name)
    version = draw.choice(entry.versions).ref.version if entry else 1
    folder = str(adapters.root / str(draw.randrange(CONTENTS)))
    whole = NamedComposition(CompositionKind.WEIGHTED, ("a", "b"), (0.5, draw.random()))
    percent, back = draw.choice([0, 5, 50]), draw.choice([None, 0, version])
    retired, force = draw.random() < 0.7, draw.random() < 0.2
    plain = draw.choice(NAMES.replace(COMPOSED, ""))
    return draw.choice(
        [
            (plain, lambda: service.register_folder(plain, folder, tenant=T)),
            (plain, lambda: service.register_folder(plain, folder, tenant=T)),
            (plain, lambda: service.register_folder(plain, folder, tenant=T)),
            (COMPOSED, lambda: service.register_composition(COMPOSED, whole, tenant=T)),
            (name, lambda: routes.promote(name, T, why, version)),
            (name, lambda: routes.canary(name, T, why, version=version, percent=percent)),
            (name, lambda: routes.rollback(name, T, why, back)),
            (name, lambda: routes.retire(name, T, why, version, retired=retired)),
            (name, lambda: service.delete(f"{name}@{version}", T, force=True)),
            (name, lambda: service.delete(name, T, force=force)),
            (NAMES, lambda: service.collector.collect(why)),
        ]
    )


def drive(home: Path, url: str | None, seed: int, tell: Callable[[Any], None]) -> None:
    draw = random.Random(seed)
    with opened(home, url) as adapters:
        tell({"states": states(adapters)})
        while True:
            names, do = operation(adapters, draw)
            tell({"begins": names})
            with suppress(ManyhatsError):  # refused: nothing has changed, which is checked too
                do()
            tell({"states": states(adapters)})


def run_and_kill(
    drive: Callable[[Callable[[Any], None]], None], lines: int, delay_s: float
) -> list[str]:
    """What a forked process said until it was killed, ``delay_s`` after so many lines."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            drive(lambda said: _write(writing, said))
        except BaseException:  # noqa: BLE001 - said on stderr, and the parent sees it end
            traceback.print_exc()
        os._exit(1)  # it ends by being killed, or something is wrong
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        heard = [pipe.readline() for _ in range(lines)]
        time.sleep(delay_s)  # the random moment
        os.kill(child, signal.SIGKILL)
        heard += pipe.readlines()
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        raise SystemExit("the driver ended by itself")
    return [line.decode() for line in heard if line.endswith(b"\n")]


def _write(fd: int, said: Any) -> None:
    os.write(fd, json.dumps(said).encode() + b"\n")


@dataclass
class Chaos(Acknowledged):
    """One registry over all the rounds, and what must be true of it."""

    home: Path = field(kw_only=True)
    url: str | None = field(kw_only=True)
    operations: int = 0
    interrupted: int = 0
    while_opening: int = 0

    def round(self, seed: int, draw: random.Random) -> None:
        opening = draw.random() < 0.15
        lines = 0 if opening else 1 + 2 * draw.randrange(1, 12)
        delay_s = draw.uniform(0, 0.03)
        heard = run_and_kill(lambda tell: drive(self.home, self.url, seed, tell), lines, delay_s)
        said = [json.loads(line) for line in heard]
        for line in said:
            self.known = line.get("states", self.known)
        self.operations += sum("states" in line for line in said[1:])
        self.while_opening += not said
        open_names = said[-1].get("begins", "") if said else ""
        self.interrupted += bool(open_names)
        with opened(self.home, self.url) as again:
            self.check_names(states(again), open_names)
            self.check_log([e.shown() for e in again.registry.audit(limit=10**6)])
            self.check_disk(again)

    def check_disk(self, again: Adapters) -> None:
        used = again.registry.digests()
        expect(again.store.list() == sorted(used), "bytes without a version, or the reverse")
        for digest in used:
            again.store.verified(digest)
        expect(again.leftovers() == [], f"left over: {again.leftovers()}")
        root = self.home / "store"
        files = {p.relative_to(root).parts[0] for p in root.rglob("*") if p.is_file()}
        expect(files <= {"lock", "registry", "tmp", *(d[:2] for d in used)}, f"stray: {files}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", choices=("sqlite", "redis"), default="sqlite")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=20)
    options = parser.parse_args()
    began, draw = time.monotonic(), random.Random(options.seed)
    with place(options.store) as (home, url):
        for seed in range(CONTENTS):
            write_adapter(home / "allowed" / str(seed), seed)
        chaos = Chaos(home=home, url=url)
        for number in range(options.rounds):
            try:
                chaos.round(options.seed * 1000 + number, draw)
            except SystemExit as wrong:
                raise SystemExit(f"round {number}: {wrong}") from None
    told = {
        "store": options.store,
        "kills": options.rounds,
        "operations": chaos.operations,
        "killed_within_one": chaos.interrupted,
        "killed_while_opening": chaos.while_opening,
        "audit_entries": len(chaos.hashes),
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
