"""Fifty route changes in a row under load on one adapter, over a real server with a tiny model: no
request fails, and each answer is the one that PEFT gives for the version that its header names.
"""

from __future__ import annotations

import asyncio
import itertools
import json

import httpx
import pytest
from peft import PeftModel
from support.models import greedy, tiny_model, tiny_tokenizer
from support.random_lora import write_random_lora
from support.server import running_server

from manyhats.lifecycle.audit import broken_link

pytestmark = pytest.mark.e2e

CLIENTS = 16
CHANGES = 50
VERSIONS = (1, 2, 3)
NEW_TOKENS = 6
PROMPTS = [[5, 17, 42, 9], [11, 3, 8, 120, 77, 31, 6], [60, 61]]
BASELINE = "baseline"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of the model, folder of the adapters, text by (served by, prompt) as PEFT has it)."""
    folder = tmp_path_factory.mktemp("rollouts")
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    texts = {}

    def note(name, model):
        for i, prompt in enumerate(PROMPTS):
            tokens = greedy(model, prompt, NEW_TOKENS)
            texts[name, i] = tokenizer.decode(tokens, skip_special_tokens=True)

    note(BASELINE, model)
    for version in VERSIONS:
        path = write_random_lora(
            folder / "adapters" / f"v{version}",
            folder / "tiny",
            rank=version + 1,
            targets=("q_proj", "down_proj"),
            seed=version,
            scale=0.5,
        )
        name = f"a{version}"
        if version == VERSIONS[0]:
            peft = PeftModel.from_pretrained(model, path, adapter_name=name)
        else:
            peft.load_adapter(path, adapter_name=name)
        peft.set_adapter(name)
        note(f"a@{version}", peft)
    assert len(set(texts.values())) == len(texts), "no two of them say the same"
    return folder / "tiny", folder / "adapters", texts


@pytest.fixture(scope="module")
def server(made, tmp_path_factory):
    model, root, _ = made
    flags = ("--model", str(model), "--adapter-root", str(root), "--kernels", "torch")
    flags += ("--quantization", "none", "--dtype", "fp32", "--kv-cache-mb", "16")
    flags += ("--slots", "2")  # fewer than there are versions: they come and go beside
    with running_server(tmp_path_factory.mktemp("home"), *flags) as running:
        for version in VERSIONS:
            body = {"name": "a", "path": str(root / f"v{version}")}
            answer = httpx.post(f"{running.base_url}/admin/adapters", json=body, timeout=60)
            assert answer.status_code == 201, answer.text
        yield running


def change(number: int) -> tuple[str, dict[str, object]]:
    """The call and the body of change ``number``."""
    kinds = (
        ("promote", {"version": 1}),
        ("canary", {"version": 2, "percent": 50}),
        ("rollback", {"to": "previous"}),
        ("rollback", {"to": "baseline"}),
        ("canary", {"version": 3, "percent": 30}),
        ("promote", {}),
        ("rollback", {"to": "previous"}),
        ("promote", {"version": 2}),
        ("canary", {"version": 1, "percent": 100}),
        ("rollback", {"to": 3}),
    )
    return kinds[number % len(kinds)]


def serves(route: dict) -> set[str]:
    """What a request may be served by under a route."""
    canary = route["canary"]
    targets = {route["stable"]} if canary is None or canary["percent"] < 100 else set()
    targets |= {canary["version"]} if canary else set()
    return {BASELINE if t == BASELINE else f"a@{t}" for t in targets}


def body(prompt: int, **fields) -> dict:
    common = {"model": "a", "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    return {**common, "prompt": PROMPTS[prompt], **fields}


class Run:
    """The clients and the one who changes routes; ``answers``: (served by, prompt, text)."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http
        self.answers: list[tuple[str, int, str]] = []
        self.done = asyncio.Event()

    async def ask(self, prompt: int, **fields) -> str:
        answer = await self.http.post("/v1/completions", json=body(prompt, **fields))
        assert answer.status_code == 200, answer.text
        served = answer.headers["x-manyhats-served-by"]
        self.answers.append((served, prompt, answer.json()["choices"][0]["text"]))
        return served

    async def stream(self, prompt: int, **fields) -> None:
        sent = body(prompt, stream=True, **fields)
        async with self.http.stream("POST", "/v1/completions", json=sent) as answer:
            assert answer.status_code == 200
            lines = [x async for x in answer.aiter_lines() if x.startswith("data: {")]
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
        assert all("error" not in chunk for chunk in chunks), chunks
        text = "".join(c["choices"][0]["text"] for c in chunks if c["choices"])
        self.answers.append((answer.headers["x-manyhats-served-by"], prompt, text))

    async def client(self, number: int) -> None:
        for i in itertools.count(number):
            how = self.stream if i % 3 == 0 else self.ask
            await how(i % len(PROMPTS), user=f"user {number}" if number % 2 else None)
            if self.done.is_set():
                return

    async def changes(self) -> list[dict]:
        """Every change, one after the other, and a request at once after its answer."""
        routes = []
        for number in range(CHANGES):
            action, wanted = change(number)
            wanted = {**wanted, "reason": f"change {number}"}
            answer = await self.http.post(f"/admin/adapters/a/{action}", json=wanted)
            assert answer.status_code == 200, (number, answer.text)
            routes.append(answer.json()["route"])
            assert await self.ask(number % len(PROMPTS)) in serves(routes[-1]), (number, action)
        self.done.set()
        return routes


def test_fifty_changes_under_load(server, made):
    async def run() -> tuple[Run, list[dict]]:
        limits = httpx.Limits(max_connections=None)
        async with (
            httpx.AsyncClient(base_url=server.base_url, limits=limits, timeout=120) as http,
            asyncio.TaskGroup() as group,
        ):
            made_run = Run(http)
            for number in range(CLIENTS):
                group.create_task(made_run.client(number))
            changes = group.create_task(made_run.changes())
        return made_run, changes.result()

    done, routes = asyncio.run(run())
    texts = made[2]
    for served, prompt, text in done.answers:
        assert text == texts[served, prompt], served
    assert {served for served, _, _ in done.answers} == {s for s, _ in texts}
    assert len(done.answers) >= CLIENTS + CHANGES

    answer = server.get("/admin/audit", params={"limit": 1000}).json()
    entries = answer["data"]
    assert broken_link(entries)[1] is None
    assert [e["after"] for e in entries[len(VERSIONS) :]] == routes
    assert [e["reason"] for e in entries[len(VERSIONS) :]] == [
        f"change {number}" for number in range(CHANGES)
    ]
    shown = server.get("/admin/adapters/a").json()
    assert shown["route"] == routes[-1]
