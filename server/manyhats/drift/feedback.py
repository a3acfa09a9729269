"""What people say of answers: matched with the request, which is remembered for a while."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from manyhats.errors import NotFoundError
from manyhats.types import AdapterRef, TenantId


@dataclass(frozen=True, slots=True)
class Answered:
    """Who asked, and what answered (None: the bare base)."""

    tenant: TenantId
    adapter: AdapterRef | None


@dataclass(frozen=True, slots=True)
class Feedback:
    """What somebody says of an answer: ``score`` from -1 to 1, ``label`` and ``comment`` freely."""

    request_id: str
    score: float
    label: str = ""
    comment: str = ""


class RecentRequests:
    """The latest ``size`` requests by id. Thread-safe."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Answered] = OrderedDict()

    def remember(self, request_id: str, answered: Answered) -> None:
        """A request has ended; the oldest one is forgotten for it."""
        with self._lock:
            self._kept[request_id] = answered
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)

    def find(self, request_id: str, tenant: TenantId) -> Answered:
        """Raises NotFoundError: no such request, forgotten already, or another tenant's."""
        with self._lock:
            found = self._kept.get(request_id)
        if found is None or found.tenant != tenant:
            raise NotFoundError(
                f"request_id: no request {request_id[:100]!r} of yours among the latest "
                f"{self._size}",
                param="request_id",
            )
        return found


def label_of(score: float) -> str:
    """``positive``, ``negative`` or ``neutral``: the sign of a score in [-1, 1]."""
    return "positive" if score > 0 else "negative" if score < 0 else "neutral"
