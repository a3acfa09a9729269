"""Opens a base's registry and its adapters' bytes where the settings say: for one server, or for
replicas that share them.
"""

from __future__ import annotations

from manyhats.adapters.store import AdapterStore
from manyhats.config import Settings
from manyhats.lifecycle.access import Access
from manyhats.lifecycle.collector import Retention
from manyhats.lifecycle.registry import Registry
from manyhats.lifecycle.store import RegistryStore
from manyhats.lifecycle.store_sqlite import SqliteRegistryStore

_DAY_S = 86400.0


def open_store(settings: Settings, base_id: str, *, exclusive: bool = True) -> RegistryStore:
    """The store of one base's registry: its SQLite file, or where ``redis_url`` says.

    ``exclusive``: see ``SqliteRegistryStore``. Raises ConfigError, ServiceError.
    """
    if settings.redis_url is None:
        return SqliteRegistryStore(settings.registry_file(base_id), exclusive=exclusive)
    from manyhats.lifecycle.store_redis import RedisRegistryStore  # redis only where it is used

    folder = settings.base_folder(base_id).name
    return RedisRegistryStore(settings.redis_url.get_secret_value(), folder)


def open_registry(settings: Settings, base_id: str, access: Access, base_digest: str) -> Registry:
    """The registry of one base. Raises ConfigError, ServiceError."""
    store = open_store(settings, base_id)
    bound = settings.max_adapters
    return Registry(store, max_versions=bound, access=access, base_digest=base_digest)


def open_adapters(settings: Settings, base_id: str) -> AdapterStore:
    """The bytes of one base's adapters. Raises ServiceError."""
    return AdapterStore(settings.adapter_folder(base_id))


def retention(settings: Settings) -> Retention:
    """How long what no request can be routed to is kept."""
    days = settings.keep_retired_days
    return Retention(None if days is None else days * _DAY_S, settings.keep_deleted_s)
