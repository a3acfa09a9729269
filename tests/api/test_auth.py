"""Keys and roles: deny by default, in constant time, and no open door beyond loopback."""

from __future__ import annotations

import asyncio
import hmac
from types import SimpleNamespace

import httpx
import pytest
from fastapi import Depends, FastAPI

from manyhats.api import auth
from manyhats.api.auth import KeyRing, check_exposure, require_admin, require_user
from manyhats.api.handlers import install_handlers
from manyhats.config import Settings
from manyhats.errors import ConfigError
from manyhats.tenancy.directory import TenantDirectory
from manyhats.tenancy.model import Role
from manyhats.tenancy.store_sqlite import SqliteTenantStore

BOTH = {"api_keys": ("user-key", "user-key-2"), "admin_api_keys": ("admin-key", "admin-key-2")}


def make_app(**settings) -> FastAPI:
    app = FastAPI()
    tenants = TenantDirectory(SqliteTenantStore(":memory:"))
    app.state.manyhats = SimpleNamespace(settings=Settings(**settings), tenants=tenants)
    install_handlers(app)

    @app.get("/user", dependencies=[Depends(require_user)])
    async def user() -> str:
        return "user"

    @app.get("/admin", dependencies=[Depends(require_admin)])
    async def admin() -> str:
        return "admin"

    return app


def get(app, path, *keys, **headers) -> httpx.Response:
    """GET with one Authorization header for each of ``keys``."""

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            sent = [("authorization", key) for key in keys] + list(headers.items())
            return await client.get(path, headers=sent)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("key", "user", "admin"),
    [
        ("Bearer user-key", 200, 403),
        ("Bearer user-key-2", 200, 403),
        ("bearer user-key", 200, 403),
        ("Bearer  admin-key ", 200, 200),
        ("Bearer admin-key-2", 200, 200),
        ("Bearer admin-key2", 401, 401),
        ("Bearer admin-ke", 401, 401),
        ("Bearer user-key,user-key-2", 401, 401),
        ("Bearer user-key user-key-2", 401, 401),
        ("Bearer " + "x" * 60_000, 401, 401),
        ("Bearer", 401, 401),
        ("Bearer ", 401, 401),
        ("user-key", 401, 401),
        ("Basic user-key", 401, 401),
        ("", 401, 401),
        (b"Bearer \xff\xfe", 401, 401),
    ],
)
def test_roles(key, user, admin):
    app = make_app(**BOTH)
    assert (get(app, "/user", key).status_code, get(app, "/admin", key).status_code) == (
        user,
        admin,
    )


def test_no_header_and_two_headers_are_refused():
    app = make_app(**BOTH)
    for keys in ((), ("Bearer user-key", "Bearer user-key")):
        answer = get(app, "/user", *keys)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"


def test_a_refusal_does_not_repeat_the_key():
    assert "secret" not in get(make_app(**BOTH), "/user", "Bearer secret").text


def test_without_any_key_everything_is_open():
    app = make_app()
    for path in ("/user", "/admin"):
        assert get(app, path).status_code == 200
        assert get(app, path, "Bearer whatever").status_code == 200


def test_with_user_keys_alone_administration_is_refused_for_everybody():
    app = make_app(api_keys=("user-key",))
    answer = get(app, "/admin", "Bearer user-key")
    assert answer.status_code == 403
    assert "--admin-api-keys" in answer.json()["error"]["message"]
    assert get(app, "/admin").status_code == 401


def test_with_admin_keys_alone_users_need_one():
    app = make_app(admin_api_keys=("admin-key",))
    assert get(app, "/user").status_code == 401
    assert get(app, "/user", "Bearer admin-key").status_code == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:3000", 200),
        ("http://127.0.0.1:8000", 200),
        ("http://[::1]:8000", 200),
        ("https://evil.example", 403),
        ("http://localhost.evil.example", 403),
        ("http://127.0.0.1.evil.example", 403),
        ("null", 403),
    ],
)
def test_a_web_page_does_not_come_through_the_open_door(origin, status):
    for path in ("/user", "/admin"):
        assert get(make_app(), path, origin=origin).status_code == status
        keyed = get(make_app(**BOTH), path, "Bearer admin-key", origin=origin)
        assert keyed.status_code == 200, "a key says enough"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org", "", "127.0.0.1.x"])
def test_without_keys_only_loopback_may_be_listened_on(host):
    with pytest.raises(ConfigError, match=f"--host {host}: without API keys") as caught:
        check_exposure(Settings(host=host))
    assert "--admin-api-keys" in caught.value.message
    check_exposure(Settings(host=host, api_keys=("k",)))
    check_exposure(Settings(host=host, admin_api_keys=("k",)))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_key(host):
    check_exposure(Settings(host=host))


@pytest.mark.parametrize("key", ["", " ", "a b", "a\n", "clé"])
@pytest.mark.parametrize("field", ["api_keys", "admin_api_keys"])
def test_a_key_that_no_header_can_carry_stops_the_start(field, key):
    with pytest.raises(ConfigError, match=field) as caught:
        check_exposure(Settings(**{field: ("good", key)}))
    assert "good" not in caught.value.message


def test_keys_are_kept_as_digests():
    ring = KeyRing.of(Settings(**BOTH))
    assert "user-key" not in repr(ring)
    assert all(len(digest) == 32 for digest in ring.users + ring.admins)


@pytest.mark.parametrize("token", [b"user-key", b"user-key-2", b"admin-key", b"unknown"])
def test_every_key_is_compared_in_constant_time(monkeypatch, token):
    compared = []

    def counting(a, b):
        compared.append((a, b))
        return hmac.compare_digest(a, b)

    monkeypatch.setattr(auth, "hmac", SimpleNamespace(compare_digest=counting))
    KeyRing.of(Settings(**BOTH)).role(token)
    assert len(compared) == 4
    assert all(len(a) == len(b) == 32 for a, b in compared)


def test_a_key_of_both_kinds_is_an_admins():
    ring = KeyRing.of(Settings(api_keys=("k",), admin_api_keys=("k",)))
    assert ring.role(b"k") is Role.ADMIN
