"""What a backup has of drift detection: what was said and done about names.

That is their policies, and what these go by: the latch, without which an automatic change could
follow another one at once, and the outcomes of evaluations. References, windows and alarms are of
requests that are over; they are made anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from manyhats.drift.store import DriftStore

_PREFIXES: Final = ("latch/", "policy/", "validation/")


class NameRecords:
    """Implements ``lifecycle.backup.Records`` over ``store``, whose it is to be closed.

    Every call may block and raises ServiceError.
    """

    def __init__(self, store: DriftStore) -> None:
        self._store = store

    def read(self) -> dict[str, str]:
        """All of them, by the store's keys."""
        found: dict[str, str] = {}
        for prefix in _PREFIXES:
            found |= self._store.items(prefix)
        return found

    def replace(self, texts: Mapping[str, str]) -> None:
        """Put ``texts`` in the place of all that are there: one after the other, a name's latch
        before its policy.
        """
        for key in self.read().keys() - texts.keys():
            self._store.remove(key)
        for key in sorted(texts):
            self._store.put(key, texts[key])
