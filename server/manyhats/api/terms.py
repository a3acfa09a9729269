"""How long a request may take, and how urgent it is among its tenant's."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Final

from fastapi import Request

from manyhats.api.auth import Principal
from manyhats.api.prompts import Job
from manyhats.api.schemas import SamplingFields
from manyhats.api.state import api_state
from manyhats.errors import PermissionDeniedError, RequestError
from manyhats.tenancy.model import Role

TIMEOUT_HEADER: Final = "x-manyhats-timeout"
"""Seconds that a request may take, from its arrival to its last token."""


@dataclass(frozen=True, slots=True)
class Terms:
    """``deadline`` in seconds of the monotonic clock, None: none; ``urgency``: the highest first
    among the tenant's own.
    """

    deadline: float | None
    urgency: int

    def put_on(self, job: Job) -> Job:
        """The job under these terms."""
        requests = tuple(
            replace(request, deadline=self.deadline, urgency=self.urgency)
            for request in job.requests
        )
        return replace(job, requests=requests)


def terms_of(request: Request, caller: Principal, body: SamplingFields) -> Terms:
    """What the request says, and the server's own bound where it says nothing.

    Raises RequestError (the header), PermissionDeniedError (a priority over the tenant's quota; an
    operator's may be any).
    """
    now, settings = time.monotonic(), api_state(request).settings
    seconds = _timeout(request, settings.max_timeout_s)
    if seconds is None:
        seconds = settings.timeout_s
    urgency = body.priority or 0
    bound = api_state(request).tenants.quotas(caller.tenant).priority
    if bound is not None and urgency > bound and not caller.role.covers(Role.OPERATOR):
        raise PermissionDeniedError(
            f"priority: {urgency} is over this tenant's quota of {bound}", param="priority"
        )
    return Terms(None if seconds is None else now + seconds, urgency)


def _timeout(request: Request, bound: float) -> float | None:
    values = request.headers.getlist(TIMEOUT_HEADER)
    if not values:
        return None
    try:
        [value] = values
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= bound:
        raise RequestError(
            f"{TIMEOUT_HEADER} is {', '.join(values)[:100]!r}: seconds, over 0 and at most "
            f"{bound:g} (max_timeout_s), once",
            param=TIMEOUT_HEADER,
        )
    return seconds
