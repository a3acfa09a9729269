"""Quotas shared by replicas: the arithmetic of ``quota`` in Lua, atomic within Redis.

Keys of a tenant, under ``{manyhats:1:quota:<tenant>}:`` (the 1 is the format, the braces keep them
on one node of a cluster): ``account``, a hash of what ``quota.Account`` has; ``running`` and
``queued``, sorted sets from request to when it counts as lost, should its server die with it.

While Redis cannot be reached, each server goes on with an account of its own, and says so in its
log: nobody is turned away for it, and nobody gets more than the quota from one server. Redis is
asked again every few seconds, by one request at a time, so that the others need not wait for it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final

import redis
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from manyhats.errors import ConfigError
from manyhats.tenancy.limiter import MemoryLimiter
from manyhats.tenancy.model import Quotas
from manyhats.tenancy.quota import Refusal, impossible

logger = logging.getLogger(__name__)

_TIMEOUT_S: Final = 1.0
_PAUSE_S: Final = 2.0
_LOST_S: Final = 3600
_OWED: Final = 10_000
_NAMES: Final = (
    "requests_per_minute",
    "tokens_per_minute",
    "tokens_per_day",
    "concurrent_requests",
    "queued_requests",
)
_COMMON: Final = """
local account, running, queued = KEYS[1], KEYS[2], KEYS[3]
local now, id = tonumber(ARGV[1]), ARGV[2]
local today = math.floor(now / 86400)
local function left(name, limit)
  local level = tonumber(redis.call('HGET', account, name))
  if not level then return limit end
  local at = tonumber(redis.call('HGET', account, name .. '_at'))
  return math.min(limit, level + math.max(0, now - at) * limit / 60)
end
local function take(name, count, limit)
  local at = tonumber(redis.call('HGET', account, name .. '_at') or '0')
  local level = math.min(limit, left(name, limit) - count)
  redis.call('HSET', account, name, string.format('%.17g', level))
  redis.call('HSET', account, name .. '_at', string.format('%.17g', math.max(at, now)))
end
local function day_tokens()
  if tonumber(redis.call('HGET', account, 'day') or '-1') ~= today then return 0 end
  return tonumber(redis.call('HGET', account, 'day_tokens'))
end
"""
_ADMIT: Final = (
    _COMMON
    + """
local tokens, lost = tonumber(ARGV[3]), tonumber(ARGV[4])
local rpm, tpm, tpd = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local many, waiting = tonumber(ARGV[8]), tonumber(ARGV[9])
local function refuse(name, retry) return {name, string.format('%.17g', retry)} end
if rpm and 1 > left('requests', rpm) then
  return refuse('requests_per_minute', (1 - left('requests', rpm)) * 60 / rpm) end
if tpm and tokens > left('tokens', tpm) then
  return refuse('tokens_per_minute', (tokens - left('tokens', tpm)) * 60 / tpm) end
if tpd and day_tokens() + tokens > tpd then
  return refuse('tokens_per_day', (today + 1) * 86400 - now) end
redis.call('ZREMRANGEBYSCORE', running, '-inf', now)
redis.call('ZREMRANGEBYSCORE', queued, '-inf', now)
if many and redis.call('ZCARD', running) >= many then return refuse('concurrent_requests', 1) end
if waiting and redis.call('ZCARD', queued) >= waiting then return refuse('queued_requests', 1) end
if rpm then take('requests', 1, rpm) end
if tpm then take('tokens', tokens, tpm) end
redis.call('HSET', account, 'day_tokens', day_tokens() + tokens)
redis.call('HSET', account, 'day', today)
redis.call('ZADD', running, now + lost, id)
redis.call('ZADD', queued, now + lost, id)
redis.call('EXPIRE', account, 172800)
redis.call('EXPIRE', running, lost)
redis.call('EXPIRE', queued, lost)
return {}
"""
)
_SETTLE: Final = (
    _COMMON
    + """
local unused, tpm = tonumber(ARGV[3]), tonumber(ARGV[4])
redis.call('ZREM', running, id)
redis.call('ZREM', queued, id)
if tpm then take('tokens', -unused, tpm) end
if tonumber(redis.call('HGET', account, 'day') or '-1') == today then
  redis.call('HSET', account, 'day_tokens', math.max(0, day_tokens() - unused)) end
