"""A rollout under load: an adapter's route moves while everybody asks for it; nobody may notice."""

from __future__ import annotations

from common import CompletionUser, Shape
from locust import task
from rollouts import Operator


class Users(Shape):
    """Constant."""


class Roller(Operator):
    """Moves the route."""


class Caller(CompletionUser):
    """Asks for that adapter and checks what served it."""

    @task
    def complete(self) -> None:
        """One answer, served by a version of the name or by the base."""
        name = self.options.rollout_adapter or self.popular_first()
        served = self.ask(name)
        if served is not None and served != "baseline" and not served.startswith(f"{name}@"):
            self.environment.events.request.fire(
                request_type="CHECK",
                name="served by",
                response_time=0,
                response_length=0,
                exception=ValueError(f"{name} was served by {served!r}"),
                context={},
            )

    def popular_first(self) -> str:
        """The adapter whose route moves."""
        return self.adapters[0] if self.adapters else self.base
