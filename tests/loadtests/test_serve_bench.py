"""The load client against a small server on a real socket, and its sums against known numbers."""

from __future__ import annotations

import asyncio
import importlib
import json
import math
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fake_openai import FakeServer, running

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "loadtests"))
bench_http = importlib.import_module("bench_http")
bench_load = importlib.import_module("bench_load")
bench_stats = importlib.import_module("bench_stats")
serve_bench = importlib.import_module("serve_bench")


def cell_of(fake: FakeServer, concurrency: int = 4, requests: int = 10, **load: Any) -> Any:
    async def go() -> Any:
        async with running(fake) as url:
            given = {"input_tokens": 6, "output_tokens": 5, "progress": False} | load
            asked = bench_load.Load(base_url=url, model="base", **given)
            cell = bench_load.Cell(concurrency, requests, ["base", "hat-1", "hat-2"], 2)
            return await bench_load.run_cell(asked, cell)

    return asyncio.run(go())


def test_counts_tokens_and_keeps_the_asked_concurrency() -> None:
    fake = FakeServer()
    summary = cell_of(fake, ignore_eos=True, api_key="secret")
    assert (summary.requests, summary.errors, summary.short) == (10, 0, 0)
    assert (summary.prompt_tokens, summary.output_tokens) == (60, 50)
    assert summary.counted == "usage"
    assert summary.output_tok_s == pytest.approx(50 / summary.duration_s)
    assert 1 <= fake.most_in_flight <= 4
    assert fake.connections <= 4, "a worker keeps its connection"
    assert 0 < summary.ttft_p50_ms <= summary.latency_p99_ms
    assert {b["model"] for b in fake.bodies} == {"base", "hat-1", "hat-2"}
    assert all(b["ignore_eos"] is True and b["temperature"] == 0 for b in fake.bodies)
    assert all(h["authorization"] == "Bearer secret" for h in fake.headers)


def test_without_usage_events_are_counted_and_said_to_be() -> None:
    summary = cell_of(FakeServer(lambda n: "no usage"))
    assert (summary.output_tokens, summary.counted, summary.errors) == (50, "events", 0)


@pytest.mark.parametrize(
    ("mood", "said"),
    [
        ("busy", "HTTP 429"),
        ("errs", "broken adapter"),
        ("dies", "closed in the middle"),
        ("never done", "without [DONE]"),
    ],
)
def test_a_failing_request_is_counted_and_adds_no_tokens(mood: str, said: str) -> None:
    summary = cell_of(FakeServer(lambda n: mood if n in (1, 6) else "well"))
    assert (summary.requests, summary.errors) == (10, 2)
    assert summary.output_tokens == 40
    (kind,) = summary.error_kinds
    assert said in kind


def test_nobody_listening_is_an_error_of_every_request() -> None:
    async def go() -> Any:
        async with running(FakeServer()) as url:
            pass
        asked = bench_load.Load(base_url=url, model="base", progress=False)
        return await bench_load.run_cell(asked, bench_load.Cell(2, 3, ["base"], 0))

    summary = asyncio.run(go())
    assert (summary.errors, summary.output_tokens) == (3, 0)
    assert math.isnan(summary.ttft_p50_ms)


def test_prompts_repeat_with_the_seed_and_differ_otherwise() -> None:
    def prompts(**load: Any) -> list[tuple[int, ...]]:
        fake = FakeServer()
        cell_of(fake, concurrency=1, vocab_size=5000, **load)
        return [tuple(b["prompt"]) for b in fake.bodies]

    one = prompts(seed=1)
    assert one == prompts(seed=1)
    assert len(set(one) | set(prompts(seed=2))) == 20
    assert all(len(p) == 6 and min(p) >= 1000 and max(p) < 5000 for p in one)


def test_text_prompts_are_words() -> None:
    fake = FakeServer()
    cell_of(fake, prompt_format="text")
    assert all(len(b["prompt"].split()) == 6 for b in fake.bodies)
    assert len({b["prompt"] for b in fake.bodies}) == 10


async def _pieces(clock: list[float], script: list[tuple[float, Any]]) -> AsyncIterator[bytes]:
    for at, event in script:
        clock[0] = at
        text = event if isinstance(event, str) else json.dumps(event)
        yield f"data: {text}\n\n".encode()


