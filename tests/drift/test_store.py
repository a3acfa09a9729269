"""Both stores keep the same promises; one of several who freeze at once wins."""

from __future__ import annotations

import threading

import pytest

from manyhats.drift.store_redis import RedisDriftStore
from manyhats.drift.store_sqlite import SqliteDriftStore
from manyhats.errors import ConfigError, ServiceError


@pytest.fixture(params=["sqlite", "redis"])
def opened(request, tmp_path):
    """Opens the store once more, as a restart or a replica does."""
    stores = []

    def open_one():
        if request.param == "sqlite":
            stores.append(SqliteDriftStore(tmp_path / "drift.sqlite"))
        else:
            stores.append(RedisDriftStore(request.getfixturevalue("redis_url"), "base"))
        return stores[-1]

    yield open_one
    for key in open_one().items(""):
        stores[-1].remove(key)
    for store in stores:
        store.close()


def test_what_is_put_is_there_for_others(opened):
    one, other = opened(), opened()
    assert one.get("policy/a") is None
    one.put("policy/a", "1")
    one.put("policy/a", "2")
    one.put("policy/ab*[x]-y", "3")
    one.put("latch/a", "é\n")
    assert other.get("policy/a") == "2"
    assert other.get("latch/a") == "é\n"
    assert dict(other.items("policy/")) == {"policy/a": "2", "policy/ab*[x]-y": "3"}
    assert dict(other.items("policy/ab*[x]-")) == {"policy/ab*[x]-y": "3"}
    assert dict(other.items("POLICY")) == {}
    other.remove("policy/a")
    other.remove("policy/a")
    assert one.get("policy/a") is None


def test_two_bases_in_one_redis_know_nothing_of_each_other(redis_url):
    one, other = RedisDriftStore(redis_url, "one"), RedisDriftStore(redis_url, "other")
    one.put("policy/a", "1")
    assert other.get("policy/a") is None
    assert other.put_new("policy/a", "2") == "2"
    other.remove("policy/a")
    assert dict(one.items("")) == {"policy/a": "1"}
    for store in (one, other):
        store.remove("policy/a")
        store.close()


def test_one_of_several_who_freeze_at_once_wins(opened):
    stores, seen = [opened() for _ in range(4)], {}

    def freeze(i):
        seen[i] = stores[i].put_new("frozen/ab/kl", str(i))

    threads = [threading.Thread(target=freeze, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seen.values())) == 1
    assert stores[0].get("frozen/ab/kl") == seen[0]


def test_what_cannot_be_opened_or_reached_says_so(tmp_path):
    (tmp_path / "bad").write_bytes(b"no database, and long enough to be read as one" * 30)
    with pytest.raises(ConfigError, match="cannot be opened"):
        SqliteDriftStore(tmp_path / "bad")
    with pytest.raises(ConfigError, match="redis_url"):
        RedisDriftStore("nonsense://x", "base")
    with pytest.raises(ServiceError, match="Redis"):
        RedisDriftStore("redis://127.0.0.1:1/0", "base").get("x")
    store = SqliteDriftStore(tmp_path / "good")
    store._db.execute("PRAGMA user_version = 99")
    store.close()
    with pytest.raises(ConfigError, match="format 99"):
        SqliteDriftStore(tmp_path / "good")
