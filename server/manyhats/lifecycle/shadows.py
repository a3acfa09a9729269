"""Which requests a shadow runs beside."""

from __future__ import annotations

import random
from collections.abc import Callable

from manyhats.lifecycle.records import split_version
from manyhats.lifecycle.registry import Registry
from manyhats.types import AdapterRef, TenantId


class ShadowDirectory:
    """Samples requests by their names' routes. Thread-safe; touches no disk.

    ``draw`` gives a number in [0, 1).
    """

    def __init__(self, registry: Registry, draw: Callable[[], float] = random.random) -> None:
        self._registry = registry
        self._draw = draw

    def sample(self, model: str, tenant: TenantId, served: AdapterRef | None) -> AdapterRef | None:
        """The version that is to run beside a request for ``model``, which ``served`` answers.

        None: none is, this request is not in the sample, ``model`` names a version itself, or the
        shadow is what answers.
        """
        name, version = split_version(model)
        entry = None if version is not None else self._registry.entry(name)
        if entry is None or not self._registry.may_use(entry, tenant):
            return None
        shadow = entry.route.shadow
        if shadow is None or self._draw() * 100 >= shadow.percent:
            return None
        record = entry.find(shadow.version)
        usable = record is not None and not record.retired and record.ref != served
        return record.ref if record is not None and usable else None
