"""A noisy neighbour: one tenant floods the server, another asks now and then.

The quiet one's rows of the report should look as in a run of ``steady`` with one user. The tenants
are made where they do not exist, so the key must be an admin's (or none configured).
"""

from __future__ import annotations

from typing import Any

import requests
from common import CompletionUser, Shape
from locust import events, task
from locust.env import Environment


class Users(Shape):
    """Constant."""


@events.test_start.add_listener
def make_tenants(environment: Environment, **_: Any) -> None:
    """Creates both tenants; one that is there already (409) is left as it is.

    Raises HTTPError where the server refuses.
    """
    key = environment.parsed_options.api_key
    headers = {"authorization": f"Bearer {key}"} if key else {}
    for tenant in (Quiet.tenant, Noisy.tenant):
        answer = requests.post(
            f"{environment.host}/admin/tenants", json={"id": tenant}, headers=headers, timeout=30
        )
        if answer.status_code != 409:
            answer.raise_for_status()


class Quiet(CompletionUser):
    """One user with pauses."""

    label = "quiet tenant"
    tenant = "quiet"
    fixed_count = 1

    @task
    def complete(self) -> None:
        """One answer."""
        self.ask(self.popular())


class Noisy(CompletionUser):
    """Everybody else, without pauses."""

    label = "noisy tenant"
    tenant = "noisy"

    def wait_time(self) -> float:
        """None."""
        return 0.0

    @task
    def complete(self) -> None:
        """One answer."""
        self.ask(self.popular())
