"""Moves an adapter's route, over and over, as an operator would."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from common import CompletionUser
from locust import task

Change = tuple[str, dict[str, Any]]


class Operator(CompletionUser):
    """One user whose requests are changes of a route: canary, promotion and rollback where the name
    has several versions, else to the base and back. Every change must succeed.
    """

    abstract = True
    fixed_count = 1

    def wait_time(self) -> float:
        """--rollout-s between changes."""
        return float(self.options.rollout_s)

    def on_start(self) -> None:
        """Learns the adapter's versions."""
        super().on_start()
        self.adapter = self.options.rollout_adapter or (self.adapters or [""])[0]
        self.changes = iter(())

    @task
    def change(self) -> None:
        """The next change of the cycle."""
        if not self.adapter:
            return
        try:
            path, body = next(self.changes)
        except StopIteration:
            self.changes = self._cycle()
            return
        self.admin(
            "POST", f"/admin/adapters/{self.adapter}/{path}", {"reason": "load test", **body}
        )

    def _cycle(self) -> Iterator[Change]:
        shown = self.admin("GET", f"/admin/adapters/{self.adapter}")
        if shown is None:
            return iter(())
        stable = shown["version"]
        others = [v["version"] for v in shown["versions"] if v["version"] != stable]
        if not others:
            return iter([("rollback", {"to": "baseline"}), ("promote", {"version": stable})])
        return iter(
            [
                ("canary", {"version": others[-1], "percent": 25}),
                ("promote", {}),
                ("rollback", {"to": "previous"}),
            ]
        )
