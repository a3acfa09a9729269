"""Administration of tenants and their keys. Every route needs the admin role.

What waits for the store runs on worker threads.
"""

from __future__ import annotations

from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Request
from pydantic import Field

from manyhats.api.auth import KeyRing, require_admin
from manyhats.api.body import read_body
from manyhats.api.schemas import StrictModel, examples, request_body
from manyhats.api.state import api_state
from manyhats.errors import ConflictError
from manyhats.tenancy.directory import TenantDirectory
from manyhats.tenancy.model import ApiKey, Role, Tenant, TenantSettings

router = APIRouter(tags=["tenants"], dependencies=[Depends(require_admin)])

_LONGEST_S = 10 * 365 * 86_400


class IssueRequest(StrictModel):
    """Body of ``POST /admin/tenants/{tenant}/keys``. ``expires_s``: seconds from now."""

    model_config = examples({"role": "operator", "expires_s": 2592000, "note": "CI of the team"})

    role: Annotated[Role, Field(strict=False)] = Role.TENANT
    expires_s: Annotated[int | None, Field(ge=1, le=_LONGEST_S)] = None
    note: Annotated[str, Field(max_length=200)] = ""


class RotateRequest(StrictModel):
    """Body of ``POST /admin/keys/{key}/rotate``. ``grace_s``: how long the old key still opens."""

    model_config = examples({"grace_s": 3600})

    grace_s: Annotated[int, Field(ge=0, le=30 * 86_400)] = 0


@router.get("/admin/tenants")
async def list_tenants(request: Request) -> dict[str, Any]:
    """Every tenant, by id."""
    return {"object": "list", "data": [t.model_dump() for t in _directory(request).tenants()]}


@router.post("/admin/tenants", status_code=201, openapi_extra=request_body(Tenant))
async def create_tenant(request: Request) -> dict[str, Any]:
    """A new tenant. 409 where its id is taken."""
    tenant = await read_body(request, Tenant)
    return (await run_sync(_directory(request).create, tenant)).model_dump()


@router.get("/admin/tenants/{tenant}")
async def show_tenant(request: Request, tenant: str) -> dict[str, Any]:
    """One tenant."""
    return _directory(request).tenant(tenant).model_dump()


@router.put("/admin/tenants/{tenant}", openapi_extra=request_body(TenantSettings))
async def update_tenant(request: Request, tenant: str) -> dict[str, Any]:
    """Other settings for a tenant, from now on; what is left out goes back to its default."""
    directory = _directory(request)
    directory.tenant(tenant)
    body = await read_body(request, TenantSettings)
    changed = Tenant(id=tenant, **dict(body))
    return (await run_sync(directory.update, changed)).model_dump()


@router.delete("/admin/tenants/{tenant}")
async def delete_tenant(request: Request, tenant: str) -> dict[str, Any]:
    """Remove a tenant and revoke its keys. Its adapters stay, shared with nobody."""
    await run_sync(_directory(request).delete, tenant)
    return {"id": tenant, "deleted": True}


@router.get("/admin/tenants/{tenant}/keys")
async def list_keys(request: Request, tenant: str) -> dict[str, Any]:
    """The keys that were issued to a tenant, oldest first; what they are is not kept."""
    return {"object": "list", "data": [_shown(k) for k in _directory(request).keys(tenant)]}


@router.post(
    "/admin/tenants/{tenant}/keys", status_code=201, openapi_extra=request_body(IssueRequest)
)
async def issue_key(request: Request, tenant: str) -> dict[str, Any]:
    """A new key. ``key`` in the answer is shown this once."""
    body = await read_body(request, IssueRequest)
    directory = _directory(request)
    directory.tenant(tenant)
    _keep_the_door_openable(request, body.role, body.expires_s)
    record, key = await run_sync(
        lambda: directory.issue(tenant, body.role, lifetime_s=body.expires_s, note=body.note)
    )
    return {**_shown(record), "key": key}


@router.post("/admin/keys/{key}/rotate", status_code=201, openapi_extra=request_body(RotateRequest))
async def rotate_key(request: Request, key: str) -> dict[str, Any]:
    """A new key in the place of ``key`` (its id), which ends now or after ``grace_s``."""
    body = await read_body(request, RotateRequest)
    directory = _directory(request)
    record, new = await run_sync(lambda: directory.rotate(key, grace_s=body.grace_s))
    return {**_shown(record), "key": new}


@router.delete("/admin/keys/{key}")
async def revoke_key(request: Request, key: str) -> dict[str, Any]:
    """The key (by its id) opens nothing from now on."""
    return _shown(await run_sync(_directory(request).revoke, key))


def _directory(request: Request) -> TenantDirectory:
    return api_state(request).tenants


def _keep_the_door_openable(request: Request, role: Role, expires_s: int | None) -> None:
    """With the first key the door that was open to all shuts: somebody must have a lasting one."""
    open_door = KeyRing.of(api_state(request).settings).is_open
    if not open_door or _directory(request).has_keys:
        return
    if role is not Role.ADMIN or expires_s is not None:
        raise ConflictError(
            "the first key must have the admin role and no end: from then on a key is needed for "
            "everything",
            param="role",
        )


def _shown(key: ApiKey) -> dict[str, Any]:
    return key.model_dump(mode="json", exclude={"digest"})
