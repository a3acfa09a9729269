"""Administration of routes: promote, canary, shadow, rollback, pin, retire.

Each needs the operator's role and acts for one tenant, the name's owner. A change holds
for every request that comes after its answer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import Field

from manyhats.api.administration import Operator, adapters, blocking, cause
from manyhats.api.auth import require_operator
from manyhats.api.body import read_body
from manyhats.api.schemas import Reasoned, StrictModel, examples, request_body
from manyhats.api.state import api_state
from manyhats.errors import RequestError, ServiceError
from manyhats.lifecycle.pins import Pins
from manyhats.lifecycle.rollouts import MAX_STEPS
from manyhats.lifecycle.routes import BASELINE, Route

router = APIRouter(tags=["admin"], dependencies=[Depends(require_operator)])

Version = Annotated[int, Field(ge=1, lt=2**63)]


class PromoteRequest(Reasoned):
    """Body of ``promote``. Without ``version`` it is the canary that becomes the stable one.

    ``force``, with a reason, promotes a version that its evaluation speaks against.
    """

    model_config = examples({"version": 3, "reason": "it rhymes better"})

    version: Version | None = None
    force: bool = False


class ScheduleFields(StrictModel):
    """A canary's way up: ``steps`` in percent, each lasting ``step_s`` seconds."""

    steps: Annotated[list[float], Field(min_length=1, max_length=MAX_STEPS)] = Field(
        default_factory=lambda: [5.0, 25.0, 50.0, 100.0]
    )
    step_s: Annotated[float, Field(gt=0)]


class CanaryRequest(Reasoned):
    """Body of ``canary``: ``percent`` of the callers (0 ends it), or a ``schedule``.

    Without ``version``: the canary that there is.
    """

    model_config = examples(
        {"version": 3, "percent": 5, "reason": "a first look"},
        {"version": 3, "schedule": {"steps": [5, 25, 50, 100], "step_s": 3600}},
    )

    version: Version | None = None
    percent: Annotated[float | None, Field(ge=0, le=100)] = None
    schedule: ScheduleFields | None = None


class RollbackRequest(Reasoned):
    """Body of ``rollback``. ``previous`` ends a canary; without one it brings back what was stable
    before.
    """

    model_config = examples(
        {"to": "previous", "reason": "it has stopped rhyming"}, {"to": "baseline"}, {"to": 2}
    )

    to: Literal["previous", "baseline"] | Version = "previous"


class ShadowRequest(Reasoned):
    """Body of ``shadow``: ``percent`` of the requests (0 ends it). Without ``version``: the shadow
    that there is.
    """

    model_config = examples({"version": 3, "percent": 10, "reason": "see whether it agrees"})

    version: Version | None = None
    percent: Annotated[float, Field(ge=0, le=100)]


class PinRequest(Reasoned):
    """Body of ``pin`` and ``unpin``. Without ``version``: the stable one."""

    model_config = examples({"version": 3, "reason": "asked for all day"})

    version: Version | None = None


class RetireRequest(Reasoned):
    """Body of ``retire``; ``retired`` false brings the version back."""

    model_config = examples({"version": 1, "reason": "superseded"})

    version: Version
    retired: bool = True


@router.post("/admin/adapters/{name}/promote", openapi_extra=request_body(PromoteRequest))
async def promote(request: Request, caller: Operator, name: str) -> dict[str, Any]:
    """Make a version the stable one: every request for the name gets it. A canary ends.

    409 for one that has failed its evaluation, or has none where the adapter requires it.
    """
    body = await read_body(request, PromoteRequest)
    call = adapters(request).rollouts.promote
    why = cause(caller, body.reason)
    change = partial(call, name, caller.tenant, why, body.version, force=body.force)
    return await _routed(name, change)


@router.post("/admin/adapters/{name}/canary", openapi_extra=request_body(CanaryRequest))
async def canary(request: Request, caller: Operator, name: str) -> dict[str, Any]:
    """Give a version a share of the callers, fixed or growing by a schedule.

    Who is in the share is drawn by the request's ``user``, else by its API key, and stays in it as
    it grows; the header ``x-manyhats-route: canary`` or ``stable`` chooses.
    """
    body = await read_body(request, CanaryRequest)
    why, rollouts = cause(caller, body.reason), adapters(request).rollouts
    if (body.percent is None) == (body.schedule is None):
        raise RequestError("give percent or schedule, one of them", param="percent")
    if body.schedule is not None:
        plan = body.schedule
        call = partial(
            rollouts.schedule, version=body.version, steps=plan.steps, step_s=plan.step_s
        )
    else:
        call = partial(rollouts.canary, version=body.version, percent=body.percent or 0.0)
    return await _routed(name, partial(call, name, caller.tenant, why))


