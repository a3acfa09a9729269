"""Promotes, canaries and rollbacks in a row, under load on one adapter, on a real server process.

    python loadtests/rollout_under_load.py                 # 200 changes under 32 clients
    python loadtests/rollout_under_load.py --changes 20 --clients 4

What must hold, and makes the exit code 1 otherwise: no request fails; each answer is exactly the
greedy output of the version that its header names (taken from the idle server beforehand); the
request sent right after a change's answer is served by what the route then says. Reported: the time
from a change's call to its answer, from which on every request sees it, and to the end of the first
request that was sent after it. The table goes to stderr, JSON to stdout.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from bench_stats import percentile
from tiny_server import ADMIN, adapters, register, serving, tiny_model

NAME, BASELINE = "rolling", "baseline"
PROMPTS = ([50, 170, 420, 9], [11, 3, 8, 120, 77, 31, 6], [60, 61], [900, 4, 4, 81, 7000])
VERSIONS = 4


def change(number: int) -> tuple[str, dict[str, Any]]:
    """The call and the body of change ``number``."""
    kinds: tuple[tuple[str, dict[str, Any]], ...] = (
        ("promote", {"version": 1}),
        ("canary", {"version": 2, "percent": 50}),
        ("rollback", {"to": "previous"}),
        ("promote", {"version": 4}),
        ("rollback", {"to": BASELINE}),
        ("canary", {"version": 3, "percent": 30}),
        ("promote", {}),
        ("rollback", {"to": "previous"}),
        ("canary", {"version": 1, "percent": 100}),
        ("rollback", {"to": 3}),
    )
    return kinds[number % len(kinds)]


def serves(route: dict[str, Any]) -> set[str]:
    """What may serve a request under a route."""
    canary = route["canary"]
    targets = {route["stable"]} if canary is None or canary["percent"] < 100 else set()
    targets |= {canary["version"]} if canary else set()
    return {BASELINE if t == BASELINE else f"{NAME}@{t}" for t in targets}


@dataclass
class Run:
    """One load test. Times in seconds."""

    http: httpx.AsyncClient
    tokens: int
    expected: dict[tuple[str, int], str] = field(default_factory=dict)
    served: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    to_answer: list[float] = field(default_factory=list)
    to_effect: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    done: bool = False

    async def complete(self, model: str, prompt: int) -> tuple[str, str]:
        """(what served it, the text); raises where the request fails."""
        body = {
            "model": model, "prompt": PROMPTS[prompt], "max_tokens": self.tokens, "temperature": 0,
            "ignore_eos": True,
        }  # fmt: skip
        answer = await self.http.post("/v1/completions", json=body, headers=ADMIN)
        answer.raise_for_status()
        text = answer.json()["choices"][0]["text"]
        return answer.headers["x-manyhats-served-by"], str(text)

    async def learn(self, base: str) -> None:
        """What each version says when nothing else runs."""
        for prompt in range(len(PROMPTS)):
            self.expected[BASELINE, prompt] = (await self.complete(base, prompt))[1]
            for version in range(1, VERSIONS + 1):
                served, text = await self.complete(f"{NAME}@{version}", prompt)
                self.expected[served, prompt] = text
        if len(set(self.expected.values())) < len(self.expected):
            self.problems.append("two versions say the same: the check would see nothing")

    async def ask(self, prompt: int, allowed: set[str] | None = None) -> None:
        """One request for the name, and whether its answer is the one that its header names."""
        started = time.perf_counter()
        try:
            served, text = await self.complete(NAME, prompt)
        except (httpx.HTTPError, KeyError, ValueError) as error:
            self.problems.append(f"a request failed: {error!r}")
            return
        self.latencies.append(time.perf_counter() - started)
        self.served[served] += 1
        if text != self.expected.get((served, prompt)):
            self.problems.append(f"{served} does not say {text!r}")
        if allowed is not None and served not in allowed:
            self.problems.append(f"{served} served a request after {allowed} was answered")

    async def client(self, number: int) -> None:
        """Asks until the changes are done."""
        for i in itertools.count(number):
            await self.ask(i % len(PROMPTS))
            if self.done:
                return

    async def changes(self, count: int) -> None:
        """The changes, one after the other, and a request right after the answer of each."""
        for number in range(count):
            action, body = change(number)
            started = time.perf_counter()
            answer = await self.http.post(
                f"/admin/adapters/{NAME}/{action}",
                json={**body, "reason": f"change {number}"},
                headers=ADMIN,
            )
            self.to_answer.append(time.perf_counter() - started)
            if answer.status_code != 200:
                self.problems.append(f"change {number} ({action}) failed: {answer.text}")
                continue
            await self.ask(number % len(PROMPTS), serves(answer.json()["route"]))
            self.to_effect.append(time.perf_counter() - started)
        self.done = True

    def result(self, seconds: float) -> dict[str, Any]:
        """The figures, in milliseconds where a name says so."""
        rows = {
            name: {f"p{q}_ms": round(1000 * percentile(values, q), 2) for q in (50, 99, 100)}
            for name, values in (
                ("change_to_answer", self.to_answer),
                ("change_to_first_answer_under_it", self.to_effect),
                ("request", self.latencies),
            )
        }
        return {
            "changes": len(self.to_answer), "requests": sum(self.served.values()),
            "seconds": round(seconds, 1), "errors": len(self.problems),
            "problems": self.problems[:10], "served": dict(sorted(self.served.items())), **rows,
        }  # fmt: skip


async def measure(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The whole load test in the folder ``work``."""
    model = args.model or tiny_model(work / "tiny")
    folders = adapters(work / "adapters", model, VERSIONS)
    limits = httpx.Limits(max_connections=None)
    async with (
        serving(work, model, "--slots", str(VERSIONS - 1)) as server,
        httpx.AsyncClient(base_url=server.base_url, limits=limits, timeout=120) as http,
    ):
        run = Run(http, args.tokens)
        await register(http, NAME, folders)
        models = (await http.get("/v1/models", headers=ADMIN)).json()["data"]
        await run.learn(models[0]["id"])
        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(args.clients):
                group.create_task(run.client(number))
            group.create_task(run.changes(args.changes))
        return run.result(time.perf_counter() - started)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--changes", type=int, default=200)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=8, help="of each answer")
    parser.add_argument("--model", type=Path, help="a folder; default a tiny random model")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as work:
        result = asyncio.run(measure(Path(work), args))
    for name, value in result.items():
        print(f"{name:34} {value}", file=sys.stderr)
    print(json.dumps(result))
    return 1 if result["errors"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
