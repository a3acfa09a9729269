"""The records of tenancy, each with who sets it. They are kept as JSON, so fields only ever come
with a default.
"""

from __future__ import annotations

import enum
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

ID_PATTERN: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""What a tenant may be called: fit for a header, a label and a path."""


class Role(enum.StrEnum):
    """What a key may do; each may do all that those before it may.

    ``tenant`` uses models. ``operator`` runs the service: adapters, usage, metrics, of any tenant.
    ``admin`` also gives out tenants and keys.
    """

    TENANT = "tenant"
    OPERATOR = "operator"
    ADMIN = "admin"

    def covers(self, needed: Role) -> bool:
        """Whether this role may do what ``needed`` may."""
        order = list(Role)
        return order.index(self) >= order.index(needed)


class Record(BaseModel):
    """Base of every record: frozen, strict, no unknown field."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


_Bound = Annotated[int | None, Field(ge=0, le=2**53)]


class Quotas(Record):
    """What a tenant may have at most; None: no bound of its own.

    Tokens are those of prompts and answers. ``max_tokens`` bounds one answer; ``queued_requests``
    the requests that have had no token yet; ``adapters`` the versions that are registered and
    ``adapter_bytes`` their size together. ``priority`` bounds that of a request.
    """

    requests_per_minute: _Bound = None
    tokens_per_minute: _Bound = None
    tokens_per_day: _Bound = None
    concurrent_requests: _Bound = None
    queued_requests: _Bound = None
    max_tokens: Annotated[int | None, Field(ge=1, le=2**53)] = None
    adapters: _Bound = None
    adapter_bytes: _Bound = None
    priority: Annotated[int | None, Field(ge=-100, le=100)] = 0


class TenantSettings(Record):
    """What an admin sets of a tenant. ``weight`` and ``priority``: see ``scheduler.fair.Share``."""

    weight: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    quotas: Quotas = Quotas()


class Tenant(TenantSettings):
    """Who pays and who may see. ``id`` never changes."""

    id: Annotated[str, Field(pattern=f"^{ID_PATTERN}$")]


class Visibility(enum.StrEnum):
    """Who may use an adapter beside its owner: nobody, the tenants named, or everybody."""

    PRIVATE = "private"
    SHARED = "shared"
    PUBLIC = "public"


class Grant(Record):
    """Who may use the adapters of one name. Set by an operator for the tenant that owns it.

    It holds while the name is ``owner``'s: should another tenant get the name, it says nothing.
    """

    name: str
    owner: str
    visibility: Annotated[Visibility, Field(strict=False)]
    shared_with: Annotated[tuple[str, ...], Field(strict=False)] = ()

    def admits(self, owner: str, tenant: str) -> bool:
        """Whether ``tenant`` may use the name where ``owner`` has it."""
        if owner != self.owner:
            return False
        shared = self.visibility is Visibility.SHARED and tenant in self.shared_with
        return shared or self.visibility is Visibility.PUBLIC


class ApiKey(Record):
    """One issued key. The key itself is not kept: ``digest`` is the SHA-256 of it, in hex.

    ``created``, ``expires`` and ``revoked`` are Unix seconds; a revoked key stays, so that it is
    known why it is refused.
    """

    id: str
    tenant: str
    role: Annotated[Role, Field(strict=False)]
    digest: str
    created: int
    expires: int | None = None
    revoked: int | None = None
    note: str = ""

    def usable(self, now: float) -> bool:
        """Whether the key opens anything at ``now`` (Unix seconds)."""
        return self.revoked is None and (self.expires is None or now < self.expires)
