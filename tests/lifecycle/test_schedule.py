"""The background task that moves scheduled canaries on."""

from __future__ import annotations

import anyio

from manyhats.errors import ServiceError
from manyhats.lifecycle.schedule import scheduled


class Ticks:
    """Stands for Rollouts: its second tick fails."""

    def __init__(self) -> None:
        self.checks: list[object] = []
        self.enough = anyio.Event()

    def tick(self, check: object) -> None:
        self.checks.append(check)
        if len(self.checks) == 2:
            raise ServiceError("the disk is full")
        if len(self.checks) == 4:
            anyio.from_thread.run_sync(self.enough.set)


def test_it_ticks_until_the_block_ends_and_a_failure_stops_nothing(caplog):
    check = object()

    async def run() -> Ticks:
        ticks = Ticks()
        async with scheduled(ticks, check, period_s=0):
            with anyio.fail_after(30):
                await ticks.enough.wait()
        return ticks

    ticks = anyio.run(run)
    assert set(ticks.checks) == {check}
    assert "could not be moved on: the disk is full" in caplog.text
