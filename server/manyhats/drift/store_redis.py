"""What drift detection keeps in Redis, shared by replicas: one hash a base,
``manyhats:1:drift:BASE`` (the 1 is the format).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeVar

import redis

from manyhats.errors import ServiceError
from manyhats.tenancy.redis_client import connect

_T = TypeVar("_T")
_TIMEOUT_S: Final = 5.0


class RedisDriftStore:
    """Implements ``DriftStore`` in the Redis at ``url``. ``base``: of the folder that the base has
    in a home, as for the registry. Raises ConfigError for a bad ``url``.
    """

    def __init__(self, url: str, base: str) -> None:
        self._key = f"{{manyhats:1:drift:{base}}}"
        self._redis = connect(url, _TIMEOUT_S)

    def get(self, key: str) -> str | None:
        """See DriftStore."""
        found = _known(lambda: self._redis.hget(self._key, key))
        return None if found is None else str(found)

    def put(self, key: str, text: str) -> None:
        """See DriftStore."""
        _known(lambda: self._redis.hset(self._key, key, text))

    def put_new(self, key: str, text: str) -> str:
        """See DriftStore."""

        def both() -> str:
            with self._redis.pipeline(transaction=True) as pipe:
                pipe.hsetnx(self._key, key, text)
                pipe.hget(self._key, key)
                return str(pipe.execute()[1])

        return _known(both)

    def items(self, prefix: str) -> Mapping[str, str]:
        """See DriftStore."""
        pattern = "".join(f"\\{c}" if c in "*?[]\\^-" else c for c in prefix) + "*"
        return _known(
            lambda: dict(sorted(self._redis.hscan_iter(self._key, match=pattern, count=500)))
        )

    def remove(self, key: str) -> None:
        """See DriftStore."""
        _known(lambda: self._redis.hdel(self._key, key))

    def close(self) -> None:
        """See DriftStore."""
        self._redis.close()


def _known(work: Callable[[], _T]) -> _T:
    try:
        return work()
    except redis.RedisError as exc:
        raise ServiceError(f"the shared store (Redis) failed: {exc}") from exc
