"""A soak: hours of traffic with clients that hang up, routes that move, adapters that come and go.

Look at the server beside it: memory, file descriptors, blocks and leases must be flat
(`process_resident_memory_bytes`, `process_open_fds` and the cache's gauges of /metrics).
"""

from __future__ import annotations

from common import CompletionUser, Shape
from locust import task
from rollouts import Operator


class Users(Shape):
    """Constant."""


class Caller(CompletionUser):
    """Asks adapters by their popularity; one answer in ten is not read to its end."""

    @task(9)
    def complete(self) -> None:
        """One answer."""
        self.ask(self.popular())

    @task(1)
    def hang_up(self) -> None:
        """An answer of which three events are read."""
        self.ask(self.popular(), leave_after=3)


class Roller(Operator):
    """Moves a route."""


class Churn(CompletionUser):
    """Registers --churn-path under a name of its own, asks it, and removes it."""

    label = "churned adapter"
    fixed_count = 1

    @task
    def come_and_go(self) -> None:
        """One life of an adapter."""
        if not self.options.churn_path:
            return
        name = "locust-churn"
        body = {"lora_name": name, "lora_path": self.options.churn_path}
        if self.admin("POST", "/v1/load_lora_adapter", body) is not None:
            self.ask(name)
            self.admin("POST", "/v1/unload_lora_adapter", {"lora_name": name})
