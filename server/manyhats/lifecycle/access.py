"""Who may use, and know of, whose adapters: the question that every look-up of a name asks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from manyhats.errors import PermissionDeniedError
from manyhats.types import TenantId


class Access(Protocol):
    """Answers from memory. Thread-safe. ``tenancy.directory.TenantDirectory`` satisfies it."""

    @property
    def revision(self) -> int:
        """Another number after every change."""

    def may_use(self, name: str, owner: TenantId, tenant: TenantId) -> bool:
        """Whether ``tenant`` may use the adapters of ``name``, which ``owner`` has."""

    def adapter_bounds(self, tenant: TenantId) -> tuple[int | None, int | None]:
        """Versions that the tenant may have registered, and their bytes; None: no bound."""

    def forget(self, name: str) -> None:
        """The name is about to go, and with it what was said of it. May block on a store."""


class OwnersOnly:
    """``Access`` where nobody shares."""

    @property
    def revision(self) -> int:
        """Never another."""
        return 0

    def may_use(self, name: str, owner: TenantId, tenant: TenantId) -> bool:
        """Its owner alone."""
        return owner == tenant

    def adapter_bounds(self, tenant: TenantId) -> tuple[int | None, int | None]:
        """None at all."""
        return None, None

    def forget(self, name: str) -> None:
        """Nothing was said of it."""


def check_quota(access: Access, tenant: TenantId, owned: Iterable[int], nbytes: int) -> None:
    """Raises PermissionDeniedError where one version more, of ``nbytes`` bytes, would be over what
    the tenant may have; ``owned`` are the bytes of each that it has.
    """
    versions, size = access.adapter_bounds(tenant)
    if versions is None and size is None:
        return
    sizes = [*owned, nbytes]
    for quota, limit, wanted in (
        ("adapters", versions, len(sizes)),
        ("adapter_bytes", size, sum(sizes)),
    ):
        if limit is not None and wanted > limit:
            raise PermissionDeniedError(
                f"{quota}: tenant {tenant!r} would have {wanted}, its quota is {limit}; delete "
                "some first",
                param=quota,
            )
