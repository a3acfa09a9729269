"""One contract over both stores of tenants: embedded, and a real Redis."""

from __future__ import annotations

import threading

import pytest
import redis

from manyhats.errors import ConfigError, ConflictError, ServiceError
from manyhats.tenancy.directory import TenantDirectory
from manyhats.tenancy.model import Tenant
from manyhats.tenancy.store import Change, Kind, StaleRevisionError
from manyhats.tenancy.store_redis import RedisTenantStore
from manyhats.tenancy.store_sqlite import SqliteTenantStore

EMPTY = {kind: {} for kind in Kind}


@pytest.fixture(params=["sqlite", "redis"])
def open_store(request, tmp_path):
    """Opens the same store again and again, as several processes would."""
    opened = []
    if request.param == "sqlite":

        def make():
            return SqliteTenantStore(tmp_path / "registry.sqlite")
    else:
        url = request.getfixturevalue("redis_url")
        with redis.Redis.from_url(url) as client:
            client.flushall()

        def make():
            return RedisTenantStore(url)

    def opener():
        opened.append(make())
        return opened[-1]

    yield opener
    for store in opened:
        store.close()


def put(ident, text, kind=Kind.TENANT):
    return Change(kind, ident, text)


def test_a_new_store_is_empty(open_store):
    store = open_store()
    assert store.revision() == 0
    assert store.read() == (0, EMPTY)


def test_what_is_written_is_read_by_everybody(open_store):
    store, other = open_store(), open_store()
    assert store.write(0, [put("a", '{"é":1}'), put("a", "key", Kind.KEY), put("b", "2")]) == 1
    expected = {**EMPTY, Kind.TENANT: {"a": '{"é":1}', "b": "2"}, Kind.KEY: {"a": "key"}}
    assert other.read() == store.read() == (1, expected)
    assert other.write(1, [put("a", None), put("b", "3")]) == 2
    assert store.revision() == 2
    assert store.read() == (2, {**EMPTY, Kind.TENANT: {"b": "3"}, Kind.KEY: {"a": "key"}})


def test_removing_what_is_not_there_changes_nothing_else(open_store):
    store = open_store()
    store.write(0, [put("a", "1")])
    store.write(1, [put("b", None)])
    assert store.read() == (2, {**EMPTY, Kind.TENANT: {"a": "1"}})


@pytest.mark.parametrize("revision", [0, 2, -1])
def test_a_write_from_another_revision_changes_nothing(open_store, revision):
    store = open_store()
    store.write(0, [put("a", "1")])
    with pytest.raises(StaleRevisionError):
        store.write(revision, [put("a", "2"), put("b", "2")])
    assert store.read() == (1, {**EMPTY, Kind.TENANT: {"a": "1"}})


def test_of_many_writers_each_change_is_kept(open_store):
    """Every directory retries what another one was faster with."""
    names = [f"t{i}-{j}" for i in range(3) for j in range(4)]
    directories = [TenantDirectory(open_store()) for _ in range(3)]
    failures = []

    def work(number):
        try:
            for name in names[number::3]:
                directories[number].create(Tenant(id=name))
        except (ConflictError, ServiceError) as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    there = {t.id for t in TenantDirectory(open_store()).tenants()}
    assert there == {*names, "default"}


def test_one_name_is_created_once(open_store):
    first, second = TenantDirectory(open_store()), TenantDirectory(open_store())
    first.create(Tenant(id="acme", weight=2.0))
    with pytest.raises(ConflictError, match="acme"):
        second.create(Tenant(id="acme"))
    assert second.tenant("acme").weight == 2.0


def test_others_see_a_change_once_they_refresh(open_store):
    first, second = TenantDirectory(open_store()), TenantDirectory(open_store())
    first.create(Tenant(id="acme"))
    assert second.find("acme") is None
    second.refresh()
    assert second.find("acme") == Tenant(id="acme")


def test_sqlite_shares_the_registrys_file(tmp_path):
    from manyhats.lifecycle.registry import Registry

    path = tmp_path / "registry.sqlite"
    registry = Registry(path, max_versions=3)
    store = SqliteTenantStore(path)
    store.write(0, [put("a", "1")])
    registry.close()
    store.close()
    Registry(path, max_versions=3).close()
    assert SqliteTenantStore(path).read() == (1, {**EMPTY, Kind.TENANT: {"a": "1"}})


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "f").write_bytes(b"no database" * 100)
    with pytest.raises(ConfigError, match="cannot be opened"):
        SqliteTenantStore(tmp_path / "f")


def test_a_bad_address_is_refused():
    with pytest.raises(ConfigError, match="redis_url"):
        RedisTenantStore("http://127.0.0.1")


def test_without_the_shared_store_what_is_known_goes_on_and_changes_fail():
    """The connection is refused: nothing listens at the address."""
    store = RedisTenantStore("redis://127.0.0.1:1/0")
    with pytest.raises(ServiceError, match="Redis"):
        TenantDirectory(store)
    store.close()


def test_a_directory_outlives_its_store(redis_url):
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
        directory = TenantDirectory(store := RedisTenantStore(redis_url))
        directory.create(Tenant(id="acme"))
        client.rename("{manyhats:1:tenancy}:revision", "{manyhats:1:tenancy}:away")
        client.lpush("{manyhats:1:tenancy}:revision", "no number")
        with pytest.raises(ServiceError):
            directory.create(Tenant(id="other"))
        assert directory.tenant("acme").id == "acme"
        client.delete("{manyhats:1:tenancy}:revision")
        client.rename("{manyhats:1:tenancy}:away", "{manyhats:1:tenancy}:revision")
        directory.create(Tenant(id="other"))
    store.close()
