"""Shadows: sampled by the route, run after the answer, measured, and never in its way; and pins,
which are part of the route as well.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import httpx
import pytest
from support.adapter_service import open_adapters, write_adapter
from support.api import Api, settings_of
from support.fake_engine import FakeEngine, reply_of

from manyhats.api import admin, audit, rollouts
from manyhats.api.shadows import MAX_RUNNING, Shadows, agreement
from manyhats.engine.interface import LaneScores
from manyhats.errors import EngineFailedError
from manyhats.lifecycle.pins import Pins
from manyhats.lifecycle.shadows import ShadowDirectory
from manyhats.metrics import Metrics
from manyhats.types import Priority


class Engine(FakeEngine):
    """Scores every answered token with -0.5 nats; the shadow may fail or wait for ``gate``."""

    fail = False
    gate: asyncio.Event | None = None

    async def compare(self, request):
        count = len(request.token_ids) - request.answer_start
        assert count > 0
        [adapter] = request.adapters
        return (LaneScores(adapter, (-0.5,) * count, (), (), (), (), (), ()),)

    async def generate(self, request):
        if request.priority is Priority.BACKGROUND:
            if self.gate is not None:
                await self.gate.wait()
            if self.fail:
                raise EngineFailedError("planted")
        async for delta in super().generate(request):
            yield delta


class Device:
    def __init__(self) -> None:
        self.pinned = set()

    def pin(self, ref) -> None:
        self.pinned.add(str(ref))

    def unpin(self, ref) -> None:
        self.pinned.discard(str(ref))


@pytest.fixture
def api(tmp_path):
    with open_adapters(tmp_path) as adapters:
        engine, metrics = Engine(), Metrics(10)
        pins = Pins(adapters.registry, adapters.service.entry, Device(), bound=2)
        api = Api(
            settings=settings_of(), directory=adapters.service, engine=engine, metrics=metrics,
            routers=(admin.router, audit.router, rollouts.router), pins=pins,
            shadows=Shadows(
                ShadowDirectory(adapters.registry, draw=lambda: api.draw), engine, metrics.shadow
            ),
        )  # fmt: skip
        api.draw, api.adapters = 0.0, adapters
        for seed in range(3):
            body = {"name": "a", "path": str(write_adapter(adapters.root / str(seed), seed))}
            assert api.post("/admin/adapters", body).status_code == 201
        yield api


def change(api, action, status=200, name="a", **body):
    answer = api.post(f"/admin/adapters/{name}/{action}", body)
    assert answer.status_code == status, answer.text
    return answer.json()


def ask(api, count=1, **body):
    """Requests through the application, and then all that their shadows do."""

    async def run():
        transport = httpx.ASGITransport(api.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            sent = {"model": "a", "prompt": "Hi", "seed": 1, **body}
            answers = [await client.post("/v1/completions", json=sent) for _ in range(count)]
        if api.engine.gate is not None:
            api.engine.gate.set()
        while api.shadows._running:
            await asyncio.gather(*api.shadows._running)
        return answers

    return asyncio.run(run())


def series(api, name, **labels):
    return api.metrics.registry.get_sample_value(f"manyhats_shadow_{name}", labels) or 0.0


@pytest.mark.parametrize("stream", [False, True])
def test_a_shadow_runs_after_the_answer_and_is_measured(api, stream):
    change(api, "shadow", version=1, percent=50, reason="a look")
    [answer] = ask(api, stream=stream, max_tokens=30)
    assert answer.headers["x-manyhats-served-by"] == "a@3"
    live, shadow = api.engine.requests
    assert (str(shadow.adapter), shadow.priority) == ("a@1", Priority.BACKGROUND)
    assert live.priority is Priority.NORMAL
    assert shadow.params == live.params
    assert shadow.prompt_token_ids == live.prompt_token_ids
    assert series(api, "requests_total", adapter="a", outcome="ok") == 1
    tokens = len(reply_of(shadow.adapter, shadow.params[0]).encode()) + 1
    assert series(api, "tokens_total", adapter="a") == tokens
    assert series(api, "agreement_sum", adapter="a") == pytest.approx((tokens - 1) / tokens)
    assert series(api, "nll_sum", adapter="a") == 0.5
    entry = api.get("/admin/audit?after=3").json()["data"][0]
    assert (entry["action"], entry["reason"]) == ("shadow", "a look")
    assert entry["after"]["shadow"] == {"version": 1, "percent": 50.0}


def test_who_is_not_in_the_sample_runs_alone(api):
    change(api, "shadow", version=1, percent=50)
    api.draw = 0.5
    ask(api)
    api.draw = 0.0
    ask(api, model="a@2")  # names a version itself
    ask(api, model="org/base")
    ask(api, max_tokens=0, echo=True)  # nothing is generated
    ask(api, logprobs=1)
    change(api, "shadow", percent=0)
    ask(api)
    change(api, "canary", version=1, percent=100)
    change(api, "shadow", version=1, percent=100)
    ask(api)  # the shadow is what answers
    shadows = [r for r in api.engine.requests if r.priority is Priority.BACKGROUND]
    assert len(shadows) == 1
    assert shadows[0].params[0].logprobs is None


def test_a_shadow_that_fails_or_is_too_many_is_counted_and_harms_nobody(api):
    change(api, "shadow", version=1, percent=100)
    api.engine.fail = True
    [answer] = ask(api)
    assert answer.status_code == 200
    assert series(api, "requests_total", adapter="a", outcome="error") == 1
    api.engine.fail, api.engine.gate = False, asyncio.Event()
    answers = ask(api, MAX_RUNNING + 3)
    assert [a.status_code for a in answers] == [200] * (MAX_RUNNING + 3)
    assert series(api, "requests_total", adapter="a", outcome="dropped") == 3
    assert series(api, "requests_total", adapter="a", outcome="ok") == MAX_RUNNING


def test_a_request_that_fails_has_no_shadow(api):
    change(api, "shadow", version=1, percent=100)
    api.engine.error = EngineFailedError("planted")
    [answer] = ask(api)
    assert answer.status_code == 500
    assert len(api.engine.requests) == 1


def test_a_shadow_is_part_of_the_route(api):
    assert change(api, "shadow", status=409, percent=5)["error"]["param"] == "version"
    assert change(api, "shadow", status=409, version=3, percent=5)
    assert change(api, "shadow", status=404, version=9, percent=5)
    assert change(api, "shadow", status=400, version=1, percent=101)
    route = change(api, "shadow", version=1, percent=5)["route"]
    assert route["shadow"] == {"version": 1, "percent": 5.0}
    held = api.post("/admin/adapters/a/retire", {"version": 1})
    assert held.status_code == 409
    assert "shadow 1 (5 %)" in held.json()["error"]["message"]
    assert change(api, "canary", version=2, percent=5)["route"]["shadow"]["version"] == 1
    assert "shadow" not in change(api, "promote", version=1)["route"]


@pytest.mark.parametrize(
    ("answered", "tokens", "share"),
    [((), [], 1.0), ((1, 2), [1, 3], 0.5), ((1,), [1, 2], 0.5), ((1, 2), [], 0.0)],
)
def test_agreement(answered, tokens, share):
    assert agreement(answered, tokens) == share


def test_pins_are_kept_bounded_and_named(api, tmp_path):
    device = api.pins._device
    assert change(api, "pin")["route"]["pinned"] == [3]
    assert change(api, "pin", version=1, reason="hot")["route"]["pinned"] == [1, 3]
    assert change(api, "pin", version=1)["route"]["pinned"] == [1, 3]
    assert device.pinned == {"a@1", "a@3"}
    refused = change(api, "pin", status=409, version=2)["error"]
    assert refused["message"] == "2 versions are pinned, of at most 2 (slots - 1): a@1, a@3"
    assert change(api, "pin", status=404, version=9)
    change(api, "promote", version=2)
    for call, status in (("DELETE", 409), ("retire", 409)):
        if call == "DELETE":
            answer = api.send("DELETE", "/admin/adapters/a@1")
            assert "a@1 is pinned" in answer.json()["error"]["message"]
        else:
            answer = api.post("/admin/adapters/a/retire", {"version": 1})
        assert answer.status_code == status, answer.text
    registry = api.adapters.registry
    after = Pins(registry, api.adapters.service.entry, Device(), bound=2)
    after.sync()
    assert after._device.pinned == {"a@1", "a@3"}, "as after a restart"
    assert change(api, "unpin", version=3)["route"]["pinned"] == [1]
    assert device.pinned == {"a@1"}
    answer = api.send("DELETE", "/admin/adapters/a@1?force=true")
    assert answer.status_code == 200, answer.text
    assert "pinned" not in api.get("/admin/adapters/a").json()["route"]
    change(api, "rollback", to="baseline")
    assert change(api, "pin", status=409)["error"]["param"] == "version"


def test_what_running_requests_hold_is_deleted_by_force_only(api):
    real = api.engine.stats()
    ref = api.directory.get("a@1", "default").ref
    resident = type(real.resident[0])(ref, 0, 2, False)
    api.engine.stats = lambda: replace(real, resident=(resident,))
    answer = api.send("DELETE", "/admin/adapters/a@1")
    assert answer.status_code == 409
    assert "a@1 is held by 2 running sequences" in answer.json()["error"]["message"]
    assert api.send("DELETE", "/admin/adapters/a@1?force=true").status_code == 200
