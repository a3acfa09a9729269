"""Who may come in now: quotas kept in this server's memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from math import floor
from typing import Protocol

from manyhats.tenancy import quota
from manyhats.tenancy.model import Quotas
from manyhats.tenancy.quota import Account, Refusal


class Limiter(Protocol):
    """Keeps every tenant's account. Called on the event loop."""

    @property
    def reachable(self) -> bool:
        """Whether the shared store answered last; without one, always."""

    async def admit(
        self, tenant: str, request_id: str, quotas: Quotas, tokens: int
    ) -> Refusal | None:
        """Take what a request needs, or nothing; every admitted one must be settled."""

    async def start(self, tenant: str, request_id: str) -> None:
        """The request has had its first token."""

    async def settle(self, tenant: str, request_id: str, quotas: Quotas, unused: int) -> None:
        """The request has ended with so many of its reserved tokens unused."""

    async def close(self) -> None:
        """Give up connections, if there are any."""


class MemoryLimiter:
    """Implements ``Limiter`` for one server. ``clock`` gives Unix seconds.

    ``used_today``: tokens by tenant that count for today's quota, from before this process.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.time,
        used_today: Mapping[str, int] | None = None,
    ) -> None:
        self._clock = clock
        today = floor(clock() / quota.DAY_S)
        self._accounts: dict[str, Account] = {
            tenant: Account(day=today, day_tokens=tokens)
            for tenant, tokens in (used_today or {}).items()
        }

    @property
    def reachable(self) -> bool:
        """See Limiter: there is no store."""
        return True

    async def admit(
        self, tenant: str, request_id: str, quotas: Quotas, tokens: int
    ) -> Refusal | None:
        """See Limiter."""
        account = self._accounts.setdefault(tenant, Account())
        return quota.admit(account, quotas, request_id, tokens, self._clock())

    async def start(self, tenant: str, request_id: str) -> None:
        """See Limiter."""
        quota.start(self._accounts[tenant], request_id)

    async def settle(self, tenant: str, request_id: str, quotas: Quotas, unused: int) -> None:
        """See Limiter."""
        quota.settle(self._accounts[tenant], quotas, request_id, unused, self._clock())

    async def close(self) -> None:
        """See Limiter: there are none."""
