"""What every admin route needs: who asks, the adapters, and threads for what blocks on the disk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Final, TypeVar

import anyio
import anyio.to_thread
from fastapi import Depends, Request

from manyhats.api.auth import Principal, require_operator
from manyhats.lifecycle.audit import Cause
from manyhats.lifecycle.evaluation.service import EvaluationService
from manyhats.lifecycle.records import Registration
from manyhats.lifecycle.service import AdapterService

_T = TypeVar("_T")

# A few at a time, so that a crowd of uploads leaves threads to everybody else.
_BLOCKING: Final = anyio.CapacityLimiter(8)

Operator = Annotated[Principal, Depends(require_operator)]
"""Who is asking, with the operator's role or more, and the tenant acted for."""


async def blocking(call: Callable[[], _T]) -> _T:
    """What ``call`` gives, run on a worker thread."""
    return await anyio.to_thread.run_sync(call, limiter=_BLOCKING)


def adapters(request: Request) -> AdapterService:
    """The adapters of the application that serves ``request``."""
    service: AdapterService = request.app.state.manyhats.adapters
    return service


def evaluations(request: Request) -> EvaluationService:
    """The evaluations of the application that serves ``request``. Raises RuntimeError without."""
    service = measuring(request)
    if service is None:
        raise RuntimeError("this application was built without evaluations")
    return service


def measuring(request: Request) -> EvaluationService | None:
    """The same; None where nothing is measured, so that no name requires it either."""
    service: EvaluationService | None = request.app.state.manyhats.evaluations
    return service


def cause(caller: Principal, reason: str = "") -> Cause:
    """Who makes a change, as the audit log names them, and why."""
    return Cause(caller.actor, reason)


async def admitted(
    request: Request, caller: Principal, name: str, told: Registration
) -> Registration:
    """The registration under what the name requires of its versions."""
    service = measuring(request)
    if service is None:
        return told
    return await blocking(partial(service.admitted, name, caller.tenant, told))
