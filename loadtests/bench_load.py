"""Streaming load on an OpenAI-compatible server: what is sent, how it is timed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from bench_http import Address, Connection, ProtocolError, sse_data
from bench_stats import RequestResult, Summary, summarize
from tqdm import tqdm

_TEXT = """
time year people way day man thing woman life child world school state family student group
country problem hand part place case week company system program question work government number
night point home water room mother area money story fact month lot right study book eye job word
business issue side kind head house service friend father power hour game line end member law car
city community name president team minute idea kid body information back parent face others level
office door health person art war history party result change morning reason research girl guy
moment air teacher force education foot boy age policy process music market sense nation plan
college interest death experience effect use class control care field development
"""
WORDS = tuple(_TEXT.split())
"""Words that nearly every vocabulary keeps as one token (with the space before them)."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of the server, the same for every cell.

    ``vocab_size``: ids are drawn below it. ``fields``: what the body of a request to a model has
    besides, for servers that know an adapter by something else than its name.
    """

    base_url: str
    model: str
    endpoint: str = "completions"
    prompt_format: str = "ids"
    input_tokens: int = 128
    output_tokens: int = 128
    ignore_eos: bool = False
    api_key: str | None = None
    vocab_size: int = 32000
    seed: int = 0
    timeout_s: float = 600.0
    progress: bool = True
    fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the matrix.

    ``models``: what the requests name, in turn; ``adapters`` is 0 for the base.
    """

    concurrency: int
    requests: int
    models: Sequence[str]
    adapters: int
    label: str = ""


@dataclass(slots=True)
class _Timer:
    """Collects one stream's events."""

    result: RequestResult
    started: float = field(default_factory=time.perf_counter)

    def event(self) -> None:
        self.result.events.append(time.perf_counter() - self.started)

    def stop(self) -> None:
        self.result.latency = time.perf_counter() - self.started


def prompt_rng(load: Load, cell: Cell, index: int) -> random.Random:
    """A generator that depends on the seed, the cell and the request.

    Repeatable, and never twice the same.
    """
    key = f"{load.seed}/{cell.label}/{cell.concurrency}/{cell.adapters}/{index}".encode()
    return random.Random(hashlib.sha256(key).digest())


def request_body(load: Load, cell: Cell, index: int) -> dict[str, Any]:
    """The JSON body of a cell's ``index``-th request."""
    return body_of(load, cell.models[index % len(cell.models)], prompt_rng(load, cell, index))


def body_of(load: Load, model: str, rng: random.Random) -> dict[str, Any]:
    """The JSON body of a request to ``model`` with a prompt drawn from ``rng``."""
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": load.output_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if load.ignore_eos:
        body["ignore_eos"] = True
    body |= load.fields.get(model, {})
    text = " ".join(rng.choices(WORDS, k=load.input_tokens))
    if load.endpoint == "chat":
        body["messages"] = [{"role": "user", "content": text}]
    elif load.prompt_format == "ids":
        # The first thousand ids of a vocabulary hold its special and byte tokens.
        body["prompt"] = [rng.randrange(1000, load.vocab_size) for _ in range(load.input_tokens)]
    else:
        body["prompt"] = text
    return body


def _carries_token(event: Mapping[str, Any]) -> bool:
    choices = event.get("choices")
    if not choices:
        return False
    if "delta" in choices[0]:
        # A chat stream opens with the role alone and may close with the finish reason alone.
        return bool(choices[0]["delta"].get("content"))
    # A completion's token may have no text (a special token, half a character), but a closing event
    # without text is no token.
    return bool(choices[0].get("text")) or choices[0].get("finish_reason") is None


async def _consume(pieces: AsyncIterator[bytes], timer: _Timer) -> None:
    result, done = timer.result, False
    async for data in sse_data(pieces):
        if data == b"[DONE]":
            done = True
            continue
        event = orjson.loads(data)
        if not isinstance(event, dict):
            raise ProtocolError(f"an event must be a JSON object, got {data[:100]!r}")
        if "error" in event:
            result.error = f"stream error: {str(event['error'])[:200]}"
            continue
        if _carries_token(event):
            timer.event()
        if usage := event.get("usage"):
            result.prompt_tokens = usage["prompt_tokens"]
            result.output_tokens = usage["completion_tokens"]
            result.counted = "usage"
    if result.error is None and not done:
        result.error = "stream ended without [DONE]"
    if result.counted == "events":
        result.output_tokens = len(result.events)


