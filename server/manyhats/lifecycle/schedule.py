"""The background task that moves scheduled canaries on."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

import anyio
import anyio.to_thread

from manyhats.errors import ManyhatsError
from manyhats.lifecycle.rollouts import Check, Rollouts

logger = logging.getLogger(__name__)

PERIOD_S: Final = 1.0
"""How often it is looked whether a step has ended."""


@asynccontextmanager
async def scheduled(
    rollouts: Rollouts, check: Check | None = None, *, period_s: float = PERIOD_S
) -> AsyncIterator[None]:
    """Scheduled canaries move on while the block runs; ``check`` may hold one (see
    ``Rollouts.tick``).
    """
    async with anyio.create_task_group() as group:
        group.start_soon(_run, rollouts, check, period_s)
        try:
            yield
        finally:
            group.cancel_scope.cancel()


async def _run(rollouts: Rollouts, check: Check | None, period_s: float) -> None:
    while True:
        await anyio.sleep(period_s)
        try:
            await anyio.to_thread.run_sync(partial(rollouts.tick, check))
        except ManyhatsError as error:  # the disk, say: the canary stays, and it is tried again
            logger.error("scheduled canaries could not be moved on: %s", error.message)
