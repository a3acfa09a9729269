"""The process itself: disconnects, full queues, many adapters in few slots, and a drained end."""

from __future__ import annotations

import asyncio
import signal
import socket
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import torch
from support.base import write_base
from support.polling import PATIENCE_S, until
from support.random_lora import write_random_lora
from support.server import running_server

pytestmark = pytest.mark.e2e


def at_rest(server) -> bool:
    metrics = server.metrics()
    return (
        metrics["vllm:num_requests_running", ()] == metrics["vllm:num_requests_waiting", ()] == 0
        and metrics["vllm:kv_cache_usage_perc", ()] == 0
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is for GPUs, and there is one")
def test_on_a_cpu_triton_is_not_even_imported(server):
    mapped = {Path(m.path).name for m in psutil.Process(server.process.pid).memory_maps()}
    assert {name for name in mapped if name.startswith("libtorch_cpu")}
    assert not {name for name in mapped if "libtriton" in name}


def test_a_disconnect_frees_blocks_and_lease(server):
    body = {
        "model": "pirate",
        "prompt": "Tell me everything",
        "max_tokens": 4000,
        "stream": True,
        "ignore_eos": True,
    }
    with httpx.stream(
        "POST", f"{server.base_url}/v1/completions", json=body, timeout=PATIENCE_S
    ) as response:
        assert response.status_code == 200
        lines = response.iter_lines()  # kept: the connection is closed with it
        next(lines)
        until(lambda: server.value("vllm:kv_cache_usage_perc") > 0)  # published within a moment
    until(lambda: at_rest(server))
    cache = server.get("/admin/cache").json()
    assert [
        r["leases"] for r in cache["device"]["resident"] if r["adapter"].startswith("pirate")
    ] == [0]


def test_a_full_queue_is_a_429(server):
    async def flood() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(limits=limits, timeout=300) as client:
            body = {"model": "pirate", "prompt": list(range(50, 350)), "max_tokens": 1, "n": 16}
            return await asyncio.gather(
                *(client.post(f"{server.base_url}/v1/completions", json=body) for _ in range(24))
            )

    responses = asyncio.run(flood())
    statuses = {r.status_code for r in responses}
    assert statuses == {200, 429}
    refused = next(r for r in responses if r.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"
    until(lambda: at_rest(server))


def test_a_body_over_the_bound_is_refused_before_it_is_read(server):
    host, port = server.base_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 900000000\r\n\r\n{"
        )
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")


@pytest.fixture(scope="module")
def tiny_slots(tmp_path_factory):
    """A server of a tiny base with 8 slots, room for few adapters on the host, and 200 adapters of
    mixed ranks in a folder. The file's last test ends it.
    """
    folder = tmp_path_factory.mktemp("slots")
    base = write_base(folder / "base")
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    for index in range(200):
        path = folder / "adapters" / f"a{index:03}"
        write_random_lora(path, base, rank=1 + index % 4, targets=targets, seed=index, scale=0.1)
    flags = ("--model", str(base), "--quantization", "none", "--dtype", "fp32", "--slots", "8")
    flags += ("--max-rank", "4", "--host-cache-mb", "1", "--kv-cache-mb", "32")
    flags += ("--adapter-root", str(folder / "adapters"), "--register-roots")
    with running_server(folder / "home", *flags) as running:
        yield running


def test_200_adapters_over_8_slots(tiny_slots):
    """500 requests, adapters chosen by Zipf's law; every answer is the adapter's own, and nothing
    leaks.
    """
    rng = np.random.default_rng(5)
    weights = 1 / np.arange(1, 201) ** 1.1
    chosen = [f"a{i:03}" for i in rng.choice(200, size=500, p=weights / weights.sum())]
    body = {
        "prompt": [5, 17, 42, 9],
        "max_tokens": 4,
        "temperature": 0,
        "logprobs": 0,
        "ignore_eos": True,
    }

    def answer(response: httpx.Response) -> tuple[str, tuple[float, ...]]:
        assert response.status_code == 200, response.text
        choice = response.json()["choices"][0]
        return choice["text"], tuple(choice["logprobs"]["token_logprobs"])

    async def run() -> list[httpx.Response]:
        gate = asyncio.Semaphore(32)
        async with httpx.AsyncClient(timeout=300) as client:

            async def one(name: str) -> httpx.Response:
                async with gate:
                    return await client.post(
                        f"{tiny_slots.base_url}/v1/completions", json={"model": name, **body}
                    )

            return await asyncio.gather(*(one(name) for name in chosen))

    responses = asyncio.run(run())
    seen: dict[str, list[tuple[str, tuple[float, ...]]]] = {}
    for name, response in zip(chosen, responses, strict=True):
        assert response.headers["x-manyhats-served-by"] == f"{name}@1"
        seen.setdefault(name, []).append(answer(response))
    for name, answers in seen.items():
        alone = answer(
            httpx.post(
                f"{tiny_slots.base_url}/v1/completions",
                json={"model": name, **body},
                timeout=PATIENCE_S,
            )
        )
        for text, scores in answers:
            assert text == alone[0], name
            assert scores == pytest.approx(alone[1], abs=2e-4), name
    # Each adapter moves the numbers in its own way, so a mix-up would have shown.
    assert len({round(a[0][1][0], 5) for a in seen.values()}) > 0.9 * len(seen)

    until(lambda: at_rest(tiny_slots))
    cache = tiny_slots.get("/admin/cache").json()
    assert len(cache["device"]["resident"]) <= 8
    assert all(r["leases"] == 0 for r in cache["device"]["resident"])
    assert cache["host"]["bytes_used"] <= 1 << 20
    for tier in ("device", "host"):
        assert tiny_slots.total("manyhats_adapter_evictions_total", tier=tier) > 0

    with httpx.Client(base_url=tiny_slots.base_url, timeout=PATIENCE_S) as http:
        for index in range(200):
            assert http.delete(f"/admin/adapters/a{index:03}").status_code == 200

    def left() -> tuple[int, int, int]:
        cache = tiny_slots.get("/admin/cache").json()
        device = cache["device"]
        return cache["host"]["bytes_used"], device["slots_used"], device["rows_used"]

    until(lambda: left() == (0, 0, 0), told=left)


def test_sigterm_lets_running_requests_end(tiny_slots):
    body = {"model": "base", "prompt": [5, 17], "max_tokens": 500, "stream": True}
    url = f"{tiny_slots.base_url}/v1/completions"
    with httpx.stream("POST", url, json=body | {"ignore_eos": True}, timeout=120) as response:
        lines = response.iter_lines()
        next(lines)
        tiny_slots.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-2].replace(" ", "")
    assert tiny_slots.process.wait(60) == 0
