"""vLLM's routes for loading and unloading adapters: the same registry under other names.

Every route needs the operator's role and acts for one tenant (``api.auth.TENANT_HEADER``).
"""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Depends, Request
from fastapi.responses import PlainTextResponse

from manyhats.api.administration import Operator, adapters, admitted, blocking, cause
from manyhats.api.auth import require_operator
from manyhats.api.body import read_body
from manyhats.api.schemas import StrictModel, request_body
from manyhats.errors import ModelNotFoundError
from manyhats.lifecycle.records import Registration

router = APIRouter(tags=["admin"], dependencies=[Depends(require_operator)])


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


@router.post("/v1/load_lora_adapter", openapi_extra=request_body(LoadLoraRequest))
async def load_lora_adapter(request: Request, caller: Operator) -> PlainTextResponse:
    """vLLM's route: register a folder and start to bring it to the host tier.

    Idempotent: the same content under the same name again is a success as well.
    """
    body = await read_body(request, LoadLoraRequest)
    service = adapters(request)
    card = await blocking(
        partial(
            service.register_folder,
            body.lora_name,
            body.lora_path,
            tenant=caller.tenant,
            registration=await admitted(
                request, caller, body.lora_name, Registration(cause=cause(caller))
            ),
        )
    )
    service.prefetch(card.ref)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", openapi_extra=request_body(UnloadLoraRequest))
async def unload_lora_adapter(request: Request, caller: Operator) -> PlainTextResponse:
    """vLLM's route: delete the name with all its versions.

    Idempotent: a name that is not there is a success that says so. vLLM answers 404 to that, which
    controllers that retry until the state is as wanted would take for a failure.
    """
    body = await read_body(request, UnloadLoraRequest)
    service, name = adapters(request), body.lora_name
    try:
        await blocking(
            partial(service.delete, name, caller.tenant, force=True, cause=cause(caller))
        )
    except ModelNotFoundError:
        return PlainTextResponse("Success: no LoRA adapter of that name was loaded.")
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")
