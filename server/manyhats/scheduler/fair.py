"""How tenants share the engine: virtual token counters.

Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), algorithms 2 and 4. Each
tenant has a counter of the service that it got, divided by its weight::

    counter += (input_price * prompt tokens) / weight     at the first admission of a sequence
    counter += output_price / weight                      for each token generated

and the waiting tenant with the least counter is served next. So nothing is held back for a tenant
that does not ask (the policy is work-conserving), and nothing is known beforehand about how long an
answer will be. A tenant that comes to wait is lifted to the least counter of those that wait: what
it did not use while it was away gives it no lead, and nobody's lead over it is held against it.

Two tenants of equal weight that both wait from time s to time t get service within

    2 * max(input_price * longest prompt, output_price * M)

of each other (theorem 4.4), where M is the number of tokens, prompts and outputs, that those
admitted at one time may come to together. A sequence that is computed again after a preemption is
not charged again. One of an ensemble is charged for each of its lanes, as each is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from manyhats.types import TenantId

_REMEMBERED: Final = 4096
"""Counters of tenants that do not wait are forgotten beyond this many, where they say nothing."""


@dataclass(frozen=True, slots=True)
class Share:
    """A tenant's part. ``weight`` (over 0) is relative to the others' of the same ``priority``.

    A tenant waits for all of a higher priority: nothing of them could be admitted when its turn
    comes. Within one priority the counters decide.
    """

    weight: float = 1.0
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Prices:
    """What a token costs. The paper's: an output token costs twice an input token."""

    input: float = 1.0
    output: float = 2.0


EVEN: Final = Share()
"""Every tenant alike."""

SharesOf = Callable[[TenantId], Share]
"""A tenant's share now; quick, called on the step loop's thread."""


def all_alike(_tenant: TenantId) -> Share:
    """``SharesOf`` where no tenant is configured."""
    return EVEN


class FairShares:
    """The counters. Confined to the step loop's thread; each call costs little but ``enter``, which
    looks at every tenant that waits.
    """

    def __init__(self, shares: SharesOf = all_alike, prices: Prices | None = None) -> None:
        self._shares = shares
        self._prices = prices or Prices()
        self._counters: dict[TenantId, float] = {}
        self._priorities: dict[TenantId, int] = {}  # as of the tenant's last lift
        self._last: dict[int, TenantId] = {}  # by priority, who stopped waiting last

    def counter(self, tenant: TenantId) -> float:
        """The service that the tenant is taken to have had, in prices over weight."""
        return self._counters.get(tenant, 0.0)

    def enter(self, tenant: TenantId, waiting: Collection[TenantId]) -> None:
        """The tenant, which did not wait, now does, beside those ``waiting``: lift its counter."""
        priority = self._shares(tenant).priority
        others = [
            self.counter(t) for t in waiting if t != tenant and self._priorities[t] == priority
        ]
        last = self._last.get(priority)
        floor = min(others) if others else self.counter(last) if last is not None else 0.0
        self._counters[tenant] = max(self.counter(tenant), floor)
        self._priorities[tenant] = priority
        if len(self._counters) > _REMEMBERED + len(waiting):
            self._forget({*waiting, tenant})

    def leave(self, tenant: TenantId) -> None:
        """The tenant waits no longer; what it runs is still charged."""
        self._last[self._priorities[tenant]] = tenant

    def charge_prompt(self, tenant: TenantId, tokens: int) -> None:
        """A sequence with a prompt of ``tokens`` was admitted for the first time."""
        self._charge(tenant, self._prices.input * tokens)

    def charge_output(self, tenant: TenantId, tokens: int = 1) -> None:
        """``tokens`` were generated."""
        self._charge(tenant, self._prices.output * tokens)

    def rank(self, tenant: TenantId, waiting: Collection[TenantId]) -> tuple[int, float]:
        """What a waiting tenant is sorted by, least first.

        One whose priority was changed meanwhile is lifted anew, among its new equals.
        """
        if self._shares(tenant).priority != self._priorities[tenant]:
            self.leave(tenant)
            self.enter(tenant, waiting)
        return -self._priorities[tenant], self._counters[tenant]

    def _charge(self, tenant: TenantId, price: float) -> None:
        self._counters[tenant] = self.counter(tenant) + price / self._shares(tenant).weight

    def _forget(self, waiting: Collection[TenantId]) -> None:
        """Drop the counters that the next lift would raise anyway."""
        kept = {*waiting, *self._last.values()}
        floors = {p: self.counter(t) for p, t in self._last.items()}
        for tenant in kept:
            priority = self._priorities.get(tenant, 0)
            floors[priority] = min(floors.get(priority, 0.0), self.counter(tenant))
        for tenant in [t for t in self._counters if t not in kept]:
            if self._counters[tenant] <= floors.get(self._priorities.get(tenant, 0), 0.0):
                del self._counters[tenant]
                self._priorities.pop(tenant, None)
