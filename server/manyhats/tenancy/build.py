"""Puts tenancy together from the settings: embedded for one server, or shared through Redis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from manyhats.config import Settings
from manyhats.tenancy.directory import TenantDirectory
from manyhats.tenancy.limiter import Limiter, MemoryLimiter
from manyhats.tenancy.limiter_redis import RedisLimiter
from manyhats.tenancy.store import TenantStore
from manyhats.tenancy.store_redis import RedisTenantStore
from manyhats.tenancy.store_sqlite import SqliteTenantStore
from manyhats.tenancy.usage import UsageLedger, UsageStore
from manyhats.tenancy.usage_redis import RedisUsageStore
from manyhats.tenancy.usage_sqlite import SqliteUsageStore


@dataclass(frozen=True, slots=True)
class Tenancy:
    """Who the tenants are, what they may have and what they used; ``close`` gives up the stores."""

    directory: TenantDirectory
    limiter: Limiter
    usage: UsageLedger
    close: Callable[[], None]


def open_tenancy(settings: Settings, path: Path) -> Tenancy:
    """In the SQLite file ``path`` and in memory, or where ``redis_url`` says.

    Raises ConfigError and ServiceError.
    """
    if settings.redis_url is None:
        return _embedded(settings, path)
    url = settings.redis_url.get_secret_value()
    shared, kept = RedisTenantStore(url), RedisUsageStore(url)
    usage = UsageLedger(kept, days=settings.usage_days)
    return Tenancy(TenantDirectory(shared), RedisLimiter(url), usage, _closing(shared, kept))


def _embedded(settings: Settings, path: Path) -> Tenancy:
    path.parent.mkdir(parents=True, exist_ok=True)
    embedded, kept = SqliteTenantStore(path), SqliteUsageStore(path)
    usage = UsageLedger(kept, days=settings.usage_days)
    limiter = MemoryLimiter(used_today=usage.tokens_today())
    return Tenancy(TenantDirectory(embedded), limiter, usage, _closing(embedded, kept))


def _closing(*stores: TenantStore | UsageStore) -> Callable[[], None]:
    def close() -> None:
        for store in stores:
            store.close()

    return close
