"""Users from none to all: the report shows where latency bends."""

from common import CompletionUser, Shape
from locust import task
from shapes import ramp


class Users(Shape):
    """See ``shapes.ramp``."""

    profile = staticmethod(ramp)


class Caller(CompletionUser):
    """Asks adapters by their popularity."""

    @task
    def complete(self) -> None:
        """One answer."""
        self.ask(self.popular())
