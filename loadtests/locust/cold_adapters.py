"""A storm of cold adapters: every request asks for the one that was asked for longest ago.

With more adapters than slots nobody's adapter is ever resident, so each request waits for a load;
beside them one user keeps asking for one adapter, whose latency must not suffer.
"""

from __future__ import annotations

from itertools import count
from typing import ClassVar

from common import CompletionUser, Shape
from locust import task


class Users(Shape):
    """Constant."""


class Storm(CompletionUser):
    """All adapters but the first, in turn over all users."""

    label = "cold adapter"
    turns: ClassVar[count[int]] = count()

    @task
    def complete(self) -> None:
        """One answer from the next adapter."""
        cold = self.adapters[1:] or self.adapters or [self.base]
        self.ask(cold[next(self.turns) % len(cold)])


class Resident(CompletionUser):
    """One user of one adapter."""

    label = "resident adapter"
    fixed_count = 1

    @task
    def complete(self) -> None:
        """One answer from the first adapter."""
        self.ask(self.adapters[0] if self.adapters else self.base)
