"""Drift over HTTP: what tenants think of answers; what is seen of a name, and its policy."""

from __future__ import annotations

import logging
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import Field

from manyhats.api.administration import Operator, adapters, blocking
from manyhats.api.auth import Principal, require_operator, require_user
from manyhats.api.body import read_body
from manyhats.api.prompts import BASELINE
from manyhats.api.schemas import StrictModel, request_body
from manyhats.api.state import api_state
from manyhats.drift import policy as policies
from manyhats.drift.build import Drift
from manyhats.drift.feedback import Feedback
from manyhats.drift.policy import Action, Policy
from manyhats.drift.report import report
from manyhats.drift.signals import SIGNALS
from manyhats.errors import ConflictError, RequestError

logger = logging.getLogger(__name__)
router = APIRouter(tags=["drift"])
_operators = [Depends(require_operator)]


class FeedbackRequest(StrictModel):
    """Body of ``/v1/feedback``: what one thinks of an answer. ``score`` from -1 to 1."""

    request_id: Annotated[str, Field(min_length=1, max_length=200)]
    score: Annotated[float, Field(ge=-1, le=1)]
    label: Annotated[str, Field(max_length=100)] = ""
    comment: Annotated[str, Field(max_length=4000)] = ""


class PolicyRequest(StrictModel):
    """Body of a policy: every field that is left out takes its default."""

    action: Literal["observe", "alert", "hold", "rollback", "baseline"] = "alert"
    dry_run: bool = False
    signals: Annotated[list[str], Field(max_length=64)] = Field(default_factory=list)
    cool_down_s: Annotated[float, Field(ge=0, le=366 * 86400)] = policies.COOL_DOWN_S
    revalidate_s: Annotated[float, Field(ge=0, le=3660 * 86400)] = 0.0
    retire_at: Annotated[float, Field(ge=0, le=1e11)] = 0.0
    warn_s: Annotated[float, Field(ge=0, le=3660 * 86400)] = policies.WARN_S


class ValidationRequest(StrictModel):
    """Body of a validation's outcome: ``figures`` are whatever was measured."""

    version: Annotated[int, Field(ge=1, lt=2**63)]
    passed: bool
    figures: Annotated[dict[str, float], Field(max_length=64)] = Field(default_factory=dict)


async def _caller(request: Request) -> Principal:
    """Who is asking; asynchronous, so that it costs no hop to a worker thread."""
    return require_user(request)


@router.post("/v1/feedback", openapi_extra=request_body(FeedbackRequest))
async def feedback(
    request: Request, caller: Annotated[Principal, Depends(_caller)]
) -> dict[str, Any]:
    """Say what you think of one of your latest answers, by the ``id`` that it had."""
    body = await read_body(request, FeedbackRequest)
    said = Feedback(body.request_id, body.score, body.label, body.comment)
    ref = _drift(request).monitor.feedback(caller.tenant, said)
    served_by = BASELINE if ref is None else str(ref)
    return {"object": "feedback", "request_id": body.request_id, "served_by": served_by}


@router.get("/admin/adapters/{name}/drift", dependencies=_operators)
async def show(request: Request, caller: Operator, name: str) -> dict[str, Any]:
    """Each signal now against its reference, the latest alarms, the policy."""
    return await _report(request, caller, name)


@router.post("/admin/adapters/{name}/drift/check", dependencies=_operators)
async def check(request: Request, caller: Operator, name: str) -> dict[str, Any]:
    """The same once everything that has ended by now has been looked at."""
    await blocking(_drift(request).monitor.settle)
    return await _report(request, caller, name)


@router.put(
    "/admin/adapters/{name}/drift/policy",
    dependencies=_operators,
    openapi_extra=request_body(PolicyRequest),
)
async def set_policy(request: Request, caller: Operator, name: str) -> dict[str, Any]:
    """What is done about an alarm from now on."""
    body = await read_body(request, PolicyRequest)
    policy = policies.check(
        Policy(
            action=Action(body.action),
            dry_run=body.dry_run,
            signals=tuple(body.signals),
            cool_down_s=body.cool_down_s,
            revalidate_s=body.revalidate_s,
            retire_at=body.retire_at,
            warn_s=body.warn_s,
        ),
        SIGNALS,
    )
    entry = adapters(request).entry(name, caller.tenant)
    actor = _drift(request).monitor.actor
    await blocking(partial(actor.set_policy, entry, policy))
    logger.info("drift policy of %s by %s: %s", name, caller.actor, policy.action.value)
    return {"name": name, "policy": policy.shown()}


@router.post("/admin/adapters/{name}/drift/reference", dependencies=_operators)
async def begin_anew(request: Request, caller: Operator, name: str) -> dict[str, Any]:
    """Collect the stable version's reference anew, from the requests that come now."""
    entry = adapters(request).entry(name, caller.tenant)
    record = entry.find(entry.route.stable)
    if record is None:
        raise ConflictError(f"the base answers for {name!r}: it has no reference", param="name")
    await blocking(partial(_drift(request).monitor.forget, record.ref))
    return {"name": name, "version": record.ref.version, "reference": "collecting"}


@router.post(
    "/admin/adapters/{name}/drift/validation",
    dependencies=_operators,
    openapi_extra=request_body(ValidationRequest),
)
async def add_validation(request: Request, caller: Operator, name: str) -> dict[str, Any]:
    """Tell how an evaluation of a version came out; it counts until the policy's period ends."""
    body = await read_body(request, ValidationRequest)
    entry = adapters(request).entry(name, caller.tenant)
    if entry.find(body.version) is None:
        raise RequestError(f"adapter {name!r} has no version {body.version}", param="version")
    add = _drift(request).validations.add
    outcome = await blocking(
        partial(add, entry, body.version, passed=body.passed, by=caller.actor, figures=body.figures)
    )
    return {"name": name, "validation": outcome}


async def _report(request: Request, caller: Principal, name: str) -> dict[str, Any]:
    drift, entry = _drift(request), adapters(request).entry(name, caller.tenant)
    return await blocking(partial(report, drift.monitor, drift.validations, entry))


def _drift(request: Request) -> Drift:
    """Drift detection of the application. Raises ConflictError where it is switched off."""
    drift = api_state(request).drift_detection
    if drift is None:
        raise ConflictError("drift detection is off: start the server with --drift")
    return drift
