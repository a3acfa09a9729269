"""Puts tenancy together from the settings: embedded for one server, or shared through Redis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from manyhats.config import Settings
from manyhats.tenancy.directory import TenantDirectory
from manyhats.tenancy.limiter import Limiter, MemoryLimiter
from manyhats.tenancy.store import TenantStore
from manyhats.tenancy.store_sqlite import SqliteTenantStore
from manyhats.tenancy.usage import UsageLedger, UsageStore
from manyhats.tenancy.usage_sqlite import SqliteUsageStore


@dataclass(frozen=True, slots=True)
class Tenancy:
    """Who the tenants are, what they may have and what they used; ``close`` gives up the stores."""

    directory: TenantDirectory
    limiter: Limiter
    usage: UsageLedger
    close: Callable[[], None]


def open_stores(settings: Settings, path: Path) -> tuple[TenantStore, UsageStore]:
    """Of tenants and of usage: the SQLite file ``path``, or where ``redis_url`` says.

    Raises ConfigError.
    """
    if settings.redis_url is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        return SqliteTenantStore(path), SqliteUsageStore(path)
    from manyhats.tenancy.store_redis import RedisTenantStore  # redis only where it is used
    from manyhats.tenancy.usage_redis import RedisUsageStore

    url = settings.redis_url.get_secret_value()
    return RedisTenantStore(url), RedisUsageStore(url)


def open_tenancy(settings: Settings, path: Path) -> Tenancy:
    """Over ``open_stores``, quotas in memory or in the same Redis.

    Raises ConfigError and ServiceError.
    """
    tenants, kept = open_stores(settings, path)
    usage = UsageLedger(kept, days=settings.usage_days)
    if settings.redis_url is None:
        limiter: Limiter = MemoryLimiter(used_today=usage.tokens_today())
    else:
        from manyhats.tenancy.limiter_redis import RedisLimiter

        limiter = RedisLimiter(settings.redis_url.get_secret_value())
    return Tenancy(TenantDirectory(tenants), limiter, usage, _closing(tenants, kept))


def _closing(*stores: TenantStore | UsageStore) -> Callable[[], None]:
    def close() -> None:
        for store in stores:
            store.close()

    return close
