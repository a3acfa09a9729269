"""Registering, listing, finding and deleting adapters: store, registry and residency as one.

A registration is staged, copied, compiled (which is the validation), committed to the store, and
entered in the registry last: until then nothing of it can be seen, and a failure leaves nothing.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path

from manyhats.adapters.files import AdapterLimits, locate
from manyhats.adapters.staging import Staging
from manyhats.adapters.store import AdapterStore
from manyhats.errors import (
    AdapterRejectedError,
    ConflictError,
    ModelNotFoundError,
    PermissionDeniedError,
)
from manyhats.lifecycle.audit import Cause
from manyhats.lifecycle.collector import Collector, Retention
from manyhats.lifecycle.compositions import (
    BASE_DIGEST,
    NamedComposition,
    resolve_composition,
)
from manyhats.lifecycle.directory import AdapterCard
from manyhats.lifecycle.loading import Compile, Residency, Tiers, load_lanes
from manyhats.lifecycle.names import NearNames
from manyhats.lifecycle.records import (
    Entry,
    Registration,
    card_of,
    check_name,
    split_version,
)
from manyhats.lifecycle.registry import Registry
from manyhats.lifecycle.rollouts import Rollouts
from manyhats.lifecycle.routes import BASELINE, RouteHint, Side, drawn
from manyhats.types import AdapterRef, TenantId

logger = logging.getLogger(__name__)


class AdapterService:
    """The adapters of one server; implements ``AdapterDirectory``. Thread-safe.

    ``roots`` are the folders that may be registered from, ``limits`` bounds an adapter,
    ``base_id`` is the base's own name. ``resolve``, ``list``, ``get``, ``visible`` and
    ``entry`` answer from memory; the others block on the disk and belong on a worker thread.
    ``rollouts`` changes which version a name means, ``collector`` removes what has had its time,
    ``retention``.
    """

    def __init__(
        self,
        *,
        store: AdapterStore,
        registry: Registry,
        compile_folder: Compile,
        residency: Residency,
        base_id: str,
        roots: Sequence[Path],
        limits: AdapterLimits,
        retention: Retention | None = None,
    ) -> None:
        self._store = store
        self._registry = registry
        self._compile = compile_folder
        self._tiers = Tiers(residency)
        self._base_id = base_id
        self._roots = tuple(roots)
        self._limits = limits
        self._compiling = threading.Lock()  # the memory of one adapter at a time
        self._changing = threading.Lock()  # store and registry change together
        self._near: tuple[tuple[int, int, TenantId], NearNames] | None = None
        self.rollouts = Rollouts(registry, self.entry)
        self.collector = Collector(store, registry, retention or Retention())
        self.collector.drop = self._tiers.drop
        registry.follow(self._tiers.follow)
        self.collector.sweep()

    def resolve(
        self, model: str, tenant: TenantId, hint: RouteHint | None = None
    ) -> AdapterRef | None:
        """The version that ``model`` means now; None for the base. Raises ModelNotFoundError."""
        if model == self._base_id:
            return None
        name, version = split_version(model)
        entry = self._registry.entry(name)
        if entry is None or not self._registry.may_use(entry, tenant):
            raise self._not_found(model, tenant)
        if version is None:
            version = self._routed(entry, hint or RouteHint(side=Side.STABLE))
            if version == BASELINE:
                return None
        record = entry.find(version)
        if record is None or record.retired:
            raise self._not_found(model, tenant)
        return record.ref

    def list(self, tenant: TenantId) -> list[AdapterCard]:
        """Every version that the tenant may ask for, by name, oldest first."""
        return [
            card_of(entry, record)
            for entry in self._registry.entries()
            if self._registry.may_use(entry, tenant)
            for record in entry.versions
            if not record.retired
        ]

    def get(self, model: str, tenant: TenantId) -> AdapterCard:
        """``name@version``, or a name's stable version (its newest where the base answers for it).

        Raises ModelNotFoundError.
        """
        name, version = split_version(model)
        entry = self.visible(name, tenant)
        if version is None:
            version = entry.route.stable or entry.versions[-1].ref.version
        record = entry.find(version)
        if record is None:
            raise self._not_found(model, tenant)
        return card_of(entry, record)

    def visible(self, name: str, tenant: TenantId) -> Entry:
        """A name that the tenant may use, all its versions. Raises ModelNotFoundError."""
        entry = self._registry.entry(name)
        if entry is None or not self._registry.may_use(entry, tenant):
            raise self._not_found(name, tenant)
        return entry

    def entry(self, name: str, tenant: TenantId) -> Entry:
        """The same of a name that is the tenant's own: what a change needs."""
        entry = self._registry.entry(name)
        if entry is None or entry.owner != tenant:
            plain, version = split_version(name)
            if version is not None:
                self.entry(plain, tenant)  # raises where that is none either
                raise ModelNotFoundError(
                    f"{name} is a version: give the name alone here ({plain}), and the version "
                    f"({version}) in its own field",
                    param="name",
                )
            raise self._not_found(name, tenant)
        return entry

    def register_folder(
        self,
        name: str,
        folder: str,
        *,
        tenant: TenantId,
        source: str | None = None,
        registration: Registration | None = None,
    ) -> AdapterCard:
        """Register the adapter in ``folder``, which must lie in an allowed root.

        The same content under the same name again is the version that is there already, and the
        route stays. ``source`` (default: the folder) is kept with the version. Raises RequestError
        (the name), AdapterRejectedError, ConflictError, ServiceError.
        """
        self.check(name)
        if not self._roots:
            raise AdapterRejectedError(
                "path_not_allowed",
                "no folder may be registered from; start the server with --adapter-root",
                param="path",
            )
        files = locate(Path(folder), self._roots)
        with self.stage() as staging:
            staging.copy(files.config_path, files.weights_path)
            return self.register_staged(
                name,
                staging,
                tenant=tenant,
                source=source or folder,
                registration=registration,
            )

    def stage(self) -> AbstractContextManager[Staging]:
        """Room for an upload; gone at the block's end. Raises ServiceError (the disk)."""
        return self._store.stage(self._limits.max_bytes)

    def register_staged(
        self,
        name: str,
        staging: Staging,
        *,
        tenant: TenantId,
        source: str,
        registration: Registration | None = None,
    ) -> AdapterCard:
        """Register what was written to ``staging``; else as ``register_folder``."""
        self.check(name)
        staging.check_complete()
        with self._compiling:
            compiled = self._compile(staging.folder)
            family, max_rank, nbytes = compiled.family, compiled.max_rank, compiled.nbytes
            virtual_tokens = compiled.virtual_tokens
            told = (registration or Registration()).noting(compiled.conversion)
            del compiled
        with self._changing, ExitStack() as undo:
            with self._store.adding():
                digest = self._store.commit(staging)
                undo.callback(self.collector.discard, [digest])  # once nobody is adding any more
                ref = self._registry.add(
                    name,
                    digest,
                    tenant=tenant,
                    family=family,
                    max_rank=max_rank,
                    nbytes=nbytes,
                    source=source,
                    virtual_tokens=virtual_tokens,
                    registration=told,
                )
                undo.pop_all()
            self._tiers.back(ref)
            card = self.get(str(ref), tenant)
        logger.info("adapter %s is registered: digest %s, from %s", ref, digest, source)
        return card

    def register_composition(
        self,
        name: str,
        wanted: NamedComposition,
        *,
        tenant: TenantId,
        source: str | None = None,
        registration: Registration | None = None,
    ) -> AdapterCard:
        """Register adapters worn as one, pinned to the versions that their names mean now.

        Raises RequestError, ModelNotFoundError, PermissionDeniedError (another tenant's member),
        AdapterRejectedError (not to be composed), ConflictError, AdapterLoadError, ServiceError.
        """
        self.check(name)
        resolve = partial(self.resolve, tenant=tenant)
        ref = resolve_composition(wanted, resolve, "composition")
        if ref.composition is None:
            raise ValueError(f"{ref} is no composition")
        self._check_owned(ref.composition.members, tenant)
        with self._compiling:
            worn = load_lanes(self._store, self._compile, ref, self._limits)
            sizes = [(compiled.max_rank, compiled.nbytes) for compiled in worn]
        with self._changing:
            for member in ref.composition.members:
                # raises where it was deleted meanwhile
                if member.digest != BASE_DIGEST and resolve(str(member)) != member:
                    raise ConflictError(f"{member} has changed meanwhile", param="composition")
            added = self._registry.add(
                name,
                ref.digest,
                tenant=tenant,
                family=ref.composition.kind.value,
                max_rank=max((rank for rank, _ in sizes), default=0),
                nbytes=sum(nbytes for _, nbytes in sizes),
                source=source or ref.name,
                virtual_tokens=ref.virtual_tokens,
                composition=ref.composition,
                registration=registration,
            )
            self._tiers.back(added)
            card = self.get(str(added), tenant)
        logger.info("composition %s is registered: %s", added, ref.name)
        return card

    def _check_owned(self, members: Sequence[AdapterRef], tenant: TenantId) -> None:
        """Pinned members outlive a grant and hold up their owner: only one's own may be pinned."""
        for member in members:
            if member.digest == BASE_DIGEST:
                continue
            if self.visible(member.name, tenant).owner != tenant:
                raise PermissionDeniedError(
                    f"composition: {member} is another tenant's; name it in the request instead",
                    param="composition",
                )

    def check(self, name: str) -> None:
        """What can be said before a byte is read. Raises RequestError or ConflictError."""
        check_name(name)
        if name == self._base_id:
            raise ConflictError(f"name {name!r} is the base model's id", param="name")

    def prefetch(self, ref: AdapterRef) -> None:
        """Start to bring a version to the host tier."""
        self._tiers.prefetch(ref)

    def delete(
        self, model: str, tenant: TenantId, *, force: bool = False, cause: Cause | None = None
    ) -> tuple[AdapterRef, ...]:
        """Remove every version of a name, or ``name@version`` alone, and return them.

        New requests are refused from now on; those that hold a lease keep the copy on the device
        until they end. Bytes that another version refers to stay. What is refused unless ``force``:
        see ``Registry.delete``. Raises ModelNotFoundError, ConflictError, ServiceError.
        """
        name, version = split_version(model)
        with self._changing:
            entry = self.entry(name, tenant)
            if version is not None and entry.find(version) is None:
                raise self._not_found(model, tenant)
            gone = self._registry.delete(name, version, force=force, cause=cause)
            refs = tuple(record.ref for record in gone)
            unused = {r.digest: r for r in refs if not self._registry.uses(r.digest)}
            try:
                self.collector.discard(unused)  # first, so that nothing can be loaded again
            finally:
                for ref in unused.values():
                    self._tiers.drop(ref)
        logger.info("deleted adapter %s (%d versions)", model, len(refs))
        return refs

    def _routed(self, entry: Entry, hint: RouteHint) -> int:
        """The version that a request for the name gets, or BASELINE."""
        canary = entry.route.canary
        if canary is None or hint.side is not None:
            return entry.route.target(hint, draw=0.0)
        sticky = hint.sticky or secrets.token_hex(16)
        draw = drawn(self._registry.draw_key, entry.name, canary.version, sticky)
        return entry.route.target(hint, draw=draw)

    def _not_found(self, model: str, tenant: TenantId) -> ModelNotFoundError:
        message = f"no model or adapter {model[:140]!r}"
        name, at, _ = model.partition("@")
        entry = self._registry.entry(name) if at else None
        usable = entry is not None and self._registry.may_use(entry, tenant)
        known = [r for r in entry.versions if not r.retired] if entry and usable else []
        if known:
            newest = ", ".join(str(r.ref) for r in reversed(known[-5:]))
            return ModelNotFoundError(f"{message}; the newest of it: {newest}", param="model")
        near = self._near_names(tenant).near(model)
        hint = f"; near names: {', '.join(near)}" if near else f"; the base is {self._base_id}"
        return ModelNotFoundError(message + hint, param="model")

    def _near_names(self, tenant: TenantId) -> NearNames:
        state = (self._registry.generation, self._registry.access.revision, tenant)
        near = self._near
        if near is None or near[0] != state:
            names = {record.ref.name for record in self._registry.list(tenant)}
            near = self._near = (state, NearNames({*names, self._base_id}))
        return near[1]
