"""Administration: register, list, show and delete adapters, in our own routes and in vLLM's.

Every route needs the operator's role and acts for one tenant (``api.auth.TENANT_HEADER``). What
blocks on the disk runs on worker threads, a few at a time, so that a crowd of uploads leaves
threads to everybody else.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final, TypeVar

import anyio
import anyio.to_thread
from fastapi import APIRouter, Depends, Request
from fastapi.responses import PlainTextResponse

from manyhats.adapters.store import Staging
from manyhats.api.auth import acting_tenant, require_operator
from manyhats.api.body import read_body
from manyhats.api.schemas import StrictModel
from manyhats.api.state import api_state
from manyhats.api.upload import UploadReader, boundary_of
from manyhats.engine.interface import ResidentAdapter
from manyhats.errors import ContentTypeError, ModelNotFoundError
from manyhats.lifecycle.directory import AdapterCard
from manyhats.lifecycle.service import AdapterService

router = APIRouter(tags=["admin"], dependencies=[Depends(require_operator)])

_T = TypeVar("_T")
_BLOCKING: Final = anyio.CapacityLimiter(8)


class RegisterRequest(StrictModel):
    """Body of ``POST /admin/adapters`` as JSON. ``path``: a folder within an allowed root."""

    name: str
    path: str


class LoadLoraRequest(StrictModel):
    """Body of ``POST /v1/load_lora_adapter``.

    ``base_model_name`` and ``load_inplace`` are there for the controllers that send them and change
    nothing: the weights themselves say whether they fit the base, and a name that exists always
    gets its next version while running requests keep theirs.
    """

    lora_name: str
    lora_path: str
    base_model_name: str | None = None
    load_inplace: bool | None = None


class UnloadLoraRequest(StrictModel):
    """Body of ``POST /v1/unload_lora_adapter``. ``lora_int_id`` changes nothing: names identify."""

    lora_name: str
    lora_int_id: int | None = None


@router.post("/admin/adapters", status_code=201)
async def register(request: Request) -> dict[str, Any]:
    """Register an adapter; the answer describes the version.

    As JSON ``{"name", "path"}``, or as multipart/form-data with the parts ``name``, ``config``
    (adapter_config.json) and ``weights`` (adapter_model.safetensors). The same content again is the
    version that is there already.
    """
    service = _service(request)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        card = await _receive(request, service)
    elif kind == "application/json":
        body = await read_body(request, RegisterRequest)
        tenant = acting_tenant(request)
        card = await _blocking(
            partial(service.register_folder, body.name, body.path, tenant=tenant)
        )
    else:
        raise ContentTypeError(
            f"content type must be application/json or multipart/form-data, not {kind[:100]!r}",
            param="content-type",
        )
    return _describe(request)(card)


@router.get("/admin/adapters")
async def list_adapters(request: Request) -> dict[str, Any]:
    """Every registered version, by name, oldest first, and whether it is on the device."""
    cards = _service(request).list(acting_tenant(request))
    return {"object": "list", "data": [*map(_describe(request), cards)]}


@router.get("/admin/adapters/{name}")
async def show(request: Request, name: str) -> dict[str, Any]:
    """One version, by ``name`` (its newest) or ``name@version``, and the name's other versions."""
    service = _service(request)
    card = service.get(name, acting_tenant(request))
    records = service.versions(card.ref.name, acting_tenant(request))
    [source] = [r.source for r in records if r.ref == card.ref]
    return {
        **_describe(request)(card),
        "source": source,
        "versions": [r.ref.version for r in records],
    }


@router.delete("/admin/adapters/{name}")
async def delete(request: Request, name: str) -> dict[str, Any]:
    """Delete every version of ``name``. Requests that run keep theirs until they end."""
    refs = await _blocking(partial(_service(request).delete, name, acting_tenant(request)))
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


@router.post("/v1/load_lora_adapter")
async def load_lora_adapter(request: Request) -> PlainTextResponse:
    """vLLM's route: register a folder and start to bring it to the host tier.

    Idempotent: the same content under the same name again is a success as well.
    """
    body = await read_body(request, LoadLoraRequest)
    service = _service(request)
    tenant = acting_tenant(request)
    card = await _blocking(
        partial(service.register_folder, body.lora_name, body.lora_path, tenant=tenant)
    )
    service.prefetch(card.ref)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(request: Request) -> PlainTextResponse:
    """vLLM's route: delete the name.

    Idempotent: a name that is not there is a success that says so. vLLM answers 404 to that, which
    controllers that retry until the state is as wanted would take for a failure.
    """
    body = await read_body(request, UnloadLoraRequest)
    name = body.lora_name
    try:
        await _blocking(partial(_service(request).delete, name, acting_tenant(request)))
    except ModelNotFoundError:
        return PlainTextResponse("Success: no LoRA adapter of that name was loaded.")
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


async def _receive(request: Request, service: AdapterService) -> AdapterCard:
    """Write an upload to its staging folder as it comes, then register it."""
    tenant = acting_tenant(request)
    async with _staging(service) as staging:
        reader = UploadReader(boundary_of(request), staging)
        async for chunk in request.stream():
            await _blocking(partial(reader.feed, chunk))
        name = reader.finish()
        return await _blocking(
            partial(
                service.register_staged,
                name,
                staging,
                tenant=tenant,
                source="upload",
            )
        )


@asynccontextmanager
async def _staging(service: AdapterService) -> AsyncIterator[Staging]:
    """The service's staging, entered and left on a worker thread, whatever happens within."""
    context = service.stage()
    staging = await _blocking(context.__enter__)
    try:
        yield staging
    finally:
        # Shielded: a cancelled request must not leave its half of an upload on the disk.
        with anyio.CancelScope(shield=True):
            await _blocking(partial(context.__exit__, None, None, None))


async def _blocking(call: Callable[[], _T]) -> _T:
    return await anyio.to_thread.run_sync(call, limiter=_BLOCKING)


def _service(request: Request) -> AdapterService:
    service: AdapterService = request.app.state.manyhats.adapters
    return service


def _describe(request: Request) -> Callable[[AdapterCard], dict[str, Any]]:
    """Shows a version as JSON, with its place on the device now (null where it has none)."""
    stats = api_state(request).engine.stats()
    on_device = {r.ref.digest: r for r in stats.resident}

    def described(card: AdapterCard) -> dict[str, Any]:
        resident = on_device.get(card.ref.digest)
        return {
            "name": card.ref.name,
            "version": card.ref.version,
            "digest": card.ref.digest,
            "family": card.family,
            "max_rank": card.max_rank,
            "nbytes": card.nbytes,
            "created": card.created,
            "resident": None if resident is None else _place(resident),
            "waiting": str(card.ref) in stats.waiting_adapters,
        }

    return described


def _place(resident: ResidentAdapter) -> dict[str, Any]:
    return {"slot": resident.slot, "leases": resident.leases, "pinned": resident.pinned}
