"""A warm restart: the hot adapters are written down, and prefetched at the next start.

Recent use is a count that halves every ``HALF_LIFE_S``. It is kept beside the registry by name,
version and digest, so that only what still means the same content is brought back.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from manyhats.lifecycle.loading import Residency
from manyhats.lifecycle.registry import Registry
from manyhats.types import AdapterRef, Digest

logger = logging.getLogger(__name__)

HALF_LIFE_S: Final = 600.0
PERIOD_S: Final = 30.0
"""How often the hot adapters are written; a server that is killed loses no more than this."""
PACE_S: Final = 0.1
"""Between two prefetches, so that a live request's load never stands behind all of them."""
_MOST: Final = 8192
_Key = tuple[str, int, Digest]


class HotAdapter(BaseModel):
    """One version and its recent use: requests, each halved every ``HALF_LIFE_S``."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    name: str
    version: int
    digest: str
    score: float = Field(ge=0)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format: int = Field(ge=1, le=1)
    adapters: tuple[HotAdapter, ...] = Field(strict=False)


class RecentUse:
    """How much each version was used lately. Thread-safe; memory is bounded: the coldest go."""

    def __init__(self, *, most: int = _MOST, clock: Callable[[], float] = time.monotonic) -> None:
        """``most`` versions are known at once; ``clock`` gives seconds."""
        self._most = most
        self._clock = clock
        self._lock = threading.Lock()
        self._scores: dict[_Key, tuple[float, float]] = {}  # (score, when it was that)

    def note(self, ref: AdapterRef | None, weight: float = 1.0) -> None:
        """A request used the version; of a composition its members; None (the base) is let go."""
        if ref is None:
            return
        refs = ref.composition.members if ref.composition is not None else (ref,)
        with self._lock:
            now = self._clock()
            for each in refs:
                self._add((each.name, each.version, each.digest), weight, now)

    def restore(self, hot: Iterable[HotAdapter]) -> None:
        """Takes over what an earlier run wrote."""
        with self._lock:
            now = self._clock()
            for each in hot:
                self._add((each.name, each.version, Digest(each.digest)), each.score, now)

    def hottest(self, limit: int) -> list[HotAdapter]:
        """The ``limit`` most used versions, the hottest first; equal ones by name."""
        with self._lock:
            now = self._clock()
            scores = [(_decayed(*entry, now), key) for key, entry in self._scores.items()]
        scores.sort(key=lambda pair: (-pair[0], pair[1]))
        return [
            HotAdapter(name=name, version=version, digest=digest, score=score)
            for score, (name, version, digest) in scores[:limit]
        ]

    def _add(self, key: _Key, weight: float, now: float) -> None:
        score = _decayed(*self._scores[key], now) if key in self._scores else 0.0
        self._scores[key] = (score + weight, now)
        if len(self._scores) > self._most:
            by_heat = sorted(self._scores, key=lambda k: _decayed(*self._scores[k], now))
            for cold in by_heat[: max(1, self._most // 8)]:  # some more, so that it is rare
                del self._scores[cold]


def _decayed(score: float, at: float, now: float) -> float:
    return score * float(2.0 ** (-max(0.0, now - at) / HALF_LIFE_S))


def save(path: Path, hot: Sequence[HotAdapter]) -> None:
    """Writes the file whole or not at all. Raises OSError."""
    text = _File(format=1, adapters=tuple(hot)).model_dump_json()
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(text, "utf-8")
    os.replace(fresh, path)  # noqa: PTH105  Path.replace is the same call


def load(path: Path) -> tuple[HotAdapter, ...]:
    """What ``save`` wrote; nothing, with a warning, where it cannot be read: a cold start."""
    try:
        return _File.model_validate_json(path.read_bytes()).adapters
    except FileNotFoundError:
        return ()
    except (OSError, ValidationError) as error:
        logger.warning("%s cannot be read, so nothing is prefetched: %s", path, error)
        return ()


def known(registry: Registry, hot: Iterable[HotAdapter]) -> list[AdapterRef]:
    """Those that are registered still, with the same content, and ready."""
    refs = []
    for each in hot:
        entry = registry.entry(each.name)
        record = entry.find(each.version) if entry is not None else None
        if record is not None and not record.retired and record.ref.digest == each.digest:
            refs.append(record.ref)
    return refs


@asynccontextmanager
async def warm(
    recent: RecentUse,
    path: Path,
    registry: Registry,
    residency: Residency,
    *,
    limit: int,
    period_s: float = PERIOD_S,
) -> AsyncIterator[None]:
    """Prefetches the ``limit`` hottest versions of the last run to the host tier, beside the block,
    and writes down those of this one, at its end too. ``limit`` 0: neither.
    """
    if not limit:
        yield
        return
    before = await anyio.to_thread.run_sync(load, path)
    recent.restore(before)
    async with anyio.create_task_group() as group:
        group.start_soon(_prefetch, known(registry, before)[:limit], residency)
        group.start_soon(_write_often, recent, path, limit, period_s)
        try:
            yield
        finally:
            group.cancel_scope.cancel()
            _write(recent, path, limit)


async def _prefetch(refs: Sequence[AdapterRef], residency: Residency) -> None:
    for ref in refs:
        residency.prefetch(ref)
        await anyio.sleep(PACE_S)
    if refs:
        logger.info("prefetched %d adapters that were hot before", len(refs))


async def _write_often(recent: RecentUse, path: Path, limit: int, period_s: float) -> None:
    while True:
        await anyio.sleep(period_s)
        await anyio.to_thread.run_sync(_write, recent, path, limit)


def _write(recent: RecentUse, path: Path, limit: int) -> None:
    try:
        save(path, recent.hottest(limit))
    except OSError as error:  # the disk is full, say: the next start is colder, no more
        logger.error("the hot adapters cannot be written to %s: %s", path, error)