redis.call('EXPIRE', account, 172800)
return 1
"""
)


class RedisLimiter:
    """Implements ``Limiter`` in the Redis at ``url``; confined to one event loop.

    ``clock`` gives Unix seconds. Raises ConfigError for a bad ``url``.
    """

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time) -> None:
        try:
            # Any: the client is typed for callers of both kinds
            self._redis: Any = redis.asyncio.Redis.from_url(
                url,
                decode_responses=True,
                socket_timeout=_TIMEOUT_S,
                socket_connect_timeout=_TIMEOUT_S,
                retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
            )
        except ValueError as exc:
            raise ConfigError(f"redis_url: {exc}", param="redis_url") from exc
        self._clock = clock
        self._admit = self._redis.register_script(_ADMIT)
        self._settle = self._redis.register_script(_SETTLE)
        self._alone = MemoryLimiter(clock=clock)
        self._admitted_alone: set[str] = set()
        self._unreachable = False
        self._again = 0.0
        self._owed: deque[tuple[str, str, Quotas, int]] = deque(maxlen=_OWED)

    @property
    def reachable(self) -> bool:
        """Whether Redis answered last."""
        return not self._unreachable

    async def admit(
        self, tenant: str, request_id: str, quotas: Quotas, tokens: int
    ) -> Refusal | None:
        """See Limiter."""
        never = impossible(quotas, tokens)
        if never is not None:
            return never
        if self._pausing():
            return await self._admit_alone(tenant, request_id, quotas, tokens)
        limits = ["" if (n := getattr(quotas, name)) is None else n for name in _NAMES]
        arguments: list[Any] = [self._clock(), request_id, tokens, _LOST_S, *limits]
        try:
            answer = await self._admit(keys=_keys(tenant), args=arguments)
        except redis.RedisError as error:
            self._note(error)
            return await self._admit_alone(tenant, request_id, quotas, tokens)
        self._note(None)
        if not answer:
            return None
        name, retry = answer
        wanted = tokens if name.startswith("tokens") else 1
        return Refusal(name, getattr(quotas, name), wanted, float(retry))

    async def start(self, tenant: str, request_id: str) -> None:
        """See Limiter."""
        if request_id in self._admitted_alone:
            await self._alone.start(tenant, request_id)
        elif not self._pausing():
            await self._told(self._redis.zrem(_keys(tenant)[2], request_id))

    async def settle(self, tenant: str, request_id: str, quotas: Quotas, unused: int) -> None:
        """See Limiter."""
        if request_id in self._admitted_alone:
            self._admitted_alone.discard(request_id)
            await self._alone.settle(tenant, request_id, quotas, unused)
            return
        self._owed.append((tenant, request_id, quotas, unused))
        if not self._pausing():
            await self._settle_owed()

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    async def _admit_alone(
        self, tenant: str, request_id: str, quotas: Quotas, tokens: int
    ) -> Refusal | None:
        refusal = await self._alone.admit(tenant, request_id, quotas, tokens)
        if refusal is None:
            self._admitted_alone.add(request_id)
        return refusal

    def _pausing(self) -> bool:
        """Whether Redis is left alone for now; false for one caller in every pause."""
        now = time.monotonic()
        if not self._unreachable or now >= self._again:
            self._again = now + _PAUSE_S
            return False
        return True

    async def _settle_owed(self) -> None:
        """Say what has ended, also while Redis was away."""
        while self._owed:
            tenant, request_id, quotas, unused = self._owed.popleft()
            minute = "" if quotas.tokens_per_minute is None else quotas.tokens_per_minute
            arguments: list[Any] = [self._clock(), request_id, unused, minute]
            try:
                await self._settle(keys=_keys(tenant), args=arguments)
            except redis.RedisError as error:
                self._owed.appendleft((tenant, request_id, quotas, unused))
                self._note(error)
                return
            self._note(None)

    async def _told(self, call: Awaitable[Any]) -> None:
        """A request that goes on or ends is not failed for it: what it held is given up in time."""
        try:
            await call
        except redis.RedisError as error:
            self._note(error)
        else:
            self._note(None)

    def _note(self, error: redis.RedisError | None) -> None:
        """Say once that Redis is away, and that it is back."""
        if error is not None and not self._unreachable:
            logger.error("quotas are this server's own: the shared store (Redis) failed: %s", error)
        elif error is None and self._unreachable:
            logger.info("quotas are shared again")
        self._unreachable = error is not None


def _keys(tenant: str) -> list[str]:
    prefix = f"{{manyhats:1:quota:{tenant}}}:"
    return [prefix + name for name in ("account", "running", "queued")]