async def run_request(connection: Connection, load: Load, body: Mapping[str, Any]) -> RequestResult:
    """Sends one streaming request; whatever goes wrong ends up in the result's ``error``."""
    path = "/v1/chat/completions" if load.endpoint == "chat" else "/v1/completions"
    payload = orjson.dumps(body)
    timer = _Timer(RequestResult(model=body["model"]))
    try:
        async with asyncio.timeout(load.timeout_s):
            response = await connection.request("POST", path, payload)
            if response.status == 200:
                await _consume(connection.body(), timer)
            else:
                text = (await connection.read_all()).decode("utf-8", "replace")
                timer.result.error = f"HTTP {response.status}: {text[:200]}"
    except (OSError, ProtocolError, TimeoutError, ValueError, KeyError) as error:
        timer.result.error = f"{type(error).__name__}: {error}"
        await connection.close()
    timer.stop()
    return timer.result


def connect(base_url: str, api_key: str | None) -> Connection:
    """A connection that sends the key, if there is one; it opens with its first request."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    return Connection(Address.parse(base_url), headers)


@dataclass(frozen=True, slots=True)
class Collected:
    """What a cell's requests gave, in the order of their ends; seconds of wall and client CPU."""

    results: list[RequestResult]
    duration_s: float
    client_cpu_s: float

    def summary(self, load: Load, cell: Cell) -> Summary:
        """The same in numbers."""
        return summarize(
            self.results,
            concurrency=cell.concurrency,
            adapters=cell.adapters,
            wanted_tokens=load.output_tokens,
            duration_s=self.duration_s,
            client_cpu_s=self.client_cpu_s,
        )


async def collect(load: Load, cell: Cell) -> Collected:
    """Runs a cell with ``concurrency`` requests always in flight."""
    bodies = [request_body(load, cell, i) for i in range(cell.requests)]
    waiting = iter(bodies)
    results: list[RequestResult] = []
    title = f"{cell.label or load.model} c={cell.concurrency} a={cell.adapters}"
    with tqdm(total=cell.requests, desc=title, unit="req", disable=not load.progress) as bar:

        async def worker() -> None:
            connection = connect(load.base_url, load.api_key)
            for body in waiting:
                results.append(await run_request(connection, load, body))
                bar.update()
            await connection.close()

        started, cpu = time.perf_counter(), time.process_time()
        async with asyncio.TaskGroup() as group:
            for _ in range(min(cell.concurrency, cell.requests)):
                group.create_task(worker())
        duration, cpu = time.perf_counter() - started, time.process_time() - cpu
    return Collected(results, duration, cpu)


async def run_cell(load: Load, cell: Cell) -> Summary:
    """Runs a cell with ``concurrency`` requests always in flight, and sums it up."""
    return (await collect(load, cell)).summary(load, cell)


async def warm_up(load: Load, models: Sequence[str]) -> None:
    """One short request a model, so that no cell pays for loading an adapter.

    Raises RuntimeError on a failure.
    """
    connection = connect(load.base_url, load.api_key)
    cell = Cell(concurrency=1, requests=len(models), models=models, adapters=0, label="warm-up")
    for index in tqdm(range(len(models)), desc="warm-up", unit="req", disable=not load.progress):
        body = request_body(load, cell, index) | {"max_tokens": 2}
        result = await run_request(connection, load, body)
        if result.error is not None:
            raise RuntimeError(f"warm-up of {models[index]!r} failed: {result.error}")
    await connection.close()


async def served_models(base_url: str, api_key: str | None) -> list[str]:
    """The ids that GET /v1/models lists, in its order.

    Raises RuntimeError when the answer is not a 200.
    """
    connection = connect(base_url, api_key)
    response = await connection.request("GET", "/v1/models")
    content = await connection.read_all()
    await connection.close()
    if response.status != 200:
        raise RuntimeError(f"GET /v1/models: HTTP {response.status}: {content[:200]!r}")
    return [entry["id"] for entry in json.loads(content)["data"]]


def default_requests(concurrency: int, *, quick: bool) -> int:
    """Requests of a cell: two full waves (one when quick), and never fewer than a few."""
    return max(2, concurrency) if quick else max(4, 2 * concurrency)
