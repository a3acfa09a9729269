"""Deny by default, tested from the application's own routes: a new one cannot be forgotten."""

from __future__ import annotations

import re

import pytest
from fastapi import APIRouter
from support.api import Api, settings_of

from manyhats.api.auth import OPEN_ROUTES, needed_role
from manyhats.app import ROUTES
from manyhats.tenancy.model import Role, Tenant

KEYS = {"api_keys": ("user-key",), "admin_api_keys": ("admin-key",)}

forgetful = APIRouter()


@forgetful.get("/admin/new/{thing}")
async def new_admin_route(thing: str) -> str:
    return thing


@forgetful.get("/v1/new")
async def new_route() -> str:
    return "new"


def make(**settings) -> tuple[Api, dict[Role, str]]:
    """The whole application, two routes whose author thought of nothing, and a key of each role."""
    routers = [*(module.router for module in ROUTES), forgetful]
    api = Api(settings=settings_of(**KEYS, **settings), routers=routers)
    api.tenants.create(Tenant(id="acme"))
    return api, {role: api.tenants.issue("acme", role)[1] for role in Role}


def routes(api: Api) -> list[tuple[str, str]]:
    """(method, template) of every route, those in the OpenAPI document and those that are not."""
    described = {
        (method.upper(), path)
        for path, methods in api.app.openapi()["paths"].items()
        for method in methods
    }
    there = {
        (method, re.sub(r":path}", "}", route.path))
        for route in flat(api.app.routes)
        for method in route.methods
        if method != "HEAD"
    }
    assert described <= there
    return sorted(there)


def flat(routes):
    """The routes themselves, also those that FastAPI leaves in the router that they came with."""
    for route in routes:
        if hasattr(route, "methods"):
            yield route
        else:
            yield from flat(route.effective_candidates())


def call(api: Api, method: str, path: str, key: str | None, **headers: str) -> int:
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    return api.send(method, re.sub(r"{[^}]*}", "thing", path), headers=headers).status_code


def test_the_whole_application_is_seen():
    api, _ = make()
    seen = routes(api)
    assert {("POST", "/v1/chat/completions"), ("GET", "/metrics"), ("GET", "/version")} <= set(seen)
    assert len([1 for _, path in seen if path.startswith("/admin")]) > 20


def test_every_route_but_the_health_ones_is_refused_without_a_key_and_with_a_wrong_one():
    api, _ = make()
    for method, path in routes(api):
        for key in (None, "wrong", "mh_0123456789abcdef_" + "A" * 43):
            status = call(api, method, path, key)
            assert (status != 401) == (path in OPEN_ROUTES), (method, path, key, status)


def test_every_admin_route_is_refused_with_a_lesser_role():
    api, issued = make()
    for method, path in routes(api):
        if path in OPEN_ROUTES:
            continue
        needed = needed_role(path)
        assert needed is not Role.TENANT or not path.startswith("/admin"), path
        for role in Role:
            status = call(api, method, path, issued[role])
            assert (status == 403) == (not role.covers(needed)), (method, path, role, status)
            assert status != 401
        assert (call(api, method, path, "user-key") == 403) == (needed is not Role.TENANT)
        assert call(api, method, path, "admin-key") not in (401, 403)


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("/admin/tenants", Role.ADMIN),
        ("/admin/tenants/{tenant}/keys", Role.ADMIN),
        ("/admin/keys/{key}", Role.ADMIN),
        ("/admin/audit", Role.ADMIN),
        ("/admin/gc", Role.ADMIN),
        ("/admin/adapters", Role.OPERATOR),
        ("/admin/adapters/{name}/canary", Role.OPERATOR),
        ("/admin/tenantsandmore", Role.OPERATOR),
        ("/admin", Role.OPERATOR),
        ("/metrics", Role.OPERATOR),
        ("/v1/load_lora_adapter", Role.OPERATOR),
        ("/v1/unload_lora_adapter", Role.OPERATOR),
        ("/v1/completions", Role.TENANT),
        ("/version", Role.TENANT),
    ],
)
def test_what_a_route_needs(path, role):
    assert needed_role(path) is role


def test_an_ended_key_is_as_good_as_none():
    api, issued = make()
    for key in api.tenants.keys("acme"):
        api.tenants.revoke(key.id)
    assert {call(api, "GET", "/v1/models", key) for key in issued.values()} == {401}


def test_metrics_and_documentation_are_open_where_they_are_said_to_be():
    shut, issued = make()
    assert call(shut, "GET", "/metrics", None) == 401
    assert call(shut, "GET", "/metrics", issued[Role.OPERATOR]) == 200
    assert call(shut, "GET", "/openapi.json", "admin-key") == 404
    open_, _ = make(metrics_open=True, docs_open=True)
    assert call(open_, "GET", "/metrics", None) == 200
    for path in ("/docs", "/openapi.json"):
        assert call(open_, "GET", path, None) == 200
    assert call(open_, "GET", "/admin/adapters", None) == 401


def test_operators_act_for_the_tenant_that_they_name_and_tenants_for_their_own():
    api, issued = make()
    api.tenants.create(Tenant(id="other"))
    header = "x-manyhats-tenant"
    for role, tenant, status in [
        (Role.OPERATOR, "other", 200),
        (Role.ADMIN, "other", 200),
        (Role.TENANT, "acme", 200),
        (Role.TENANT, "other", 403),
        (Role.TENANT, "nobody", 403),
        (Role.ADMIN, "nobody", 404),
    ]:
        assert call(api, "GET", "/v1/models", issued[role], **{header: tenant}) == status
    for key, acts in [(issued[Role.TENANT], "acme"), ("user-key", "default")]:
        api.complete(headers={"authorization": f"Bearer {key}"})
        assert api.engine.requests[-1].tenant == acts
    api.complete(headers={"authorization": f"Bearer {issued[Role.ADMIN]}", header: "other"})
    assert api.engine.requests[-1].tenant == "other"
