"""The Redis of the suite is a real one: it is spoken to over a socket and keeps what it is told."""

from urllib.parse import urlsplit

import redis


def test_a_value_survives_its_connection(redis_url):
    with redis.Redis.from_url(redis_url) as first:
        assert first.set("colour", "teal", nx=True)
        assert first.set("colour", "pink", nx=True) is None
    with redis.Redis.from_url(redis_url, decode_responses=True) as second:
        assert second.get("colour") == "teal"
        assert second.delete("colour") == 1


def test_it_listens_on_loopback_alone(redis_url):
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        assert client.config_get("bind")["bind"] == "127.0.0.1"
    assert urlsplit(redis_url).hostname == "127.0.0.1"
