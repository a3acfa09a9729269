"""A light load for the chaos tests, and what its clients saw, phase by phase."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_stats import percentile
from tiny_server import ADMIN

PROMPT = [50, 170, 420, 9]
TOKENS = 6


def outcome(answer: httpx.Response) -> str:
    """A status and, for an error, the code that it states."""
    if answer.is_success:
        return str(answer.status_code)
    try:
        return f"{answer.status_code} {answer.json()['error']['code']}"
    except (ValueError, KeyError, TypeError):
        return f"{answer.status_code} without a stated error"


@dataclass
class Clients:
    """Clients who ask ``models`` in turn, without pause, over and over, of one of ``servers``.

    A request that finds its server gone is sent to the next one, as a load balancer would; what it
    met is counted as ``broken off``. An answer must be the one that its version gave when nothing
    was wrong: ``wrong`` has the others.
    """

    servers: Sequence[httpx.AsyncClient]
    groups: Mapping[str, Sequence[str]]
    phase: str = ""
    expected: dict[str, str] = field(default_factory=dict)
    seen: dict[tuple[str, str], Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    seconds: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    wrong: list[str] = field(default_factory=list)

    async def ask(self, model: str, **headers: str) -> httpx.Response:
        """One greedy answer of the first server that is there. Raises httpx.TransportError."""
        body = {"model": model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
        for last, server in enumerate(self.servers, 1 - len(self.servers)):
            try:
                return await server.post(
                    "/v1/completions", json={**body, "ignore_eos": True}, headers=ADMIN | headers
                )
            except httpx.TransportError:
                if not last:
                    raise
                self.seen[self.phase, "broken off and sent to another"][model] += 1
        raise AssertionError

    async def learn(self, models: Sequence[str]) -> None:
        """What each model says while nothing is wrong."""
        for model in models:
            answer = (await self.ask(model)).raise_for_status()
            self.expected[answer.headers["x-manyhats-served-by"]] = _text(answer)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What is seen within the block is counted under that name."""
        before, self.phase = self.phase, phase
        yield
        self.phase = before

    def check(self, group: str, answer: httpx.Response, seconds: float) -> None:
        """Counts an answer, and holds it to what its version says."""
        self.seen[self.phase, group][outcome(answer)] += 1
        if answer.is_success:
            self.seconds[self.phase, group].append(seconds)
            served = answer.headers["x-manyhats-served-by"]
            if self.expected.get(served) != _text(answer):
                self.wrong.append(f"{self.phase}: {served} said something else")
        elif "without" in outcome(answer) or answer.status_code == 500:
            self.wrong.append(f"{self.phase}: {group}: {outcome(answer)}: {answer.text[:200]}")

    async def run(self, group: str) -> None:
        """One client of a group, until cancelled."""
        while True:
            for model in self.groups[group]:
                phase, began = self.phase, time.perf_counter()
                answer = await self.ask(model)
                if phase == self.phase:  # one that began in another says nothing of this one
                    self.check(group, answer, time.perf_counter() - began)

    @contextmanager
    def running(self, each: int = 1) -> Iterator[None]:
        """``each`` clients of every group while the block runs."""
        tasks = [asyncio.create_task(self.run(g)) for g in self.groups for _ in range(each)]
        try:
            yield
            self.wrong += [f"a client ended: {t.exception()!r}" for t in tasks if t.done()]
        finally:
            for task in tasks:
                task.cancel()

    async def answers(self, count: int, timeout_s: float = 120.0) -> None:
        """Returns after so many answers of every group in this phase."""
        deadline = time.monotonic() + timeout_s
        while min(self.seen[self.phase, g].total() for g in self.groups) < count:
            if time.monotonic() > deadline:
                self.wrong.append(f"{self.phase}: no {count} answers within {timeout_s:g} s")
                return
            await asyncio.sleep(0.02)

    def rows(self) -> list[dict[str, Any]]:
        """One a phase and group."""
        return [
            {
                "phase": phase,
                "group": group,
                "outcomes": dict(sorted(outcomes.items())),
                "p50_ms": _ms(self.seconds[phase, group], 50),
                "max_ms": _ms(self.seconds[phase, group], 100),
            }
            for (phase, group), outcomes in self.seen.items()
            if outcomes
        ]


def _text(answer: httpx.Response) -> str:
    return str(answer.json()["choices"][0]["text"])


def _ms(seconds: Sequence[float], q: float) -> int | None:
    return round(1000 * percentile(seconds, q)) if seconds else None
