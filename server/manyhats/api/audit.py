"""The audit log: operators read all of it, tenants what concerns their own adapters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request

from manyhats.api.administration import adapters, blocking
from manyhats.api.auth import Principal, require_operator, require_user
from manyhats.lifecycle.audit import AuditEntry

router = APIRouter()

_Name = Annotated[str | None, Query(max_length=128)]
_After = Annotated[int, Query(ge=0, lt=2**63)]
_Limit = Annotated[int, Query(ge=1, le=1000)]


@router.get("/admin/audit", tags=["admin"], dependencies=[Depends(require_operator)])
async def read_audit(
    request: Request, name: _Name = None, after: _After = 0, limit: _Limit = 100
) -> dict[str, Any]:
    """The audit log beyond entry ``after``, oldest first; ``has_more`` says whether it goes on.

    Of every tenant's adapters; ``name``: of one. Each entry holds the hash of the one before it,
    and its own: the SHA-256 of the canonical JSON (sorted keys, no spaces) of its other fields.
    """
    call = adapters(request).rollouts.audit
    return _page(await blocking(partial(call, name=name, after=after, limit=limit + 1)), limit)


@router.get("/v1/adapters/{name}/audit", tags=["openai"])
async def read_own_audit(
    request: Request,
    caller: Annotated[Principal, Depends(require_user)],
    name: str,
    after: _After = 0,
    limit: _Limit = 100,
) -> dict[str, Any]:
    """What was done to an adapter of the tenant's own, and by whom, since it got the name; pages as
    of ``/admin/audit``. To others the adapter is as one that does not exist.
    """
    service = adapters(request)
    first = service.entry(name, caller.tenant).began
    call = partial(service.rollouts.audit, name=name, after=max(after, first - 1), limit=limit + 1)
    return _page(await blocking(call), limit)


def _page(entries: Sequence[AuditEntry], limit: int) -> dict[str, Any]:
    data = [entry.shown() for entry in entries[:limit]]
    return {"object": "list", "data": data, "has_more": len(entries) > limit}
