"""Evaluations: what an adapter is asked and judged by, runs beside live traffic, and reports.

Every route needs the operator's role and acts for one tenant, the name's owner.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request
from pydantic import Field

from manyhats.api.administration import Operator, blocking, cause, evaluations
from manyhats.api.auth import require_operator
from manyhats.api.body import read_body
from manyhats.api.schemas import Reasoned, request_body
from manyhats.lifecycle.evaluation.gate import Thresholds
from manyhats.lifecycle.evaluation.probes import MAX_CHARS, general_pairs
from manyhats.lifecycle.evaluation.store import EvaluationSettings
from manyhats.lifecycle.states import Require

router = APIRouter(tags=["admin"], dependencies=[Depends(require_operator)])

_Text = Annotated[str, Field(max_length=MAX_CHARS)]
_Version = Annotated[int, Path(ge=1, lt=2**53)]


class EvaluationRequest(Reasoned):
    """Body of ``PUT /admin/adapters/{name}/evaluation``; what is left out stays as it is.

    ``data`` and ``rules`` are JSONL (an empty text removes them): pairs of prompt and completion,
    and rules for generated answers. ``thresholds``: those that differ from the defaults; a null
    measures without judging. ``require``: ``evaluated`` lets requests be routed only to versions
    that have passed, ``ready`` to those that have passed on pairs or rules of the adapter's own.
    """

    data: _Text | None = None
    rules: _Text | None = None
    thresholds: Thresholds | None = None
    require: Require | None = Field(default=None, strict=False)


class EvaluateRequest(Reasoned):
    """Body of ``POST /admin/adapters/{name}/evaluate``. ``version``: default the newest."""

    version: Annotated[int | None, Field(ge=1, lt=2**53)] = None


@router.put("/admin/adapters/{name}/evaluation", openapi_extra=request_body(EvaluationRequest))
async def configure(request: Request, caller: Operator, name: str) -> dict[str, Any]:
    """Say what the adapter's versions are asked and judged by; errors name the line and field."""
    body = await read_body(request, EvaluationRequest)
    call = partial(
        evaluations(request).configure,
        name,
        caller.tenant,
        cause(caller, body.reason),
        data=body.data,
        rules=body.rules,
        thresholds=body.thresholds,
        require=body.require,
    )
    return _shown(name, await blocking(call))


@router.get("/admin/adapters/{name}/evaluation")
async def settings(request: Request, caller: Operator, name: str) -> dict[str, Any]:
    """What the adapter's versions are asked and judged by."""
    call = partial(evaluations(request).settings, name, caller.tenant)
    return _shown(name, await blocking(call))


@router.post(
    "/admin/adapters/{name}/evaluate", status_code=202, openapi_extra=request_body(EvaluateRequest)
)
async def evaluate(request: Request, caller: Operator, name: str) -> dict[str, Any]:
    """Begin to evaluate a version, beside live traffic; the version's evaluation shows how far it
    is. One that is on its way already goes on.
    """
    body = await read_body(request, EvaluateRequest)
    return await evaluations(request).start(
        name, caller.tenant, body.version, cause(caller, body.reason)
    )


@router.get("/admin/adapters/{name}/versions/{version}/evaluation")
async def report(
    request: Request, caller: Operator, name: str, version: _Version
) -> dict[str, Any]:
    """A version's state, its last report, and the run that is on its way. 404 before the first."""
    call = partial(evaluations(request).report, name, caller.tenant, version)
    return {"adapter": f"{name}@{version}", **await blocking(call)}


def _shown(name: str, found: EvaluationSettings) -> dict[str, Any]:
    return {
        "name": name,
        "data": len(found.data),
        "general": len(general_pairs()),
        "rules": len(found.rules),
        "thresholds": found.thresholds.model_dump(),
        "require": found.require.value,
    }
