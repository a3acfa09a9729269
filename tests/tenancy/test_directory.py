"""Tenants and keys: shown once, kept as digests, rotated, revoked, ended."""

from __future__ import annotations

import hmac
import re
import sqlite3
from types import SimpleNamespace

import pytest

from manyhats.errors import ConflictError, NotFoundError
from manyhats.tenancy import keys as keys_module
from manyhats.tenancy.directory import TenantDirectory
from manyhats.tenancy.model import Role, Tenant
from manyhats.tenancy.store_sqlite import SqliteTenantStore


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "registry.sqlite"


@pytest.fixture
def directory(path, clock):
    store = SqliteTenantStore(path)
    directory = TenantDirectory(store, clock=clock)
    directory.create(Tenant(id="acme"))
    yield directory
    store.close()


def test_a_key_opens_what_it_was_issued_for_and_nothing_near_it_does(directory):
    record, key = directory.issue("acme", Role.OPERATOR, note="ci")
    assert re.fullmatch(r"mh_[0-9a-f]{16}_[A-Za-z0-9_-]{43}", key)
    assert directory.authenticate(key.encode()) == record
    assert (record.tenant, record.role, record.note, record.created) == (
        "acme",
        Role.OPERATOR,
        "ci",
        1000,
    )
    last = "A" if key[-1] != "A" else "B"
    for wrong in (key[:-1], key[:-1] + last, key + "A", " " + key, key.upper(), "", "mh__"):
        assert directory.authenticate(wrong.encode()) is None
    _, other = directory.issue("acme", Role.TENANT)
    assert directory.authenticate((key[:20] + other[20:]).encode()) is None, "another one's secret"


def test_the_key_itself_is_kept_nowhere(directory, path):
    record, key = directory.issue("acme", Role.TENANT)
    secret = key.split("_", 2)[2]
    assert secret not in record.model_dump_json()
    texts = [t for (t,) in sqlite3.connect(path).execute("SELECT text FROM tenancy_records")]
    assert any(record.digest in text for text in texts)
    for file in path.parent.iterdir():
        assert secret.encode() not in file.read_bytes()


def test_keys_differ(directory):
    issued = [directory.issue("acme", Role.TENANT)[1] for _ in range(5)]
    assert len({key.split("_", 2)[2] for key in issued}) == 5


@pytest.mark.parametrize("known", [True, False])
def test_digests_are_compared_in_constant_time(directory, monkeypatch, known):
    """Also where there is no such key: the time does not tell."""
    _, key = directory.issue("acme", Role.TENANT)
    compared = []

    def counting(a, b):
        compared.append((a, b))
        return hmac.compare_digest(a, b)

    monkeypatch.setattr(keys_module, "hmac", SimpleNamespace(compare_digest=counting))
    token = key if known else "mh_0123456789abcdef_" + "A" * 43
    directory.authenticate(token.encode())
    assert [(len(a), len(b)) for a, b in compared] == [(64, 64)]


def test_a_key_ends(directory, clock):
    record, key = directory.issue("acme", Role.TENANT, lifetime_s=10)
    assert record.expires == 1010
    clock.now = 1009.9
    assert directory.authenticate(key.encode()) is not None
    clock.now = 1010.0
    assert directory.authenticate(key.encode()) is None


def test_a_revoked_key_opens_nothing_and_stays_on_the_list(directory, clock):
    record, key = directory.issue("acme", Role.TENANT)
    clock.now = 1005.0
    assert directory.revoke(record.id).revoked == 1005
    clock.now = 1007.0
    assert directory.revoke(record.id).revoked == 1005
    assert directory.authenticate(key.encode()) is None
    assert [k.id for k in directory.keys("acme")] == [record.id]
    assert directory.has_keys


def test_rotation_replaces_the_key_at_once(directory):
    old, key = directory.issue("acme", Role.OPERATOR, lifetime_s=50, note="ci")
    new, fresh = directory.rotate(old.id)
    assert directory.authenticate(key.encode()) is None
    assert directory.authenticate(fresh.encode()) == new
    assert (new.role, new.tenant, new.note, new.expires) == (Role.OPERATOR, "acme", "ci", 1050)
    with pytest.raises(ConflictError, match="revoked"):
        directory.rotate(old.id)


@pytest.mark.parametrize(("life", "ends"), [(None, 1030), (20, 1020)])
def test_rotation_with_grace_leaves_the_old_key_for_a_while(directory, clock, life, ends):
    old, key = directory.issue("acme", Role.TENANT, lifetime_s=life)
    _, fresh = directory.rotate(old.id, grace_s=30)
    clock.now = ends - 0.1
    assert directory.authenticate(key.encode()) is not None
    clock.now = ends
    assert directory.authenticate(key.encode()) is None
    assert (directory.authenticate(fresh.encode()) is None) == (life is not None)


def test_deleting_a_tenant_revokes_its_keys_and_no_others(directory):
    directory.create(Tenant(id="other"))
    _, key = directory.issue("acme", Role.TENANT)
    _, others = directory.issue("other", Role.TENANT)
    directory.delete("acme")
    assert directory.authenticate(key.encode()) is None
    assert directory.authenticate(others.encode()) is not None
    directory.create(Tenant(id="acme"))
    assert directory.authenticate(key.encode()) is None, "not even if the id comes back"
    assert directory.has_keys


def test_the_default_tenant_is_always_there(directory):
    assert directory.tenant("default").weight == 1.0
    directory.update(Tenant(id="default", weight=5.0))
    assert directory.tenant("default").weight == 5.0
    with pytest.raises(ConflictError, match="always there"):
        directory.delete("default")


def test_what_is_not_there_is_not_found(directory):
    for call in (
        lambda: directory.tenant("nobody"),
        lambda: directory.keys("nobody"),
        lambda: directory.update(Tenant(id="nobody")),
        lambda: directory.delete("nobody"),
        lambda: directory.issue("nobody", Role.TENANT),
        lambda: directory.rotate("0" * 16),
        lambda: directory.revoke("0" * 16),
    ):
        with pytest.raises(NotFoundError, match=r"nobody|0000"):
            call()


def test_everything_survives_closing(directory, path, clock):
    _, key = directory.issue("acme", Role.ADMIN)
    again = TenantDirectory(SqliteTenantStore(path), clock=clock)
    assert again.authenticate(key.encode()).role is Role.ADMIN
    assert again.tenants() == directory.tenants()


@pytest.mark.parametrize("ident", ["", "a b", "é", "a/b", "-a", "a" * 65, "a\n"])
def test_ids_that_no_header_or_path_can_carry_are_refused(ident):
    with pytest.raises(ValueError, match="pattern"):
        Tenant(id=ident)


def test_roles_are_ordered():
    tenant, operator, admin = Role
    assert [r.covers(operator) for r in (tenant, operator, admin)] == [False, True, True]
    assert admin.covers(admin)
    assert not operator.covers(admin)
