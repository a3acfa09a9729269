"""What the server says when it is up is true: the keys that there are, and commands that work."""

from __future__ import annotations

import pytest
from pydantic import SecretStr
from support.api import settings_of
from support.fake_engine import FakeEngine

from manyhats.banner import banner
from manyhats.config import Settings
from manyhats.tenancy.directory import TenantDirectory
from manyhats.tenancy.model import Role
from manyhats.tenancy.store_sqlite import SqliteTenantStore
from manyhats.types import DEFAULT_TENANT

NOW = 1_000_000.0
OPEN = "No API key is configured: only this machine can connect."
HEADER = '-H "Authorization: Bearer $API_KEY"'


@pytest.fixture
def tenants(tmp_path):
    store = SqliteTenantStore(tmp_path / "registry.sqlite")
    yield TenantDirectory(store, clock=lambda: NOW)
    store.close()


def text(tenants, settings: Settings) -> str:
    return banner(settings, "http://127.0.0.1:8000", FakeEngine(), tenants, ["pirate"])


def test_without_any_key_the_door_is_open(tenants):
    said = text(tenants, settings_of())
    assert OPEN in said
    assert "Authorization" not in said


def test_issued_keys_are_counted_and_none_is_shown(tenants):
    issued = [tenants.issue(DEFAULT_TENANT, role) for role in (Role.ADMIN, Role.TENANT)]
    said = text(tenants, settings_of())
    assert "API keys: 0 in the settings, 2 issued\n" in said
    assert OPEN not in said
    assert said.count(HEADER) == 3
    tenants.revoke(issued[1][0].id)
    tenants.issue(DEFAULT_TENANT, Role.TENANT, lifetime_s=0)
    given = settings_of(admin_api_keys=(SecretStr("s3cret"),), api_keys=(SecretStr("0ther"),))
    said += text(tenants, given)
    assert "API keys: 2 in the settings, 1 issued (2 more are revoked or expired)\n" in said
    for record, key in issued:
        secrets = (key, key.rpartition("_")[2], record.id, record.digest, "s3cret", "0ther")
        assert not any(secret in said for secret in secrets)


def test_a_door_that_no_key_opens_is_told(tenants):
    tenants.revoke(tenants.issue(DEFAULT_TENANT, Role.ADMIN)[0].id)
    said = text(tenants, settings_of())
    assert "none that can be used, all 1 issued ones are revoked or expired" in said
    assert "--admin-api-keys" in said
    assert OPEN not in said
    assert HEADER in said


def test_keys_of_the_settings_alone(tenants):
    said = text(tenants, settings_of(api_keys=(SecretStr("s3cret"),)))
    assert "API keys: 1 in the settings, 0 issued\n" in said
    assert HEADER in said
