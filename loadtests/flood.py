"""One tenant floods the server; what does another one's time to first token rise by?

    python loadtests/flood.py

Two tenants of equal weight with keys of their own. The quiet one asks now and then, alone, then
while the other keeps ``--flood`` requests outstanding. Its fair wait is the bound of "Fairness in
Serving Large Language Models" (OSDI 2024) on the dispatch of a tenant that was not waiting,

    2 * (tenants - 1) * max(input price * longest prompt, output price * M) / a

where M is the number of tokens that the sequences admitted at one time come to together, and ``a``
the service that the server gave under the flood, in priced tokens a second. A rise of the median
over it makes the exit code 1. The table goes to stderr, JSON to stdout.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from bench_stats import percentile
from tiny_server import ADMIN, serving, tiny_model

INPUT_PRICE, OUTPUT_PRICE = 1.0, 2.0


class Tenant:
    """One tenant's requests, each with a prompt of its own. Times in seconds."""

    def __init__(self, http: httpx.AsyncClient, key: str, model: str, seed: int) -> None:
        self._http = http
        self._headers = {"authorization": f"Bearer {key}"}
        self._model = model
        self._random = random.Random(seed)
        self.ttfts: list[float] = []
        self.service = 0.0
        self.errors: list[str] = []

    async def ask(self, prompt_tokens: int, tokens: int) -> None:
        """One streamed request."""
        prompt = [self._random.randrange(100, 40_000) for _ in range(prompt_tokens)]
        body = {
            "model": self._model, "prompt": prompt, "max_tokens": tokens, "stream": True,
            "ignore_eos": True, "temperature": 0,
        }  # fmt: skip
        started, first = time.perf_counter(), True
        try:
            async with self._http.stream(
                "POST", "/v1/completions", json=body, headers=self._headers
            ) as answer:
                answer.raise_for_status()
                self.service += INPUT_PRICE * prompt_tokens
                async for line in answer.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    self.service += OUTPUT_PRICE
                    if first:
                        first = False
                        self.ttfts.append(time.perf_counter() - started)
        except httpx.HTTPError as error:
            self.errors.append(repr(error))

    async def flood(self, prompt_tokens: int, tokens: int) -> None:
        """One request after the other, until cancelled."""
        while True:
            await self.ask(prompt_tokens, tokens)


async def tenant(http: httpx.AsyncClient, name: str, model: str) -> Tenant:
    """A new tenant with a key."""
    for path, body in (("", {"id": name}), (f"/{name}/keys", {})):
        answer = await http.post(f"/admin/tenants{path}", json=body, headers=ADMIN)
        answer.raise_for_status()
    return Tenant(http, answer.json()["key"], model, len(name))


async def measure(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The whole load test in the folder ``work``."""
    model = args.model or tiny_model(work / "tiny")
    limits = httpx.Limits(max_connections=None)
    async with (
        serving(work, model, "--max-num-seqs", str(args.seqs)) as server,
        httpx.AsyncClient(base_url=server.base_url, limits=limits, timeout=300) as http,
    ):
        base = (await http.get("/v1/models", headers=ADMIN)).json()["data"][0]["id"]
        quiet = await tenant(http, "quiet", base)
        loud = await tenant(http, "flooding", base)
        await quiet.ask(args.prompt, 4)  # the first one warms up
        quiet.ttfts.clear()
        for _ in range(args.requests):
            await quiet.ask(args.prompt, 4)
        alone, quiet.ttfts = quiet.ttfts, []
        floods = [
            asyncio.create_task(loud.flood(args.prompt, args.tokens)) for _ in range(args.flood)
        ]
        while len(loud.ttfts) < args.seqs:  # until it has taken every place
            await asyncio.sleep(0.05)
        started, before = time.perf_counter(), loud.service + quiet.service
        for _ in range(args.requests):
            await quiet.ask(args.prompt, 4)
        seconds = time.perf_counter() - started
        rate = (loud.service + quiet.service - before) / seconds
        for task in floods:
            task.cancel()
        await asyncio.gather(*floods, return_exceptions=True)
    admitted = args.seqs * (args.prompt + args.tokens)
    fair = 2 * max(INPUT_PRICE * args.prompt, OUTPUT_PRICE * admitted) / rate
    rise = percentile(quiet.ttfts, 50) - percentile(alone, 50)
    return {
        "alone_p50_ms": round(1000 * percentile(alone, 50), 1),
        "flooded_p50_ms": round(1000 * percentile(quiet.ttfts, 50), 1),
        "flooded_p99_ms": round(1000 * percentile(quiet.ttfts, 99), 1),
        "flooding_tenants_own_p50_ms": round(1000 * percentile(loud.ttfts, 50), 1),
        "rise_p50_ms": round(1000 * rise, 1),
        "fair_wait_ms": round(1000 * fair, 1),
        "service_per_s": round(rate, 1),
        "errors": len(quiet.errors) + len(loud.errors),
        "problems": (quiet.errors + loud.errors)[:5],
        "within": rise <= fair,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--flood", type=int, default=64, help="requests kept outstanding")
    parser.add_argument("--requests", type=int, default=30, help="of the quiet tenant, each time")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="of the flooding tenant's answers")
    parser.add_argument("--seqs", type=int, default=16, help="sequences in one step")
    parser.add_argument("--model", type=Path, help="a folder; default a tiny random model")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as work:
        result = asyncio.run(measure(Path(work), args))
    for name, value in result.items():
        print(f"{name:34} {value}", file=sys.stderr)
    print(json.dumps(result))
    return 0 if result["within"] and not result["errors"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
