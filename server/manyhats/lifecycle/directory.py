"""What the API needs to know of the registered adapters: a name to a version, and the list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from manyhats.lifecycle.routes import RouteHint
from manyhats.types import AdapterRef, TenantId


@dataclass(frozen=True, slots=True)
class AdapterCard:
    """One registered adapter version as it is listed.

    ``family`` as trained (``lora``, ``rslora``); ``max_rank`` is the largest rank of any site;
    ``nbytes`` the bytes of its parts; ``created`` in Unix seconds; ``stable``: its name means it
    now, a canary aside.
    """

    ref: AdapterRef
    family: str
    max_rank: int
    nbytes: int
    created: int
    stable: bool = field(default=False, compare=False)


class AdapterDirectory(Protocol):
    """Names to immutable versions. Every call is quick, thread-safe and blocks on nothing."""

    def resolve(
        self, model: str, tenant: TenantId, hint: RouteHint | None = None
    ) -> AdapterRef | None:
        """The version that ``model`` (the base's id, a name, or ``name@version``) means now.

        ``hint`` says which side of a canary a request for a name gets; without it the stable one.
        None: the bare base. Raises ModelNotFoundError, whose message lists near names.
        """

    def list(self, tenant: TenantId) -> Sequence[AdapterCard]:
        """The versions that the tenant may ask for."""
