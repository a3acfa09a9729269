"""Ten times the users for a fifth of the run: are they served or refused, and is it calm after?"""

from common import CompletionUser, Shape
from locust import task
from shapes import spike


class Users(Shape):
    """See ``shapes.spike``."""

    profile = staticmethod(spike)


class Caller(CompletionUser):
    """Asks adapters by their popularity."""

    @task
    def complete(self) -> None:
        """One answer."""
        self.ask(self.popular())
