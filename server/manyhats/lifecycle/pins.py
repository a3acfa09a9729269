"""Versions that stay on the device. A pin is part of its name's route: audited, and kept."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from manyhats.errors import ConflictError
from manyhats.lifecycle import routes
from manyhats.lifecycle.audit import Cause
from manyhats.lifecycle.records import Entry
from manyhats.lifecycle.registry import Registry
from manyhats.lifecycle.rollouts import Find
from manyhats.lifecycle.routes import BASELINE, Route
from manyhats.types import AdapterRef, Digest, TenantId


class Pinning(Protocol):
    """The device, as pins see it. Thread-safe; returns at once; twice is as good as once."""

    def pin(self, ref: AdapterRef) -> None:
        """Bring the version to the device as soon as there is room, and keep it there."""

    def unpin(self, ref: AdapterRef) -> None:
        """It may go again."""


class Pins:
    """The pins of one server's names. Thread-safe; ``pin`` and ``unpin`` block on the disk.

    At most ``bound`` versions are pinned together: one slot is left to all others.
    """

    def __init__(self, registry: Registry, find: Find, device: Pinning, *, bound: int) -> None:
        self._registry = registry
        self._find = find
        self._device = device
        self._bound = bound
        self._told: dict[Digest, AdapterRef] = {}
        self._telling = threading.Lock()

    def pin(self, name: str, tenant: TenantId, cause: Cause, version: int | None = None) -> Route:
        """Keep ``version`` (None: the stable one) on the device, now and after a restart.

        Raises ModelNotFoundError, ConflictError (it is retired, an ensemble, or too many are
        pinned), ServiceError (the disk).
        """

        def update(entry: Entry) -> Route:
            wanted = entry.ready(_version(entry, version))
            _check_single(entry, wanted)
            route = routes.with_pin(entry.route, wanted, pinned=True)
            others = [f"{e.name}@{v}" for e in self._registry.entries() for v in e.route.pinned]
            if route != entry.route and len(others) >= self._bound:
                raise ConflictError(
                    f"{len(others)} versions are pinned, of at most {self._bound} (slots - 1): "
                    f"{', '.join(others[:10])}",
                    param="version",
                )
            return route

        return self._change(name, tenant, "pin", cause, update)

    def unpin(self, name: str, tenant: TenantId, cause: Cause, version: int | None = None) -> Route:
        """Let ``version`` (None: the stable one) go again. Raises as ``pin``."""

        def update(entry: Entry) -> Route:
            return routes.with_pin(entry.route, _version(entry, version), pinned=False)

        return self._change(name, tenant, "unpin", cause, update)

    def sync(self) -> None:
        """Tell the device what the registry says: at start, and after every change."""
        with self._telling:
            wanted = {
                record.ref.digest: record.ref
                for entry in self._registry.entries()
                for record in entry.versions
                if record.ref.version in entry.route.pinned
            }
            for digest in self._told.keys() - wanted.keys():
                self._device.unpin(self._told[digest])
            for ref in wanted.values():  # again, since a deletion drops the pin on the device
                self._device.pin(ref)
            self._told = wanted

    def _change(
        self,
        name: str,
        tenant: TenantId,
        action: str,
        cause: Cause,
        update: Callable[[Entry], Route],
    ) -> Route:
        self._find(name, tenant)
        route = self._registry.change(name, action, cause, update)
        self.sync()
        return route


def _version(entry: Entry, version: int | None) -> int:
    wanted = entry.route.stable if version is None else version
    if wanted == BASELINE:
        raise ConflictError(f"the base answers for {entry.name!r}: which version?", param="version")
    return wanted


def _check_single(entry: Entry, version: int) -> None:
    """An ensemble is nothing on the device: its members are, each a version of its own."""
    record = entry.find(version)
    if record is not None and record.ref.is_ensemble:
        raise ConflictError(f"{record.ref} is an ensemble: pin its members", param="version")