def _consumed(monkeypatch: pytest.MonkeyPatch, script: list[tuple[float, Any]]) -> Any:
    clock = [10.0]
    monkeypatch.setattr(bench_load.time, "perf_counter", lambda: clock[0])
    timer = bench_load._Timer(bench_stats.RequestResult(model="m"), started=10.0)
    consume: Callable[..., Awaitable[None]] = bench_load._consume

    async def go() -> None:
        await consume(_pieces(clock, script), timer)
        timer.stop()

    asyncio.run(go())
    return timer.result


def test_times_count_from_the_request_and_a_chat_role_is_no_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = [
        (10.1, {"choices": [{"delta": {"role": "assistant", "content": ""}}]}),
        (10.5, {"choices": [{"delta": {"content": "a"}}]}),
        (10.75, {"choices": [{"delta": {"content": "b"}}]}),
        (11.0, {"choices": [{"delta": {}, "finish_reason": "stop"}]}),
        (11.25, {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}),
        (11.5, "[DONE]"),
    ]
    result = _consumed(monkeypatch, script)
    assert result.events == [0.5, 0.75]
    assert (result.latency, result.prompt_tokens, result.output_tokens) == (1.5, 3, 2)


def test_a_completion_s_closing_event_without_text_is_no_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = [
        (10.25, {"choices": [{"text": "", "finish_reason": None}]}),
        (10.5, {"choices": [{"text": "b", "finish_reason": None}]}),
        (10.75, {"choices": [{"text": "", "finish_reason": "length"}]}),
        (11.0, "[DONE]"),
    ]
    assert _consumed(monkeypatch, script).events == [0.25, 0.5]


def test_summary_of_known_times() -> None:
    results = [
        bench_stats.RequestResult("m", None, 2.0, [0.5, 1.0, 2.0], 4, 5, "usage"),
        bench_stats.RequestResult("m", None, 3.0, [1.0, 3.0], 4, 2, "usage"),
        bench_stats.RequestResult("m", "HTTP 500: no", 9.0, [0.1], 0, 0),
    ]
    s = bench_stats.summarize(
        results, concurrency=2, adapters=1, wanted_tokens=5, duration_s=4.0, client_cpu_s=1.0
    )
    assert (s.requests, s.errors, s.short, s.output_tokens) == (3, 1, 1, 7)
    assert s.output_tok_s == 7 / 4
    assert s.client_cpu == 0.25
    assert s.ttft_p50_ms == 750
    assert s.itl_p50_ms == 1000
    assert s.tpot_p50_ms == pytest.approx((1500 / 4 + 2000) / 2)
    assert "tok/s" in bench_stats.table([s])


@pytest.mark.parametrize("q", [0, 1, 50, 90, 99, 100])
def test_percentile_is_numpy_s(q: int) -> None:
    values = [5.0, -1.0, 3.5, 2.0, 9.0, 9.0, 0.25]
    assert bench_stats.percentile(values, q) == pytest.approx(float(np.percentile(values, q)))


def test_command_line_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.json"
    fake = FakeServer()

    async def go() -> int:
        async with running(fake) as url:
            flags = [
                "--base-url",
                url,
                "--adapters",
                "0,2",
                "--concurrency",
                "1,3",
                "--json",
                str(out),
            ]
            flags += [
                "--requests",
                "4",
                "--input-tokens",
                "3",
                "--output-tokens",
                "4",
                "--no-progress",
            ]
            return await asyncio.to_thread(serve_bench.main, flags)

    assert asyncio.run(go()) == 0
    report = json.loads(out.read_text())
    shape = [(c["concurrency"], c["adapters"], c["output_tokens"]) for c in report["cells"]]
    assert shape == [(1, 0, 16), (3, 0, 16), (1, 2, 16), (3, 2, 16)]
    # Three warm-up requests, then the cells; the adapters in turn.
    assert [b["model"] for b in fake.bodies[:3]] == ["a-one", "b-two", "base"]
    assert [b["model"] for b in fake.bodies[11:15]] == ["a-one", "b-two"] * 2
    assert "tok/s" in capsys.readouterr().err


def test_more_adapters_than_the_server_lists_is_refused() -> None:
    with pytest.raises(ValueError, match="--adapters 3: the server lists only 2"):
        serve_bench.make_cells(["3"], "base", ["a", "b"], [1], lambda c: c)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", ""])
def test_a_base_url_must_be_http(url: str) -> None:
    with pytest.raises(ValueError, match="base URL"):
        bench_http.Address.parse(url)


def test_a_kept_connection_that_was_closed_is_opened_again() -> None:
    fake = FakeServer(lambda n: "dies" if n == 0 else "well")
    summary = cell_of(fake, concurrency=1, requests=3)
    assert (summary.errors, fake.connections) == (1, 2)