@router.post("/admin/adapters/{name}/canary/hold", openapi_extra=request_body(Reasoned))
async def hold(request: Request, caller: Operator, name: str) -> dict[str, Any]:
    """Keep a scheduled canary at its present share."""
    body = await read_body(request, Reasoned)
    call = adapters(request).rollouts.hold
    return await _routed(name, partial(call, name, caller.tenant, cause(caller, body.reason)))


@router.post("/admin/adapters/{name}/canary/resume", openapi_extra=request_body(Reasoned))
async def resume(request: Request, caller: Operator, name: str) -> dict[str, Any]:
    """Let a held canary go on; its present step begins anew."""
    body = await read_body(request, Reasoned)
    call = adapters(request).rollouts.resume
    return await _routed(name, partial(call, name, caller.tenant, cause(caller, body.reason)))


@router.post("/admin/adapters/{name}/rollback", openapi_extra=request_body(RollbackRequest))
async def rollback(request: Request, caller: Operator, name: str) -> dict[str, Any]:
    """Go back to what was before, to any version, or to the base (``baseline``), which then answers
    the requests for the name.
    """
    body = await read_body(request, RollbackRequest)
    to = {"previous": None, "baseline": BASELINE}[body.to] if isinstance(body.to, str) else body.to
    call = adapters(request).rollouts.rollback
    why = cause(caller, body.reason)
    return await _routed(name, partial(call, name, caller.tenant, why, to))


@router.post("/admin/adapters/{name}/shadow", openapi_extra=request_body(ShadowRequest))
async def shadow(request: Request, caller: Operator, name: str) -> dict[str, Any]:
    """Run a version beside what answers, for a share of the requests that give the name.

    It is measured (``/metrics``) and never answered with; it runs when nothing else does, and a
    sample is dropped where too many wait.
    """
    body = await read_body(request, ShadowRequest)
    call = partial(adapters(request).rollouts.shadow, version=body.version, percent=body.percent)
    return await _routed(name, partial(call, name, caller.tenant, cause(caller, body.reason)))


@router.post("/admin/adapters/{name}/pin", openapi_extra=request_body(PinRequest))
async def pin(request: Request, caller: Operator, name: str) -> dict[str, Any]:
    """Keep a version on the device, now and after a restart.

    All slots but one may be pinned.
    """
    body = await read_body(request, PinRequest)
    why = cause(caller, body.reason)
    return await _routed(name, partial(_pins(request).pin, name, caller.tenant, why, body.version))


@router.post("/admin/adapters/{name}/unpin", openapi_extra=request_body(PinRequest))
async def unpin(request: Request, caller: Operator, name: str) -> dict[str, Any]:
    """Let a pinned version go when others need its place."""
    body = await read_body(request, PinRequest)
    why = cause(caller, body.reason)
    return await _routed(
        name, partial(_pins(request).unpin, name, caller.tenant, why, body.version)
    )


@router.post("/admin/adapters/{name}/retire", openapi_extra=request_body(RetireRequest))
async def retire(request: Request, caller: Operator, name: str) -> dict[str, Any]:
    """Take a version that nothing is routed to out of use, or bring it back. Its bytes stay."""
    body = await read_body(request, RetireRequest)
    call = adapters(request).rollouts.retire
    why = cause(caller, body.reason)
    entry = await blocking(
        partial(call, name, caller.tenant, why, body.version, retired=body.retired)
    )
    versions = [{"version": r.ref.version, "state": r.state.value} for r in entry.versions]
    return {"name": name, "route": entry.route.shown(), "versions": versions}


def _pins(request: Request) -> Pins:
    pins = api_state(request).pins
    if pins is None:
        raise ServiceError("this server keeps no pins")
    return pins


async def _routed(name: str, change: Callable[[], Route]) -> dict[str, Any]:
    route = await blocking(change)
    return {"name": name, "route": route.shown()}
