"""The records of tenancy in Redis, shared by replicas. A write is one Lua script: all or nothing.

Keys, all under ``manyhats:1:tenancy:`` (the 1 is the format): ``revision``, a string; for each
kind of records a hash from id to JSON. The braces keep them on one node of a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import redis

from manyhats.errors import ServiceError
from manyhats.tenancy.redis_client import connect
from manyhats.tenancy.store import Change, Kind, StaleRevisionError, Texts

_T = TypeVar("_T")
_PREFIX: Final = "{manyhats:1:tenancy}:"
_WRITE: Final = """
if tonumber(redis.call('GET', KEYS[1]) or '0') ~= tonumber(ARGV[1]) then return -1 end
for i = 2, #ARGV, 4 do
  local hash = KEYS[tonumber(ARGV[i])]
  if ARGV[i + 2] == 'set' then redis.call('HSET', hash, ARGV[i + 1], ARGV[i + 3])
  else redis.call('HDEL', hash, ARGV[i + 1]) end
end
return redis.call('INCR', KEYS[1])
"""


class RedisTenantStore:
    """Implements ``TenantStore`` in the Redis at ``url``. Raises ConfigError for a bad ``url``."""

    def __init__(self, url: str) -> None:
        self._redis = connect(url)
        self._kinds = list(Kind)
        self._keys = [_PREFIX + "revision", *(_PREFIX + kind.value for kind in self._kinds)]
        self._write = self._redis.register_script(_WRITE)

    def revision(self) -> int:
        """See TenantStore."""
        return _known(lambda: int(self._redis.get(self._keys[0]) or 0))

    def read(self) -> tuple[int, Texts]:
        """See TenantStore."""

        def all_of_it() -> tuple[int, Texts]:
            with self._redis.pipeline(transaction=True) as pipe:
                pipe.get(self._keys[0])
                for key in self._keys[1:]:
                    pipe.hgetall(key)
                revision, *hashes = pipe.execute()
            return int(revision or 0), dict(zip(self._kinds, hashes, strict=True))

        return _known(all_of_it)

    def write(self, revision: int, changes: Sequence[Change]) -> int:
        """See TenantStore."""
        arguments: list[str | int] = [revision]
        for change in changes:
            number = self._kinds.index(change.kind) + 2  # Lua counts from 1, the revision is first
            done = "remove" if change.text is None else "set"
            arguments += [number, change.id, done, change.text or ""]
        found = _known(lambda: int(self._write(keys=self._keys, args=arguments)))
        if found < 0:
            raise StaleRevisionError
        return found

    def close(self) -> None:
        """See TenantStore."""
        self._redis.close()


def _known(work: Callable[[], _T]) -> _T:
    try:
        return work()
    except redis.RedisError as exc:
        raise ServiceError(f"the shared store (Redis) failed: {exc}") from exc
