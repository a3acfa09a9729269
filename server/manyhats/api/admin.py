"""Administration: register, list, show and delete adapters, vLLM's routes aside.

Every route needs the operator's role and acts for one tenant (``api.auth.TENANT_HEADER``).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import JSONResponse

from manyhats.adapters.sources.address import Source
from manyhats.adapters.staging import Staging
from manyhats.api.administration import (
    Operator,
    adapters,
    admitted,
    blocking,
    cause,
    evaluations,
)
from manyhats.api.auth import Principal, require_operator
from manyhats.api.body import read_body
from manyhats.api.holders import refuse_held
from manyhats.api.operations import result, running_operations
from manyhats.api.registration import RegisterRequest, described
from manyhats.api.schemas import request_body
from manyhats.api.state import api_state
from manyhats.api.upload import UploadReader, boundary_of
from manyhats.engine.interface import ResidentAdapter
from manyhats.errors import ContentTypeError, RequestError
from manyhats.lifecycle.audit import MAX_REASON
from manyhats.lifecycle.compositions import shown
from manyhats.lifecycle.directory import AdapterCard
from manyhats.lifecycle.records import AdapterRecord, Registration, split_version
from manyhats.lifecycle.service import AdapterService

router = APIRouter(tags=["admin"], dependencies=[Depends(require_operator)])


@router.post(
    "/admin/adapters",
    status_code=201,
    response_model=None,
    openapi_extra=request_body(RegisterRequest),
    responses={202: {"description": "It is being fetched: an operation to watch"}},
)
async def register(
    request: Request, caller: Operator, wait: Annotated[bool, Query()] = False
) -> dict[str, Any] | JSONResponse:
    """Register an adapter; the answer describes the version.

    As JSON (``name``, and ``path``, ``composition`` or ``source``), or as multipart/form-data with
    the parts ``name``, ``config`` (adapter_config.json) and ``weights``
    (adapter_model.safetensors); either with ``promote``, ``reason``, ``source``, ``revision`` and
    ``metadata``, an upload with ``evaluation`` (the adapter's pairs of prompt and completion,
    JSONL) as well. The same content again is the version that is there already, and changes no
    route. A new version becomes the stable one at once unless somebody has moved the route away
    from the newest version; ``promote`` decides it either way. A ``source`` is fetched beside
    everything else: the answer is 202 with an operation (``/admin/operations/{ident}``), unless
    ``wait`` is true.
    """
    service = adapters(request)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        card = await _receive(request, caller, service)
    elif kind == "application/json":
        body = await read_body(request, RegisterRequest)
        told = await admitted(request, caller, body.name, body.registration(caller))
        if body.remote is not None:
            return await _fetched(request, caller, body, body.remote, told, wait=wait)
        card = await blocking(_registration(caller, service, body, told))
    else:
        raise ContentTypeError(
            f"content type must be application/json or multipart/form-data, not {kind[:100]!r}",
            param="content-type",
        )
    return _describe(request)(card)


@router.get("/admin/adapters")
async def list_adapters(request: Request, caller: Operator) -> dict[str, Any]:
    """Every version in use, by name, oldest first, and whether it is on the device."""
    cards = adapters(request).list(caller.tenant)
    return {"object": "list", "data": [*map(_describe(request), cards)]}


@router.get("/admin/adapters/{name}")
async def show(request: Request, caller: Operator, name: str) -> dict[str, Any]:
    """One version, by ``name`` (its stable one) or ``name@version``; the name's route, and all its
    versions, oldest first, with their states.
    """
    service = adapters(request)
    card = service.get(name, caller.tenant)
    entry = service.visible(card.ref.name, caller.tenant)
    return {
        **_describe(request)(card),
        "route": entry.route.shown(),
        "versions": [_version(record) for record in entry.versions],
    }


@router.get("/admin/adapters/{name}/versions/{version}")
async def show_version(
    request: Request, caller: Operator, name: str, version: Annotated[int, Path(ge=1, lt=2**53)]
) -> dict[str, Any]:
    """One version: who registered it, and what its evaluation says of it."""
    entry = adapters(request).entry(name, caller.tenant)
    entry_version = entry.get(version)
    found = await blocking(partial(evaluations(request).shown, name, caller.tenant, version))
    return {"name": name, **_version(entry_version), "evaluation": found}


@router.delete("/admin/adapters/{name}")
async def delete(
    request: Request,
    caller: Operator,
    name: str,
    force: Annotated[bool, Query()] = False,
    reason: Annotated[str, Query(max_length=MAX_REASON)] = "",
) -> dict[str, Any]:
    """Delete every version of ``name``, or ``name@version`` alone. Running requests keep theirs.

    409, unless ``force``, for a name with several versions, for a version that requests are routed
    to (``force`` ends a canary; the stable version goes with the whole name only), and for what is
    pinned or running requests hold.
    """
    if not force:
        refuse_held(request, adapters(request).entry(split_version(name)[0], caller.tenant), name)
    call = partial(
        adapters(request).delete, name, caller.tenant, force=force, cause=cause(caller, reason)
    )
    refs = await blocking(call)
    return {"name": name, "deleted": True, "versions": [ref.version for ref in refs]}


@router.get("/admin/cache")
async def cache(request: Request) -> dict[str, Any]:
    """What is on the device and in the host tier now; sizes in bytes, rows per site."""
    stats = api_state(request).engine.stats()
    return {
        "device": {
            "slots_total": stats.slots_total,
            "slots_used": len(stats.resident),
            "rows_total": stats.rows_total,
            "rows_used": stats.rows_used,
            "resident": [
                {"adapter": str(resident.ref), **_place(resident)} for resident in stats.resident
            ],
            "waiting": list(stats.waiting_adapters),
        },
        "host": {"bytes_total": stats.host_bytes_total, "bytes_used": stats.host_bytes_used},
    }


def _registration(
    caller: Principal, service: AdapterService, body: RegisterRequest, told: Registration
) -> Callable[[], AdapterCard]:
    """What a JSON registration comes to. Raises RequestError unless it names one source."""
    source, tenant = body.label, caller.tenant
    if body.path is not None and body.composition is None:
        return partial(
            service.register_folder,
            body.name,
            body.path,
            tenant=tenant,
            source=source,
            registration=told,
        )
    if body.composition is not None and body.path is None:
        return partial(
            service.register_composition,
            body.name,
            body.composition,
            tenant=tenant,
            source=source,
            registration=told,
        )
    raise RequestError("give one of path, composition and source", param="path")


async def _fetched(
    request: Request,
    caller: Principal,
    body: RegisterRequest,
    source: Source,
    told: Registration,
    *,
    wait: bool,
) -> dict[str, Any] | JSONResponse:
    """A registration from elsewhere: started, and with ``wait`` its end."""
    start = partial(
        running_operations(request).start,
        body.name,
        source,
        tenant=caller.tenant,
        registration=told,
    )
    operation = await blocking(start)
    if not wait:
        location = {"location": f"/admin/operations/{operation.id}"}
        return JSONResponse(operation.shown(), status_code=202, headers=location)
    return _describe(request)(await result(operation))


async def _receive(request: Request, caller: Principal, service: AdapterService) -> AdapterCard:
    """Write an upload to its staging folder as it comes, then register it."""
    async with _staging(service) as staging:
        reader = UploadReader(boundary_of(request), staging)
        async for chunk in request.stream():
            await blocking(partial(reader.feed, chunk))
        texts = reader.finish()
        name, data = texts.pop("name"), texts.pop("evaluation", None)
        body = described(texts)
        if data is not None:
            await blocking(partial(evaluations(request).check, data, None))
        card = await blocking(
            partial(
                service.register_staged,
                name,
                staging,
                tenant=caller.tenant,
                source=body.source or "upload",
                registration=await admitted(request, caller, name, body.registration(caller)),
            )
        )
    if data is not None:
        await blocking(
            partial(
                evaluations(request).configure,
                name,
                caller.tenant,
                cause(caller, body.reason),
                data=data,
            )
        )
    return card


@asynccontextmanager
async def _staging(service: AdapterService) -> AsyncIterator[Staging]:
    """The service's staging, entered and left on a worker thread, whatever happens within."""
    context = service.stage()
    staging = await blocking(context.__enter__)
    try:
        yield staging
    finally:
        # Shielded: a cancelled request must not leave its half of an upload on the disk.
        with anyio.CancelScope(shield=True):
            await blocking(partial(context.__exit__, None, None, None))


