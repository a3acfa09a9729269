"""Who reads the audit log: operators all of it, tenants what concerns their own adapters."""

from __future__ import annotations

import pytest
from pydantic import SecretStr
from support.adapter_service import open_adapters, write_adapter
from support.api import Api, assert_error, settings_of

from manyhats.api import admin, audit, rollouts
from manyhats.tenancy.model import Role, Tenant


@pytest.fixture
def api(tmp_path):
    with open_adapters(tmp_path) as adapters:
        routers = (admin.router, audit.router, rollouts.router)
        keys = settings_of(admin_api_keys=(SecretStr("root"),))
        api = Api(settings=keys, directory=adapters.service, routers=routers)
        api.root = adapters.root
        api.keys = {"root": "root"}
        for tenant in ("acme", "beta"):
            api.tenants.create(Tenant(id=tenant))
            for role in (Role.TENANT, Role.OPERATOR):
                api.keys[tenant, role] = api.tenants.issue(tenant, role)[1]
        yield api


def ask(api, method, path, key, body=None, tenant=None):
    headers = {"authorization": f"Bearer {api.keys[key]}"}
    headers |= {"x-manyhats-tenant": tenant} if tenant else {}
    options = {} if body is None else {"json": body}
    return api.send(method, path, headers=headers, **options)


def register(api, tenant, seed, name="a"):
    folder = str(write_adapter(api.root / str(seed), seed))
    body = {"name": name, "path": folder}
    answer = ask(api, "POST", "/admin/adapters", (tenant, Role.OPERATOR), body)
    assert answer.status_code == 201, answer.text


def own(api, tenant, query="", name="a"):
    return ask(api, "GET", f"/v1/adapters/{name}/audit{query}", (tenant, Role.TENANT))


def seen(answer):
    assert answer.status_code == 200, answer.text
    return [entry["seq"] for entry in answer.json()["data"]]


def test_operators_read_everything_and_tenants_what_is_theirs(api):
    register(api, "acme", 0)
    register(api, "beta", 1, "b")
    register(api, "acme", 2)
    assert seen(ask(api, "GET", "/admin/audit", ("beta", Role.OPERATOR))) == [1, 2, 3]
    assert ask(api, "GET", "/admin/audit", ("acme", Role.TENANT)).status_code == 403
    assert seen(own(api, "acme")) == [1, 3]
    assert seen(own(api, "acme", "?limit=1")) == [1]
    assert own(api, "acme", "?limit=1").json()["has_more"]
    assert seen(own(api, "acme", "?after=1")) == [3]
    other, none = own(api, "beta"), own(api, "beta", name="x")
    assert_error(other, 404, "model_not_found", "model")
    assert other.text == none.text.replace("'x'", "'a'")
    operated = ask(api, "GET", "/v1/adapters/a/audit", ("beta", Role.OPERATOR), tenant="acme")
    assert seen(operated) == [1, 3]


def test_a_name_begins_anew_with_its_next_owner(api):
    register(api, "acme", 0)
    gone = ask(api, "DELETE", "/admin/adapters/a?force=true", ("acme", Role.OPERATOR))
    assert gone.status_code == 200
    register(api, "beta", 1)
    register(api, "beta", 2)
    assert seen(own(api, "beta")) == [3, 4]
    assert own(api, "acme").status_code == 404
    assert seen(ask(api, "GET", "/admin/audit?name=a", "root")) == [1, 2, 3, 4]


def test_a_version_where_a_name_is_wanted_is_told_so(api):
    register(api, "acme", 0)
    path = "/admin/adapters/a@1/promote"
    answer = ask(api, "POST", path, ("acme", Role.OPERATOR), {"version": 1})
    assert_error(answer, 404, "model_not_found", "name", "give the name alone here (a)")
    answer = ask(api, "POST", path, ("beta", Role.OPERATOR), {"version": 1})
    assert_error(answer, 404, "model_not_found", "model", "no model or adapter 'a'")
