"""Administration of the disk: removing what has had its time, for all tenants."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Depends, Request

from manyhats.api.administration import adapters, blocking
from manyhats.api.auth import Principal, require_admin
from manyhats.api.body import read_body
from manyhats.api.schemas import Reasoned, request_body
from manyhats.lifecycle.audit import Cause

router = APIRouter(tags=["admin"], dependencies=[Depends(require_admin)])


class CollectRequest(Reasoned):
    """Body of ``gc``. ``dry_run``: say what would be removed, and remove nothing."""

    dry_run: bool = False


@router.post("/admin/gc", openapi_extra=request_body(CollectRequest))
async def collect(
    request: Request,
    caller: Principal = Depends(require_admin),  # noqa: B008 - FastAPI's way
) -> dict[str, Any]:
    """Delete versions that were retired long enough ago (``--keep-retired-days``), and the bytes
    that no version refers to. Nothing that is routed, running, or a composition's member goes.
    """
    body = await read_body(request, CollectRequest)
    collector = adapters(request).collector
    call = partial(collector.collect, Cause(caller.actor, body.reason), dry_run=body.dry_run)
    found = await blocking(call)
    return {
        "object": "collection",
        "dry_run": body.dry_run,
        "versions": [str(ref) for ref in found.versions],
        "digests": list(found.digests),
        "bytes": found.nbytes,
    }
