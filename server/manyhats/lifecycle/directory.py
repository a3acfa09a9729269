"""What the API needs to know of the registered adapters: a name to a version, and the list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from manyhats.types import AdapterRef, TenantId


@dataclass(frozen=True, slots=True)
class AdapterCard:
    """One registered adapter version as it is listed.

    ``family`` as trained (``lora``, ``rslora``); ``max_rank`` is the largest rank of any site;
    ``nbytes`` the bytes of its parts; ``created`` in Unix seconds.
    """

    ref: AdapterRef
    family: str
    max_rank: int
    nbytes: int
    created: int


class AdapterDirectory(Protocol):
    """Names to immutable versions. Every call is quick, thread-safe and blocks on nothing."""

    def resolve(self, model: str, tenant: TenantId) -> AdapterRef | None:
        """The version that ``model`` (the base's id, a name, or ``name@version``) means now.

        None: the bare base. Raises ModelNotFoundError, whose message lists near names.
        """

    def list(self, tenant: TenantId) -> Sequence[AdapterCard]:
        """The versions that the tenant may ask for."""
