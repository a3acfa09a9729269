"""Quotas, usage and tenants' series as a client meets them."""

from __future__ import annotations

import asyncio
import csv
import io
import re

import httpx
import pytest
from support.api import Api, events, settings_of
from support.fake_engine import FakeEngine

from manyhats.api import usage
from manyhats.errors import QueueFullError
from manyhats.tenancy.model import Quotas, Role, Tenant


def make(engine=None, **quotas):
    """The application, and the headers of a tenant with these quotas."""
    api = Api(
        settings=settings_of(admin_api_keys=("admin",)),
        routers=[usage.router],
        engine=engine or FakeEngine(),
    )
    api.tenants.create(Tenant(id="acme", quotas=Quotas(**quotas)))
    _, key = api.tenants.issue("acme", Role.TENANT)
    return api, {"authorization": f"Bearer {key}"}


ADMIN = {"authorization": "Bearer admin"}


def error(response, status, param):
    body = response.json()["error"]
    assert (response.status_code, body["param"]) == (status, param), body
    return body


@pytest.mark.parametrize("stream", [False, True])
def test_over_the_bound_is_a_429_that_names_the_quota_and_when_to_come_back(stream):
    api, headers = make(requests_per_minute=1)
    assert api.complete(headers=headers, stream=stream).status_code == 200
    refused = api.complete(headers=headers, stream=stream)
    body = error(refused, 429, "requests_per_minute")
    assert (body["code"], body["type"]) == ("quota_exceeded", "rate_limit_error")
    assert 55 <= int(refused.headers["retry-after"]) <= 60
    assert api.complete(headers=ADMIN).status_code == 200, "another tenant is not asked to wait"


@pytest.mark.parametrize(
    ("quotas", "status", "param"),
    [
        ({"requests_per_minute": 0}, 403, "requests_per_minute"),
        ({"concurrent_requests": 0}, 403, "concurrent_requests"),
        ({"tokens_per_minute": 20}, 400, "max_tokens"),
        ({"tokens_per_day": 20}, 400, "max_tokens"),
        ({"max_tokens": 29}, 400, "max_tokens"),
    ],
)
def test_what_can_never_pass_is_no_429(quotas, status, param):
    api, headers = make(**quotas)
    error(api.complete(headers=headers, max_tokens=30), status, param)
    assert api.engine.requests == []


def test_every_lane_of_an_ensemble_is_paid_for():
    api, headers = make(tokens_per_minute=1)

    def wanted(**fields):
        message = error(api.complete(headers=headers, **fields), 400, "max_tokens")["message"]
        return int(re.search(r"come to (\d+) tokens", message)[1])

    whole = {"ensemble": ["pirate", "haiku", "org/base"]}
    assert wanted(adapter=whole) == 3 * wanted()


def test_the_quota_of_max_tokens_bounds_what_is_not_said():
    api, headers = make(max_tokens=7)
    api.complete(headers=headers)
    api.chat(headers=headers)
    api.complete(headers=headers, max_tokens=7)
    assert [r.params[0].max_tokens for r in api.engine.requests] == [7, 7, 7]
    error(api.chat(headers=headers, max_completion_tokens=8), 400, "max_completion_tokens")


def test_every_choice_of_every_prompt_is_reserved_and_the_rest_comes_back():
    api, headers = make(tokens_per_minute=100)
    error(
        api.complete(headers=headers, prompt=["ab", "abc"], n=2, max_tokens=24), 400, "max_tokens"
    )
    answer = api.complete(headers=headers, prompt=["ab", "abc"], n=2, max_tokens=23)
    assert answer.status_code == 200
    used = answer.json()["usage"]["total_tokens"]
    left = 100 - used
    error(api.complete(headers=headers, prompt="a", max_tokens=left + 1), 429, "tokens_per_minute")
    assert api.complete(headers=headers, prompt="a", max_tokens=left - 1).status_code == 200


def test_what_the_engine_refuses_costs_no_token():
    engine = FakeEngine(refuse=QueueFullError("full", retry_after_s=1.0))
    api, headers = make(engine, tokens_per_minute=40, concurrent_requests=1)
    for _ in range(5):
        assert api.complete(headers=headers, max_tokens=30).json()["error"]["code"] == "queue_full"
    engine.refuse = None
    assert api.complete(headers=headers, max_tokens=30).status_code == 200
    assert sum(row.requests for row in api.app.state.manyhats.usage.rows()) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_ends_the_request_for_its_quota_too(stream):
    engine = FakeEngine(crash_after=2)
    api, headers = make(engine, concurrent_requests=1)
    for _ in range(3):
        api.complete(headers=headers, stream=stream)
    engine.crash_after = None
    assert api.complete(headers=headers, stream=stream).status_code == 200


