"""How the stores reach the Redis that replicas share."""

from __future__ import annotations

from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from manyhats.errors import ConfigError

TIMEOUT_S = 2.0


def connect(url: str, timeout_s: float = TIMEOUT_S) -> Any:
    """A client that gives texts, and waits ``timeout_s`` for an answer at most.

    It tries once more where a connection has gone; what timed out is not sent again. Any: the
    client's methods are typed as possibly awaitable. Raises ConfigError for a bad ``url``; nothing
    is sent yet.
    """
    try:
        return redis.Redis.from_url(
            url,
            decode_responses=True,
            socket_timeout=timeout_s,
            socket_connect_timeout=min(timeout_s, TIMEOUT_S),
            retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
        )
    except ValueError as exc:
        raise ConfigError(f"redis_url: {exc}", param="redis_url") from exc
