"""The routes of tenants, keys and sharing."""

from __future__ import annotations

import pytest
from support.adapter_service import open_adapters, write_adapter
from support.api import Api, settings_of

from manyhats.api import sharing, tenants
from manyhats.tenancy.model import Role, Tenant
from manyhats.types import TenantId

ADMIN = {"authorization": "Bearer admin"}


@pytest.fixture
def api():
    return Api(settings=settings_of(admin_api_keys=("admin",)), routers=[tenants.router])


def put(api, path, body, **options):
    return api.send("PUT", path, json=body, **options)


def post(api, path, body):
    return api.post(path, body, headers=ADMIN)


def error(response, status, param):
    body = response.json()["error"]
    assert (response.status_code, body["param"]) == (status, param), body
    return body["message"]


def test_a_tenant_is_created_changed_and_listed(api):
    made = post(api, "/admin/tenants", {"id": "acme", "weight": 2, "quotas": {"adapters": 3}})
    assert made.status_code == 201
    assert made.json()["quotas"]["adapters"] == 3
    assert error(post(api, "/admin/tenants", {"id": "acme"}), 409, "id")
    changed = put(api, "/admin/tenants/acme", {"priority": 1}, headers=ADMIN).json()
    assert (changed["weight"], changed["priority"]) == (1.0, 1), "what is left out is the default"
    assert changed["quotas"]["adapters"] is None
    listed = api.get("/admin/tenants", headers=ADMIN).json()["data"]
    assert [tenant["id"] for tenant in listed] == ["acme", "default"]
    assert api.get("/admin/tenants/acme", headers=ADMIN).json() == changed
    assert api.send("DELETE", "/admin/tenants/acme", headers=ADMIN).json()["deleted"] is True
    assert api.get("/admin/tenants/acme", headers=ADMIN).status_code == 404


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "id"),
        ({"id": "a/b"}, "id"),
        ({"id": "a", "weight": 0}, "weight"),
        ({"id": "a", "weight": "2"}, "weight"),
        ({"id": "a", "weight": 1e9}, "weight"),
        ({"id": "a", "priority": 101}, "priority"),
        ({"id": "a", "quotas": {"max_tokens": 0}}, "quotas.max_tokens"),
        ({"id": "a", "quotas": {"adapters": -1}}, "quotas.adapters"),
        ({"id": "a", "quotas": {"nope": 1}}, "quotas.nope"),
        ({"id": "a", "nope": 1}, "nope"),
    ],
)
def test_a_wrong_field_is_named(api, body, param):
    error(post(api, "/admin/tenants", body), 400, param)
    assert [t.id for t in api.tenants.tenants()] == ["default"]


def test_a_key_is_shown_once(api):
    api.tenants.create(Tenant(id="acme"))
    path = "/admin/tenants/acme/keys"
    made = post(api, path, {"role": "operator", "expires_s": 60, "note": "ci"}).json()
    assert made["expires"] == made["created"] + 60
    listed = api.get(path, headers=ADMIN)
    [shown] = listed.json()["data"]
    assert shown == {k: v for k, v in made.items() if k != "key"}
    assert made["key"].split("_", 2)[2] not in listed.text
    assert "digest" not in listed.text
    rotated = post(api, f"/admin/keys/{made['id']}/rotate", {"grace_s": 10}).json()
    assert rotated["key"] != made["key"]
    for key in (made["key"], rotated["key"]):
        headers = {"authorization": f"Bearer {key}"}
        assert api.get("/v1/models", headers=headers).status_code == 200
    gone = api.send("DELETE", f"/admin/keys/{rotated['id']}", headers=ADMIN).json()
    assert gone["revoked"] is not None
    headers = {"authorization": f"Bearer {rotated['key']}"}
    assert api.get("/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize(
    ("body", "param"),
    [({"role": "king"}, "role"), ({"expires_s": 0}, "expires_s"), ({"note": "x" * 201}, "note")],
)
def test_a_wrong_key_is_not_issued(api, body, param):
    api.tenants.create(Tenant(id="acme"))
    error(post(api, "/admin/tenants/acme/keys", body), 400, param)
    assert api.tenants.keys("acme") == []


def test_the_first_key_shuts_the_open_door_and_must_be_a_lasting_admins():
    api = Api(routers=[tenants.router])
    path = "/admin/tenants/default/keys"
    for body in ({}, {"role": "operator"}, {"role": "admin", "expires_s": 60}):
        error(api.post(path, body), 409, "role")
    key = api.post(path, {"role": "admin"}).json()["key"]
    assert api.get("/v1/models").status_code == 401
    assert api.get("/admin/tenants").status_code == 401
    headers = {"authorization": f"Bearer {key}"}
    assert api.get("/admin/tenants", headers=headers).status_code == 200
    assert api.post(path, {}, headers=headers).status_code == 201
    api.tenants.revoke(key.split("_")[1])
    assert api.get("/v1/models").status_code == 401, "it does not open again"


def test_only_the_owner_shares(tmp_path):
    api = Api(settings=settings_of(admin_api_keys=("admin",)))
    for tenant in ("a", "b"):
        api.tenants.create(Tenant(id=tenant))
    with open_adapters(tmp_path / "home", access=api.tenants) as adapters:
        folder = write_adapter(adapters.root / "x")
        adapters.service.register_folder("hat", str(folder), tenant=TenantId("a"))
        api = Api(
            settings=api.settings,
            directory=adapters.service,
            routers=[sharing.router],
            tenants=api.tenants,
        )
        path = "/admin/adapters/hat/visibility"
        a, b = ({**ADMIN, "x-manyhats-tenant": tenant} for tenant in ("a", "b"))
        assert api.get(path, headers=a).json()["visibility"] == "private"
        wanted = {"visibility": "shared", "shared_with": ["b"]}
        assert put(api, path, wanted, headers=b).status_code == 404
        assert put(api, path, wanted, headers=a).json()["shared_with"] == ["b"]
        assert api.complete(model="hat", headers=b).status_code == 200
        assert put(api, path, {"visibility": "private"}, headers=b).status_code == 404
        for body, status, param in (
            ({"visibility": "shared"}, 400, "shared_with"),
            ({"visibility": "public", "shared_with": ["b"]}, 400, "shared_with"),
            ({"visibility": "shared", "shared_with": ["nobody"]}, 404, "tenant"),
            ({"visibility": "hidden"}, 400, "visibility"),
        ):
            error(put(api, path, body, headers=a), status, param)
        assert api.tenants.grant("hat", "a").shared_with == ("b",)
        tenant_key = {"authorization": f"Bearer {api.tenants.issue('a', Role.TENANT)[1]}"}
        assert put(api, path, wanted, headers=tenant_key).status_code == 403