def test_requests_at_once_are_bounded():
    api, headers = make(FakeEngine(hang_after=2), concurrent_requests=2)

    async def story():
        transport = httpx.ASGITransport(api.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"model": "org/base", "prompt": "Hi"}

            def post():
                return client.post("/v1/completions", json=body, headers=headers)

            hanging = [asyncio.create_task(post()) for _ in range(2)]
            while api.engine.live < 2:
                await asyncio.sleep(0)
            refused = await post()
            for task in hanging:
                task.cancel()
            await asyncio.gather(*hanging, return_exceptions=True)
            api.engine.hang_after = None
            return refused, await post()

    refused, after = asyncio.run(story())
    error(refused, 429, "concurrent_requests")
    assert after.status_code == 200, "those that were cancelled have given their place back"


def test_whoever_leaves_before_the_first_token_has_paid_for_the_prompt():
    class Silent(FakeEngine):
        async def generate(self, request):
            self.live += 1
            await asyncio.Event().wait()
            yield

    api, headers = make(Silent(), tokens_per_minute=1000, concurrent_requests=1)

    async def story():
        body = {"model": "org/base", "prompt": "x" * 50, "max_tokens": 100}
        transport = httpx.ASGITransport(api.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            sent = asyncio.create_task(client.post("/v1/completions", json=body, headers=headers))
            while not api.engine.live:
                await asyncio.sleep(0)
            sent.cancel()
            await asyncio.gather(sent, return_exceptions=True)

    asyncio.run(story())
    [row] = api.app.state.manyhats.usage.rows()
    assert (row.requests, row.prompt_tokens, row.output_tokens) == (1, 50, 0)


def test_usage_by_tenant_and_adapter():
    api, headers = make()
    used = [
        api.complete(headers=headers, prompt="abc").json()["usage"],
        api.complete(headers=headers, model="pirate", prompt="abcd", n=2).json()["usage"],
    ]
    events(api.complete(headers=headers, model="pirate@1", stream=True))
    api.complete(headers=ADMIN)
    answer = api.get("/admin/usage", headers=ADMIN, params={"tenant": "acme"}).json()
    base, pirate = answer["data"]
    for row, shown in ((base, used[0]),):
        assert row == {
            "tenant": "acme",
            "adapter": None,
            "requests": 1,
            "prompt_tokens": shown["prompt_tokens"],
            "output_tokens": shown["completion_tokens"],
            "resident_s": 0,
            "nbytes": 0,
        }
    assert (pirate["adapter"], pirate["requests"]) == ("pirate", 2)
    assert pirate["prompt_tokens"] == used[1]["prompt_tokens"] + len("Hi")
    assert pirate["output_tokens"] > used[1]["completion_tokens"]
    everything = api.get("/admin/usage", headers=ADMIN).json()
    assert [row["tenant"] for row in everything["data"]] == ["acme", "acme", "default"]
    assert everything["since"] > 1_700_000_000


def test_usage_as_csv():
    api, headers = make()
    api.complete(headers=headers)
    api.complete(headers=headers, model="haiku")
    answer = api.get("/admin/usage", headers=ADMIN, params={"format": "csv"})
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [(row["tenant"], row["adapter"]) for row in rows] == [("acme", ""), ("acme", "haiku")]
    assert rows[0]["prompt_tokens"] == "2"
    assert api.get("/admin/usage", headers=ADMIN, params={"format": "xml"}).status_code == 400


def test_series_by_tenant():
    api, headers = make(requests_per_minute=1)
    usage = api.complete(headers=headers).json()["usage"]
    api.complete(headers=headers)
    text = api.get("/metrics", headers=ADMIN).text
    for line in (
        'manyhats_tenant_requests_total{tenant="acme"} 1.0',
        f'manyhats_tenant_prompt_tokens_total{{tenant="acme"}} {usage["prompt_tokens"]}.0',
        f'manyhats_tenant_output_tokens_total{{tenant="acme"}} {usage["completion_tokens"]}.0',
        'manyhats_quota_refusals_total{quota="requests_per_minute",tenant="acme"} 1.0',
    ):
        assert line in text


def test_tenants_labels_are_bounded():
    from manyhats.metrics import Metrics

    metrics = Metrics(10, max_tenant_labels=2)
    for number in range(5):
        metrics.used(f"t{number}", 1, 1)
        metrics.refused(f"t{number}", "max_tokens")
    text = metrics.render()[0].decode()
    assert 'manyhats_tenant_requests_total{tenant="other"} 3.0' in text
    assert "t4" not in text
