"""The tenants and keys of a server: a snapshot in memory answers, a store keeps.

The way of a request touches neither disk nor network. Where replicas share the store, ``refresh``
brings what the others wrote; ``keep_fresh`` calls it twice a second. While the store cannot be
reached the last snapshot goes on answering, which is logged.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from manyhats.errors import ConflictError, NotFoundError, ServiceError
from manyhats.tenancy.keys import id_of, matches, new_key
from manyhats.tenancy.model import ApiKey, Grant, Quotas, Role, Tenant
from manyhats.tenancy.repeating import repeating
from manyhats.tenancy.store import Change, Kind, StaleRevisionError, TenantStore
from manyhats.types import DEFAULT_TENANT

logger = logging.getLogger(__name__)

_INTERVAL_S: Final = 0.5
_TRIES: Final = 20


@dataclass(frozen=True, slots=True)
class State:
    """One revision of the records. The default tenant is always there."""

    revision: int = 0
    tenants: Mapping[str, Tenant] = field(default_factory=dict)
    keys: Mapping[str, ApiKey] = field(default_factory=dict)
    grants: Mapping[str, Grant] = field(default_factory=dict)


class TenantDirectory:
    """Reads answer from memory; writes block on the store. Thread-safe.

    ``clock`` gives Unix seconds. Raises what the store raises.
    """

    def __init__(self, store: TenantStore, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._reading = threading.Lock()
        self._state = self._read()
        self._unreachable = False

    # -- what the snapshot says

    @property
    def revision(self) -> int:
        """Grows with every change that is known here."""
        return self._state.revision

    @property
    def reachable(self) -> bool:
        """Whether the store answered last; while it does not, the snapshot is that known last."""
        return not self._unreachable

    @property
    def has_keys(self) -> bool:
        """Whether a key was ever issued (revoked and expired ones count: the door stays shut)."""
        return bool(self._state.keys)

    @property
    def key_counts(self) -> tuple[int, int]:
        """(Issued keys that can be used now, all that were ever issued)."""
        now, issued = self._clock(), self._state.keys.values()
        return sum(key.usable(now) for key in issued), len(issued)

    def tenant(self, ident: str) -> Tenant:
        """One tenant. Raises NotFoundError."""
        found = self._state.tenants.get(ident)
        if found is None:
            raise NotFoundError(f"no tenant {ident[:80]!r}", param="tenant")
        return found

    def find(self, ident: str) -> Tenant | None:
        """One tenant, None where there is none of that id."""
        return self._state.tenants.get(ident)

    def quotas(self, ident: str) -> Quotas:
        """What the tenant may have; one that is gone meanwhile has no bound of its own."""
        found = self.find(ident)
        return found.quotas if found is not None else Quotas()

    def adapter_bounds(self, tenant: str) -> tuple[int | None, int | None]:
        """Versions that the tenant may have registered, and their bytes together."""
        quotas = self.quotas(tenant)
        return quotas.adapters, quotas.adapter_bytes

    def tenants(self) -> list[Tenant]:
        """Every tenant, by id."""
        return [tenant for _, tenant in sorted(self._state.tenants.items())]

    def keys(self, tenant: str) -> list[ApiKey]:
        """The keys that were issued to the tenant, oldest first. Raises NotFoundError."""
        self.tenant(tenant)
        mine = (key for key in self._state.keys.values() if key.tenant == tenant)
        return sorted(mine, key=lambda key: (key.created, key.id))

    def has_role(self, role: Role) -> bool:
        """Whether a usable key has the role or more."""
        now = self._clock()
        return any(k.usable(now) and k.role.covers(role) for k in self._state.keys.values())

    def authenticate(self, token: bytes) -> ApiKey | None:
        """The usable key that ``token`` is, None for any other token."""
        ident = id_of(token)
        found = self._state.keys.get(ident) if ident is not None else None
        matched = matches(found.digest if found is not None else None, token)
        return found if matched and found is not None and found.usable(self._clock()) else None

    def grant(self, name: str, owner: str) -> Grant | None:
        """Who may use the adapters of ``name`` beside ``owner``; None: nobody."""
        found = self._state.grants.get(name)
        return found if found is not None and found.owner == owner else None

    def may_use(self, name: str, owner: str, tenant: str) -> bool:
        """Whether ``tenant`` may use, and know of, the adapters of ``name`` that ``owner`` has."""
        if tenant == owner:
            return True
        found = self._state.grants.get(name)
        return found is not None and found.admits(owner, tenant)

    # -- changes, each in the store when it returns

    def create(self, tenant: Tenant) -> Tenant:
        """A new tenant. Raises ConflictError where it is there already."""

        def change(state: State) -> Sequence[Change]:
            if tenant.id in state.tenants:
                raise ConflictError(f"tenant {tenant.id!r} exists already", param="id")
            return [_set(Kind.TENANT, tenant.id, tenant)]

        self._change(change)
        return tenant

    def update(self, tenant: Tenant) -> Tenant:
        """Other settings for a tenant. Raises NotFoundError."""

        def change(state: State) -> Sequence[Change]:
            self._known(state, tenant.id)
            return [_set(Kind.TENANT, tenant.id, tenant)]

        self._change(change)
        return tenant

    def delete(self, ident: str) -> None:
        """Remove a tenant and revoke its keys.

        Raises NotFoundError, ConflictError (the default tenant).
        """

        def change(state: State) -> Sequence[Change]:
            self._known(state, ident)
            if ident == DEFAULT_TENANT:
                raise ConflictError(f"tenant {ident!r} is always there", param="id")
            mine = [k for k in state.keys.values() if k.tenant == ident and k.revoked is None]
            return [Change(Kind.TENANT, ident, None), *self._revoked(mine), *_without(state, ident)]

        self._change(change)

    def issue(
        self, tenant: str, role: Role, *, lifetime_s: int | None = None, note: str = ""
    ) -> tuple[ApiKey, str]:
        """A new key and its record; the key can never be had again. Raises NotFoundError."""
        record, key = self._new(tenant, role, lifetime_s, note)

        def change(state: State) -> Sequence[Change]:
            self._known(state, tenant)
            return [_set(Kind.KEY, record.id, record)]

        self._change(change)
        return record, key

    def rotate(self, ident: str, *, grace_s: int = 0) -> tuple[ApiKey, str]:
        """A new key in the place of ``ident``, which ends after ``grace_s``; both in one write.

        Tenant, role, note and length of life are the old one's. Raises NotFoundError, ConflictError
        (revoked or expired).
        """
        made: list[tuple[ApiKey, str]] = []

        def change(state: State) -> Sequence[Change]:
            old, now = self._key(state, ident), self._clock()
            if not old.usable(now):
                raise ConflictError(f"key {ident!r} is revoked or expired: issue a new one")
            life = None if old.expires is None else old.expires - old.created
            made[:] = [self._new(old.tenant, old.role, life, old.note)]
            ends = int(now) + grace_s
            if old.expires is not None:
                ends = min(old.expires, ends)
            done = {"expires": ends} if grace_s else {"revoked": int(now)}
            new = made[0][0]
            old = old.model_copy(update=done)
            return [_set(Kind.KEY, old.id, old), _set(Kind.KEY, new.id, new)]

        self._change(change)
        return made[0]

    def revoke(self, ident: str) -> ApiKey:
        """The key opens nothing from now on; revoking it again changes nothing. NotFoundError."""

        def change(state: State) -> Sequence[Change]:
            key = self._key(state, ident)
            return [] if key.revoked is not None else self._revoked([key])

        self._change(change)
        return self._state.keys[ident]

    def share(self, grant: Grant) -> Grant:
        """Let others use a name. Raises NotFoundError for a tenant that is not there."""

        def change(state: State) -> Sequence[Change]:
            for tenant in (grant.owner, *grant.shared_with):
                self._known(state, tenant)
            return [_set(Kind.GRANT, grant.name, grant)]

        self._change(change)
        return grant

    def forget(self, name: str) -> None:
        """The name is gone: should it come back, it is its owner's alone."""

        def change(state: State) -> Sequence[Change]:
            return [Change(Kind.GRANT, name, None)] if name in state.grants else []

        self._change(change)

    # -- keeping up with the store

    def refresh(self) -> None:
        """Take over what others wrote. Raises ServiceError."""
        if self._store.revision() != self._state.revision:
            self._take(self._read())

    @contextmanager
    def keep_fresh(self) -> Iterator[None]:
        """Refreshes on a thread of its own until the block ends; a failure is logged, once."""
        with repeating(self._try_refresh, _INTERVAL_S, "tenants"):
            yield

    def _try_refresh(self) -> None:
        try:
            self.refresh()
        except ServiceError as error:
            if not self._unreachable:
                logger.error("tenants and keys are those known last: %s", error.message)
            self._unreachable = True
        else:
            if self._unreachable:
                logger.info("the store of tenants answers again")
            self._unreachable = False

    def _change(self, changes: Callable[[State], Sequence[Change]]) -> None:
        """Write what ``changes`` makes of the newest state."""
        for _ in range(_TRIES):
            self.refresh()
            state = self._state
            wanted = changes(state)
            if not wanted:
                return
            try:
                self._store.write(state.revision, wanted)
            except StaleRevisionError:
                continue
            self.refresh()
            return
        raise ServiceError("the tenants are being changed by too many at once; try again")

    def _read(self) -> State:
        revision, texts = self._store.read()
        tenants = {i: Tenant.model_validate_json(t) for i, t in texts[Kind.TENANT].items()}
        tenants.setdefault(DEFAULT_TENANT, Tenant(id=DEFAULT_TENANT))
        found = {i: ApiKey.model_validate_json(t) for i, t in texts[Kind.KEY].items()}
        grants = {n: Grant.model_validate_json(t) for n, t in texts[Kind.GRANT].items()}
        return State(revision, tenants, found, grants)

    def _take(self, state: State) -> None:
        """Two threads may have read: the newer one counts."""
        with self._reading:
            if state.revision > self._state.revision:
                self._state = state

    def _new(
        self, tenant: str, role: Role, lifetime_s: int | None, note: str
    ) -> tuple[ApiKey, str]:
        ident, key, digest = new_key()
        now = int(self._clock())
        expires = None if lifetime_s is None else now + lifetime_s
        record = ApiKey(
            id=ident, tenant=tenant, role=role, digest=digest, created=now, expires=expires,
            note=note,
        )  # fmt: skip
        return record, key

    def _revoked(self, mine: Iterable[ApiKey]) -> list[Change]:
        done = {"revoked": int(self._clock())}
        return [_set(Kind.KEY, key.id, key.model_copy(update=done)) for key in mine]

    @staticmethod
    def _known(state: State, ident: str) -> None:
        if ident not in state.tenants:
            raise NotFoundError(f"no tenant {ident[:80]!r}", param="tenant")

    @staticmethod
    def _key(state: State, ident: str) -> ApiKey:
        if ident not in state.keys:
            raise NotFoundError(f"no key {ident[:80]!r}", param="key")
        return state.keys[ident]


def _set(kind: Kind, ident: str, record: Tenant | ApiKey | Grant) -> Change:
    return Change(kind, ident, record.model_dump_json())


def _without(state: State, tenant: str) -> list[Change]:
    """The grants without a tenant that goes: nobody of its id may come into what it was given."""
    changes = []
    for name, grant in state.grants.items():
        if grant.owner == tenant:
            changes.append(Change(Kind.GRANT, name, None))
        elif tenant in grant.shared_with:
            rest = tuple(t for t in grant.shared_with if t != tenant)
            changes.append(_set(Kind.GRANT, name, grant.model_copy(update={"shared_with": rest})))
    return changes
