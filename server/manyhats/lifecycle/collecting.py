"""The background task that removes what has had its time."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import anyio
import anyio.to_thread

from manyhats.errors import ManyhatsError
from manyhats.lifecycle.audit import Cause
from manyhats.lifecycle.collector import Collector

logger = logging.getLogger(__name__)


@asynccontextmanager
async def collecting(collector: Collector, period_s: float) -> AsyncIterator[None]:
    """Collects every ``period_s`` seconds while the block runs; 0: never."""
    async with anyio.create_task_group() as group:
        if period_s:
            group.start_soon(_run, collector, period_s)
        try:
            yield
        finally:
            group.cancel_scope.cancel()


async def _run(collector: Collector, period_s: float) -> None:
    while True:
        await anyio.sleep(period_s)
        try:
            await anyio.to_thread.run_sync(partial(collector.collect, Cause("collector")))
        except ManyhatsError as error:  # the store is away, say: it is tried again
            logger.error("nothing could be collected: %s", error.message)
