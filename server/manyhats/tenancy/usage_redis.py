"""Usage in Redis, the sum over all replicas. An addition is one Lua script: all or nothing.

Keys under ``{manyhats:1:usage}:`` (the 1 is the format): ``days``, a set of the days that are kept;
for each ``day:<n>``, a hash from the JSON of ``[tenant, adapter, counter]`` to a number;
``batch:<id>`` for an hour, so that a batch sent twice is added once.
"""

from __future__ import annotations

import json
from typing import Final

import redis

from manyhats.errors import ServiceError
from manyhats.tenancy.redis_client import connect
from manyhats.tenancy.usage import Counts, Tally, UsageKey

_PREFIX: Final = "{manyhats:1:usage}:"
_TIMEOUT_S: Final = 5.0
_ADD: Final = """
if not redis.call('SET', KEYS[2], '1', 'NX', 'EX', 3600) then return 0 end
for i = 3, #ARGV, 3 do
  redis.call('SADD', KEYS[1], ARGV[i])
  redis.call('HINCRBY', ARGV[2] .. ARGV[i], ARGV[i + 1], ARGV[i + 2])
end
for _, day in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  if tonumber(day) < tonumber(ARGV[1]) then
    redis.call('DEL', ARGV[2] .. day)
    redis.call('SREM', KEYS[1], day)
  end
end
return 1
"""


class RedisUsageStore:
    """Implements ``UsageStore`` in the Redis at ``url``. Raises ConfigError for a bad ``url``."""

    def __init__(self, url: str) -> None:
        self._redis = connect(url, _TIMEOUT_S)
        self._add = self._redis.register_script(_ADD)

    def add(self, batch: str, tally: Tally, oldest: int) -> None:
        """See UsageStore."""
        arguments: list[str | int] = [oldest, _PREFIX + "day:"]
        for (day, tenant, adapter), counts in tally.items():
            for name, number in zip(Counts._fields, counts, strict=True):
                arguments += [day, json.dumps([tenant, adapter, name]), number]
        try:
            self._add(keys=[_PREFIX + "days", f"{_PREFIX}batch:{batch}"], args=arguments)
        except redis.RedisError as exc:
            raise ServiceError(f"the shared usage (Redis) failed: {exc}") from exc

    def read(self, since: int) -> Tally:
        """See UsageStore."""
        try:
            days = [d for d in map(int, self._redis.smembers(_PREFIX + "days")) if d >= since]
            with self._redis.pipeline(transaction=True) as pipe:
                for day in days:
                    pipe.hgetall(f"{_PREFIX}day:{day}")
                found = pipe.execute()
        except redis.RedisError as exc:
            raise ServiceError(f"the shared usage (Redis) failed: {exc}") from exc
        tally: dict[UsageKey, Counts] = {}
        for day, numbers in zip(days, found, strict=True):
            for field, number in numbers.items():
                tenant, adapter, name = json.loads(field)
                key = UsageKey(day, tenant, adapter)
                tally[key] = tally.get(key, Counts())._replace(**{name: int(number)})
        return tally

    def replace(self, tally: Tally) -> None:
        """See UsageStore."""
        days = _PREFIX + "days"
        try:
            known = self._redis.smembers(days)
            with self._redis.pipeline(transaction=True) as pipe:
                pipe.delete(days, *(f"{_PREFIX}day:{day}" for day in known))
                for (day, tenant, adapter), counts in tally.items():
                    fields = {
                        json.dumps([tenant, adapter, name]): number
                        for name, number in counts._asdict().items()
                    }
                    pipe.sadd(days, day).hset(f"{_PREFIX}day:{day}", mapping=fields)
                pipe.execute()
        except redis.RedisError as exc:
            raise ServiceError(f"the shared usage (Redis) failed: {exc}") from exc

    def close(self) -> None:
        """See UsageStore."""
        self._redis.close()
