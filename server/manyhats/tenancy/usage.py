"""What each tenant has used of each adapter on each day: counted in memory, added to a store."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from manyhats.errors import ServiceError
from manyhats.tenancy.quota import DAY_S
from manyhats.tenancy.repeating import repeating

logger = logging.getLogger(__name__)

FLUSH_S: Final = 5.0
"""How often what was counted is added to the store: so much of it kill -9 loses at most."""


class UsageKey(NamedTuple):
    """A day (UTC, counted from 1970), a tenant and an adapter's name; None: the bare base."""

    day: int
    tenant: str
    adapter: str | None


class Counts(NamedTuple):
    """Requests that the engine took, and their tokens; ``resident_s``: seconds that an adapter of
    the tenant's own was on a device.
    """

    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    resident_s: int = 0

    def plus(self, other: Counts) -> Counts:
        """The sum."""
        return Counts(*map(sum, zip(self, other, strict=True)))


Tally = Mapping[UsageKey, Counts]


@dataclass(frozen=True, slots=True)
class UsageRow:
    """See ``Counts``. ``adapter`` None: the bare base; ``nbytes``: what the versions of an adapter
    of the tenant's own take now.
    """

    tenant: str
    adapter: str | None
    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    resident_s: int = 0
    nbytes: int = 0


Sizes = Callable[[], Mapping[tuple[str, str | None], int]]
"""Bytes of adapters by owner and name."""


class UsageStore(Protocol):
    """Sums of counts. Thread-safe; every call may block and raises ServiceError."""

    def add(self, batch: str, tally: Tally, oldest: int) -> None:
        """Add all of ``tally``, or nothing, and forget what is before the day ``oldest``.

        A ``batch`` that was added already changes nothing: what failed may be sent again.
        """

    def read(self, since: int) -> Tally:
        """The sums of the days from ``since`` on."""

    def replace(self, tally: Tally) -> None:
        """Put ``tally`` in the place of all that is there."""

    def close(self) -> None:
        """Give up the file or the connections."""


class UsageLedger:
    """Counts in memory, and with ``store`` beyond this process. Thread-safe.

    It has a row for each day, tenant and adapter that was used, ``days`` of them, so it is bounded
    by who may use what. ``clock`` gives Unix seconds; ``sizes``, which may be set later, what
    adapters take now.
    """

    def __init__(
        self,
        store: UsageStore | None = None,
        *,
        days: int = 400,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.sizes: Sizes = dict
        self._clock = clock
        self._store = store
        self._days = days
        self._started = int(clock())
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._counts: dict[UsageKey, Counts] = {}
        self._batch: tuple[str, dict[UsageKey, Counts]] | None = None
        self._failing = False

    @property
    def since(self) -> int:
        """When the counts begin, Unix seconds: with the server, or with the oldest day kept."""
        oldest = int(DAY_S) * (self._today() - self._days + 1)
        return self._started if self._store is None else oldest

    def add(self, tenant: str, adapter: str | None, prompt: int, output: int) -> None:
        """One request has ended."""
        self._count(tenant, adapter, Counts(1, prompt, output))

    def occupied(self, tenant: str, adapter: str, seconds: int) -> None:
        """An adapter of the tenant's own was on a device for so long."""
        self._count(tenant, adapter, Counts(resident_s=seconds))

    def _count(self, tenant: str, adapter: str | None, counts: Counts) -> None:
        key = UsageKey(self._today(), tenant, adapter)
        with self._lock:
            self._counts[key] = self._counts.get(key, Counts()).plus(counts)

    def rows(self, days: int | None = None) -> list[UsageRow]:
        """What was counted in the last ``days`` (default: all that are kept), and what adapters
        take, by tenant, then adapter, the bare base first. With a store, all replicas' and
        blocking; raises ServiceError.
        """
        since = self._today() - (self._days if days is None else days) + 1
        sums: dict[tuple[str, str | None], Counts] = {}
        for (_, tenant, adapter), counts in self._items(since):
            pair = tenant, adapter
            sums[pair] = sums.get(pair, Counts()).plus(counts)
        sizes = self.sizes()
        rows = [
            UsageRow(*pair, *sums.get(pair, Counts()), nbytes=sizes.get(pair, 0))
            for pair in {**sums, **sizes}
        ]
        return sorted(rows, key=lambda r: (r.tenant, r.adapter is not None, r.adapter or ""))

    def tokens_today(self) -> Mapping[str, int]:
        """Tokens by tenant since midnight, UTC, in and out. Blocks; raises ServiceError."""
        found: dict[str, int] = {}
        for (_, tenant, _adapter), counts in self._items(self._today()):
            tokens = counts.prompt_tokens + counts.output_tokens
            found[tenant] = found.get(tenant, 0) + tokens
        return found

    def flush(self) -> None:
        """Add to the store what was counted since; what fails is tried again, and counts once.

        Raises ServiceError.
        """
        with self._flushing:
            while self._store is not None:
                with self._lock:
                    if self._batch is None:
                        if not self._counts:
                            return
                        self._batch, self._counts = (secrets.token_hex(16), self._counts), {}
                    ident, tally = self._batch
                self._store.add(ident, tally, self._today() - self._days + 1)
                with self._lock:
                    self._batch = None

    @contextmanager
    def flushing(self, period_s: float = FLUSH_S) -> Iterator[None]:
        """Flushes on a thread of its own until the block ends, and then once more."""
        try:
            with repeating(self._try_flush, period_s, "usage"):
                yield
        finally:
            self._try_flush()

    def _try_flush(self) -> None:
        try:
            self.flush()
        except ServiceError as error:
            if not self._failing:
                logger.error("usage is counted and not yet kept: %s", error.message)
            self._failing = True
        else:
            self._failing = False

    def _items(self, since: int) -> Sequence[tuple[UsageKey, Counts]]:
        """What is kept and what is not yet, each once: no flush comes between the two."""
        with self._flushing:
            kept = {} if self._store is None else self._store.read(since)
            with self._lock:
                batch = self._batch[1] if self._batch else {}
                found = [*kept.items(), *batch.items(), *self._counts.items()]
        return [(key, counts) for key, counts in found if key.day >= since]

    def _today(self) -> int:
        return int(self._clock() // DAY_S)
