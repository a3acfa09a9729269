"""Who may use a tenant's adapters: routes for operators, who act for the tenant that owns them."""

from __future__ import annotations

from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Request
from pydantic import Field

from manyhats.api.auth import acting_tenant, require_operator
from manyhats.api.body import read_body
from manyhats.api.schemas import StrictModel, request_body
from manyhats.api.state import api_state
from manyhats.errors import RequestError
from manyhats.lifecycle.service import AdapterService
from manyhats.tenancy.model import Grant, Visibility

router = APIRouter(tags=["admin"], dependencies=[Depends(require_operator)])


class VisibilityRequest(StrictModel):
    """Body of the PUT. ``shared_with``: tenants, where ``visibility`` is ``shared``."""

    visibility: Annotated[Visibility, Field(strict=False)]
    shared_with: Annotated[list[str], Field(max_length=256, default_factory=list)]


@router.get("/admin/adapters/{name}/visibility")
async def show_visibility(request: Request, name: str) -> dict[str, Any]:
    """Who may use the adapters of ``name`` beside the tenant that owns it."""
    tenant = acting_tenant(request)
    _service(request).entry(name, tenant)
    found = api_state(request).tenants.grant(name, tenant)
    return _shown(found or Grant(name=name, owner=tenant, visibility=Visibility.PRIVATE))


@router.put("/admin/adapters/{name}/visibility", openapi_extra=request_body(VisibilityRequest))
async def set_visibility(request: Request, name: str) -> dict[str, Any]:
    """Let others use the adapters of ``name``, all its versions; or, with ``private``, no longer.

    It counts from the next request on; those that run end as they began.
    """
    tenant = acting_tenant(request)
    _service(request).entry(name, tenant)
    body = await read_body(request, VisibilityRequest)
    if bool(body.shared_with) != (body.visibility is Visibility.SHARED):
        raise RequestError(
            "shared_with: one tenant at least where visibility is 'shared', none elsewhere",
            param="shared_with",
        )
    names = tuple(dict.fromkeys(body.shared_with))
    grant = Grant(name=name, owner=tenant, visibility=body.visibility, shared_with=names)
    return _shown(await run_sync(api_state(request).tenants.share, grant))


def _service(request: Request) -> AdapterService:
    service: AdapterService = request.app.state.manyhats.adapters
    return service


def _shown(grant: Grant) -> dict[str, Any]:
    return grant.model_dump(mode="json")
