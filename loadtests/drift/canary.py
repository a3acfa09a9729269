"""A bad canary on a real server process: held, then rolled back, by the server itself.

    python loadtests/drift/canary.py --fault noise-2

``pirate@1`` is the demo adapter and answers until its references are frozen; ``pirate@2`` is a
faulty copy. It gets a canary's schedule twice: under the policy ``hold``, then, after a human has
ended it, under ``rollback``. What must hold, and makes the exit code 1 otherwise: no request fails;
the schedule is held, the canary ended, each without anybody's help; each time under 5 % of the
requests since the canary began were answered by it; after the end none is. JSON goes to stdout.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from record import ADAPTER, ROOT, adapter_of, prompts  # noqa: E402
from server_process import ServerProcess  # noqa: E402

from manyhats.config import Settings  # noqa: E402
from manyhats.engine.model.default import ensure_default_model  # noqa: E402

KEY = "admin-of-the-load-test"
ADMIN = {"authorization": f"Bearer {KEY}"}
QUALITY = ["repetition", "distinct_ratio", "kl", "agreement", "answer_nll", "mean_logprob"]
MOST = 0.05


@dataclass
class Run:
    """The traffic of one server: closed loops of clients, and what answered each request."""

    http: httpx.AsyncClient
    tokens: int
    texts: list[str]
    served: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    done: bool = False

    async def client(self, number: int) -> None:
        """Asks until the run is done."""
        rng = random.Random(number)
        for turn in itertools.count():
            said = [{"role": "user", "content": rng.choice(self.texts)}]
            body = {
                "model": ADAPTER, "messages": said, "max_tokens": self.tokens,
                "seed": number * 1_000_000 + turn, "user": f"{number}-{turn}",  # a caller each
            }  # fmt: skip
            try:
                answer = await self.http.post("/v1/chat/completions", json=body, headers=ADMIN)
                answer.raise_for_status()
                self.served[answer.headers["x-manyhats-served-by"]] += 1
            except (httpx.HTTPError, KeyError) as error:
                self.failures.append(repr(error))
            if self.done:
                return

    @property
    def answered(self) -> int:
        """Requests answered so far."""
        return self.served.total()

    async def admin(self, method: str, path: str, **said: Any) -> dict[str, Any]:
        """A call below /admin/adapters/pirate. Raises httpx.HTTPStatusError."""
        url = f"/admin/adapters/{ADAPTER}{path}"
        answer = await self.http.request(method, url, json=said or None, headers=ADMIN)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    async def until_known(self) -> None:
        """Until the references of the quality signals are frozen."""
        while True:
            seen = await self.admin("GET", "/drift")
            signals = seen["versions"][0]["signals"]
            if all(signals.get(s, {}).get("state") == "watched" for s in QUALITY):
                return
            await asyncio.sleep(1)

    async def canary(self, action: str, most: int) -> dict[str, Any]:
        """Version 2 on its way up, under a policy, until it is held or gone."""
        await self.admin("PUT", "/drift/policy", action=action, signals=QUALITY, cool_down_s=0.0)
        before, begun = self.served.copy(), time.perf_counter()
        schedule = {"steps": [3, 10, 50, 100], "step_s": 1800}
        await self.admin("POST", "/canary", version=2, schedule=schedule, reason="a new version")
        while True:
            seen = await self.admin("GET", "/drift")
            canary = seen["route"]["canary"]
            if canary is None or canary["schedule"]["held"]:
                break
            if self.answered - before.total() > most:
                break
            await asyncio.sleep(0.2)
        since = self.served - before
        alarm = next((a for a in reversed(seen["alarms"]) if a["version"] == 2), None)
        return {
            "policy": action,
            "held": bool(canary and canary["schedule"]["held"]),
            "rolled_back": canary is None,
            "alarm": alarm and alarm["described"],
            "requests": since.total(),
            "by_the_canary": since[f"{ADAPTER}@2"],
            "share": round(since[f"{ADAPTER}@2"] / max(1, since.total()), 4),
            "seconds": round(time.perf_counter() - begun, 1),
        }

    async def after(self, count: int) -> int:
        """How many of the next ``count`` requests the canary answers."""
        await asyncio.sleep(0)
        settled = self.answered + 64  # those in flight keep the version that they were given
        while self.answered < settled:
            await asyncio.sleep(0.1)
        before, end = self.served[f"{ADAPTER}@2"], self.answered + count
        while self.answered < end:
            await asyncio.sleep(0.1)
        return self.served[f"{ADAPTER}@2"] - before


async def experiment(run: Run, bad: Path, most: int) -> dict[str, Any]:
    """Both policies in turn."""
    for path, promote in ((ROOT / "examples/adapters" / ADAPTER, True), (bad, False)):
        said = {"name": ADAPTER, "path": str(path), "promote": promote}
        answer = await run.http.post("/admin/adapters", json=said, headers=ADMIN)
        answer.raise_for_status()
    clients = [asyncio.create_task(run.client(n)) for n in range(16)]
    begun = time.perf_counter()
    await run.until_known()
    reference = {"requests": run.answered, "seconds": round(time.perf_counter() - begun, 1)}
    held = await run.canary("hold", most)
    await run.admin("POST", "/rollback", to="previous", reason="a human ends what was held")
    ended = await run.canary("rollback", most)
    later = await run.after(200)
    run.done = True
    await asyncio.gather(*clients)
    page = await run.http.get("/admin/audit", params={"name": ADAPTER, "limit": 50}, headers=ADMIN)
    audit = [f"{e['actor']}: {e['action']}: {e['reason']}" for e in page.json()["data"]]
    return {
        "reference": reference, "hold": held, "rollback": ended,
        "by_the_canary_in_the_next_200": later, "requests": run.answered,
        "failed": len(run.failures), "failures": run.failures[:5], "audit": audit,
    }  # fmt: skip


def holds(found: dict[str, Any]) -> bool:
    """Whether all that must hold does."""
    hold, back = found["hold"], found["rollback"]
    shares = hold["share"] < MOST and back["share"] < MOST
    quiet = found["failed"] == 0 and found["by_the_canary_in_the_next_200"] == 0
    return bool(hold["held"] and back["rolled_back"] and shares and quiet)


async def measure(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The server, started and stopped around the experiment."""
    usual = Settings().home
    model = ensure_default_model(usual)
    home = work / "home"
    home.mkdir()
    for kept in ("quantized", "kernels"):  # made at a first start: not again
        if (usual / kept).is_dir():
            (home / kept).symlink_to(usual / kept)
    bad = adapter_of(args.fault, model, work / args.fault)
    os.environ["MANYHATS_ADMIN_API_KEYS"] = KEY  # a flag can be read in the process list
    flags = ["--model", str(model), "--home", str(home), "--adapter-root", str(work)]
    flags += ["--adapter-root", str(ROOT / "examples/adapters")]
    flags += ["--drift-share", str(args.share)]
    server = ServerProcess(flags, work / "server.log")
    try:
        await server.wait_ready()
        async with httpx.AsyncClient(base_url=server.base_url, timeout=600) as http:
            return await experiment(Run(http, args.tokens, prompts()[0]), bad, args.most)
    finally:
        server.stop()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--fault", default="noise-2", help="a condition of record.py")
    parser.add_argument("--share", type=float, default=0.02, help="of the stable one rescored")
    parser.add_argument("--tokens", type=int, default=16, help="of each answer at most")
    parser.add_argument("--most", type=int, default=5000, help="requests to wait in each phase")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as work:
        found = asyncio.run(measure(Path(work), args))
    found = {"fault": args.fault, "drift_share": args.share, **found}
    print(json.dumps(found, indent=1))
    return 0 if holds(found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
