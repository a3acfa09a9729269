"""What drift detection keeps in Redis, shared by replicas: one hash, ``manyhats:1:drift`` (the 1 is
the format).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import redis

from manyhats.errors import ConfigError, ServiceError

_T = TypeVar("_T")
_KEY: Final = "{manyhats:1:drift}"
_TIMEOUT_S: Final = 5.0


class RedisDriftStore:
    """Implements ``DriftStore`` in the Redis at ``url``. Raises ConfigError for a bad ``url``."""

    def __init__(self, url: str) -> None:
        try:
            # Any: the client's methods are typed as possibly awaitable
            self._redis: Any = redis.Redis.from_url(
                url,
                decode_responses=True,
                socket_timeout=_TIMEOUT_S,
                socket_connect_timeout=_TIMEOUT_S,
            )
        except ValueError as exc:
            raise ConfigError(f"redis_url: {exc}", param="redis_url") from exc

    def get(self, key: str) -> str | None:
        """See DriftStore."""
        found = _known(lambda: self._redis.hget(_KEY, key))
        return None if found is None else str(found)

    def put(self, key: str, text: str) -> None:
        """See DriftStore."""
        _known(lambda: self._redis.hset(_KEY, key, text))

    def put_new(self, key: str, text: str) -> str:
        """See DriftStore."""

        def both() -> str:
            with self._redis.pipeline(transaction=True) as pipe:
                pipe.hsetnx(_KEY, key, text)
                pipe.hget(_KEY, key)
                return str(pipe.execute()[1])

        return _known(both)

    def items(self, prefix: str) -> Mapping[str, str]:
        """See DriftStore."""
        pattern = "".join(f"\\{c}" if c in "*?[]\\^-" else c for c in prefix) + "*"
        return _known(lambda: dict(sorted(self._redis.hscan_iter(_KEY, match=pattern, count=500))))

    def remove(self, key: str) -> None:
        """See DriftStore."""
        _known(lambda: self._redis.hdel(_KEY, key))

    def close(self) -> None:
        """See DriftStore."""
        self._redis.close()


def _known(work: Callable[[], _T]) -> _T:
    try:
        return work()
    except redis.RedisError as exc:
        raise ServiceError(f"the shared store (Redis) failed: {exc}") from exc
