"""Puts tenancy together from the settings: embedded for one server, or shared through Redis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from manyhats.config import Settings
from manyhats.tenancy.directory import TenantDirectory
from manyhats.tenancy.limiter import Limiter, MemoryLimiter
from manyhats.tenancy.limiter_redis import RedisLimiter
from manyhats.tenancy.store_redis import RedisTenantStore
from manyhats.tenancy.store_sqlite import SqliteTenantStore


@dataclass(frozen=True, slots=True)
class Tenancy:
    """Who the tenants are and what they may have; ``close`` gives up the store."""

    directory: TenantDirectory
    limiter: Limiter
    close: Callable[[], None]


def open_tenancy(settings: Settings, path: Path) -> Tenancy:
    """In the SQLite file ``path`` and in memory, or where ``redis_url`` says.

    Raises ConfigError and ServiceError.
    """
    if settings.redis_url is None:
        embedded = SqliteTenantStore(path)
        return Tenancy(TenantDirectory(embedded), MemoryLimiter(), embedded.close)
    url = settings.redis_url.get_secret_value()
    shared = RedisTenantStore(url)
    return Tenancy(TenantDirectory(shared), RedisLimiter(url), shared.close)