def _describe(request: Request) -> Callable[[AdapterCard], dict[str, Any]]:
    """Shows a version as JSON, with its place on the device now (null where it has none)."""
    stats = api_state(request).engine.stats()
    on_device = {r.ref.digest: r for r in stats.resident}

    def described(card: AdapterCard) -> dict[str, Any]:
        resident = on_device.get(card.ref.digest)
        whole = card.ref.composition
        return {
            "name": card.ref.name,
            "version": card.ref.version,
            "digest": card.ref.digest,
            "family": card.family,
            "max_rank": card.max_rank,
            "nbytes": card.nbytes,
            "created": card.created,
            "stable": card.stable,
            **({} if whole is None else {"composition": shown(whole)}),
            "resident": None if resident is None else _place(resident),
            "waiting": str(card.ref) in stats.waiting_adapters,
        }

    return described


def _place(resident: ResidentAdapter) -> dict[str, Any]:
    return {"slot": resident.slot, "leases": resident.leases, "pinned": resident.pinned}


def _version(record: AdapterRecord) -> dict[str, Any]:
    return {
        "version": record.ref.version,
        "state": record.state.value,
        "digest": record.ref.digest,
        "base_digest": record.base_digest,
        "tenant": record.tenant,
        "family": record.family,
        "max_rank": record.max_rank,
        "nbytes": record.nbytes,
        "created": record.created,
        "by": record.actor,
        "source": record.source,
        "revision": record.revision,
        "metadata": dict(record.metadata),
    }
