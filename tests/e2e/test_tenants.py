"""Tenants on the real server: keys that outlive it, isolation, quotas."""

from __future__ import annotations

import httpx
import pytest
from support.polling import PATIENCE_S
from support.server import Server, demo_flags, running_server

pytestmark = pytest.mark.e2e

ADMIN = {"authorization": "Bearer admin-secret"}


def client(server: Server) -> httpx.Client:
    return httpx.Client(base_url=server.base_url, timeout=PATIENCE_S)


def test_tenants_outlive_the_server(smollm2_path, repository, tmp_path):
    flags = ("--model", str(smollm2_path), "--kv-cache-mb", "256", *demo_flags(repository))
    flags += ("--admin-api-keys", "admin-secret", "--metrics-open")
    with running_server(tmp_path, *flags) as server, client(server) as http:
        body = {"id": "acme", "weight": 2.0, "quotas": {"max_tokens": 5, "requests_per_minute": 4}}
        assert http.post("/admin/tenants", json=body, headers=ADMIN).status_code == 201
        issued = http.post("/admin/tenants/acme/keys", json={}, headers=ADMIN).json()
        shared = {"visibility": "shared", "shared_with": ["acme"]}
        answer = http.put("/admin/adapters/pirate/visibility", json=shared, headers=ADMIN)
        assert answer.json()["owner"] == "default"
        assert issued["key"] not in "".join(server.output)
    key = {"authorization": f"Bearer {issued['key']}"}
    with running_server(tmp_path, *flags) as server, client(server) as http:
        listed = http.get("/v1/models", headers=key).json()["data"]
        assert [card["id"] for card in listed][1:] == ["pirate"]

        def complete(model, **more):
            body = {"model": model, "prompt": "Hello", **more}
            return http.post("/v1/completions", json=body, headers=key)

        hidden, absent = complete("robot"), complete("rabat")
        assert hidden.status_code == absent.status_code == 404
        assert hidden.text.replace("robot", "rabat") == absent.text
        answer = complete("pirate", ignore_eos=True)
        assert answer.headers["x-manyhats-served-by"] == "pirate@1"
        assert answer.json()["usage"]["completion_tokens"] == 5
        more = [complete("pirate") for _ in range(12)]
        served = 1 + sum(a.status_code == 200 for a in more)
        refused = next(a for a in more if a.status_code != 200)
        assert refused.status_code == 429
        assert refused.json()["error"]["param"] == "requests_per_minute"
        assert int(refused.headers["retry-after"]) >= 1
        rows = http.get("/admin/usage", headers=ADMIN).json()["data"]
        [row] = [row for row in rows if row["requests"]]  # the others tell what adapters take up
        assert (row["tenant"], row["adapter"], row["requests"]) == ("acme", "pirate", served)
        assert server.value("manyhats_tenant_requests_total", tenant="acme") == served
