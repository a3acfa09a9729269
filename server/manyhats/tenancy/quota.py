"""Quotas as arithmetic: what a tenant may have, what it has, and when it may come back.

Requests and tokens a minute are token buckets: they hold a minute's worth, and fill as it passes. A
request reserves all the tokens that it may come to (prompts and ``max_tokens`` of every choice) and
gets back at its end what it did not use. A day is a day of UTC. No clock but the ``now`` passed in,
in Unix seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import floor
from typing import Final

from manyhats.tenancy.model import Quotas

MINUTE_S: Final = 60.0
DAY_S: Final = 86_400.0
SOON_S: Final = 1.0
"""When to come back where only another request's end makes room: nobody knows when that is."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A quota (a field of ``Quotas``) that a request would pass; ``wanted`` is what it asks for.

    ``retry_after_s`` None: it can never pass.
    """

    quota: str
    limit: int
    wanted: int
    retry_after_s: float | None


@dataclass(slots=True)
class Bucket:
    """What is left of a minute's worth; None: as much as it holds."""

    level: float | None = None
    at: float = 0.0

    def left(self, limit: int, now: float) -> float:
        """What is there at ``now``."""
        if self.level is None:
            return float(limit)
        return min(float(limit), self.level + max(0.0, now - self.at) * limit / MINUTE_S)

    def take(self, count: float, limit: int, now: float) -> None:
        """Take ``count``; a negative one gives back."""
        self.level = min(float(limit), self.left(limit, now) - count)
        self.at = max(self.at, now)


@dataclass(slots=True)
class Account:
    """What one tenant has: set and changed by ``admit``, ``start`` and ``settle`` alone."""

    requests: Bucket = field(default_factory=Bucket)
    tokens: Bucket = field(default_factory=Bucket)
    day: int = 0
    day_tokens: int = 0
    running: set[str] = field(default_factory=set)
    queued: set[str] = field(default_factory=set)


def impossible(quotas: Quotas, tokens: int) -> Refusal | None:
    """The quota that a request which may come to ``tokens`` passes whenever it comes."""
    for name in ("requests_per_minute", "concurrent_requests", "queued_requests"):
        if getattr(quotas, name) == 0:
            return Refusal(name, 0, 1, None)
    for name in ("tokens_per_minute", "tokens_per_day"):
        limit = getattr(quotas, name)
        if limit is not None and tokens > limit:
            return Refusal(name, limit, tokens, None)
    return None


def admit(
    account: Account, quotas: Quotas, request_id: str, tokens: int, now: float
) -> Refusal | None:
    """Take what the request needs, all of it; or nothing, and say which quota it would pass."""
    refusal = impossible(quotas, tokens) or _refusal(account, quotas, tokens, now)
    if refusal is not None:
        return refusal
    if quotas.requests_per_minute is not None:
        account.requests.take(1, quotas.requests_per_minute, now)
    if quotas.tokens_per_minute is not None:
        account.tokens.take(tokens, quotas.tokens_per_minute, now)
    today = floor(now / DAY_S)
    account.day_tokens = tokens + (account.day_tokens if account.day == today else 0)
    account.day = today
    account.running.add(request_id)
    account.queued.add(request_id)
    return None


def start(account: Account, request_id: str) -> None:
    """The request no longer waits: it has had its first token."""
    account.queued.discard(request_id)


def settle(account: Account, quotas: Quotas, request_id: str, unused: int, now: float) -> None:
    """The request has ended, however it did, with so many of its reserved tokens ``unused``."""
    account.running.discard(request_id)
    account.queued.discard(request_id)
    if quotas.tokens_per_minute is not None:
        account.tokens.take(-unused, quotas.tokens_per_minute, now)
    if account.day == floor(now / DAY_S):
        account.day_tokens = max(0, account.day_tokens - unused)


def _refusal(account: Account, quotas: Quotas, tokens: int, now: float) -> Refusal | None:
    for name, bucket, count in (
        ("requests_per_minute", account.requests, 1),
        ("tokens_per_minute", account.tokens, tokens),
    ):
        limit = getattr(quotas, name)
        missing = 0.0 if limit is None else count - bucket.left(limit, now)
        if missing > 0:
            return Refusal(name, limit, count, missing * MINUTE_S / limit)
    today = floor(now / DAY_S)
    used = account.day_tokens if account.day == today else 0
    if quotas.tokens_per_day is not None and used + tokens > quotas.tokens_per_day:
        midnight = (today + 1) * DAY_S - now
        return Refusal("tokens_per_day", quotas.tokens_per_day, tokens, midnight)
    for name, there in (
        ("concurrent_requests", len(account.running)),
        ("queued_requests", len(account.queued)),
    ):
        limit = getattr(quotas, name)
        if limit is not None and there >= limit:
            return Refusal(name, limit, 1, SOON_S)
    return None
