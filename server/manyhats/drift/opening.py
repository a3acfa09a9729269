"""Opens what drift detection keeps of a base where the settings say."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from manyhats.config import Settings
from manyhats.drift.store import DriftStore
from manyhats.drift.store_sqlite import SqliteDriftStore

FILE_NAME: Final = "drift.sqlite"
"""In the base's folder."""


def open_store(settings: Settings, path: Path) -> DriftStore:
    """The SQLite file ``path``, or where ``redis_url`` says, by the name of the file's folder.

    Raises ConfigError.
    """
    if settings.redis_url is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        return SqliteDriftStore(path)
    from manyhats.drift.store_redis import RedisDriftStore  # redis only where it is used

    return RedisDriftStore(settings.redis_url.get_secret_value(), path.parent.name)
