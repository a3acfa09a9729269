"""What each tenant has used of each adapter since the server started."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class UsageRow:
    """Requests that the engine took, and their tokens. ``adapter`` None: the bare base."""

    tenant: str
    adapter: str | None
    requests: int
    prompt_tokens: int
    output_tokens: int


class UsageLedger:
    """Counts in memory. Thread-safe. ``since`` is when it began, in Unix seconds.

    It has a row for each pair of tenant and adapter that was used, so it is bounded by who may use
    what.
    """

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self.since = int(clock())
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str | None], tuple[int, int, int]] = {}

    def add(self, tenant: str, adapter: str | None, prompt: int, output: int) -> None:
        """One request has ended."""
        with self._lock:
            requests, prompts, outputs = self._counts.get((tenant, adapter), (0, 0, 0))
            self._counts[tenant, adapter] = (requests + 1, prompts + prompt, outputs + output)

    def rows(self) -> list[UsageRow]:
        """What was counted so far, by tenant, then adapter, the bare base first."""
        with self._lock:
            counts = list(self._counts.items())
        rows = [UsageRow(tenant, adapter, *numbers) for (tenant, adapter), numbers in counts]
        return sorted(rows, key=lambda r: (r.tenant, r.adapter is not None, r.adapter or ""))
