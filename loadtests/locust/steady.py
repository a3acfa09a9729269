"""A constant number of users over popular and rare adapters."""

from common import CompletionUser, Shape
from locust import task
from shapes import steady


class Users(Shape):
    """See ``shapes.steady``."""

    profile = staticmethod(steady)


class Caller(CompletionUser):
    """Asks adapters by their popularity."""

    @task
    def complete(self) -> None:
        """One answer."""
        self.ask(self.popular())
