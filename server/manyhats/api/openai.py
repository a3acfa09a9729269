"""OpenAI's routes: models, completions, chat completions."""

from __future__ import annotations

from itertools import groupby
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Request, Response

from manyhats.api.answers import chunks, whole_answer
from manyhats.api.auth import Principal, require_user
from manyhats.api.body import read_body
from manyhats.api.logprobs import TokenLabels
from manyhats.api.middleware import CLIENT_GONE
from manyhats.api.prompts import Job, plan_chat, plan_completion
from manyhats.api.routing import route_hint
from manyhats.api.schemas import ChatRequest, CompletionRequest, request_body
from manyhats.api.state import ApiState, api_state
from manyhats.api.stream import ClientGoneError, EventStream, while_connected
from manyhats.api.terms import terms_of
from manyhats.api.watching import watched
from manyhats.errors import ModelNotFoundError
from manyhats.lifecycle.directory import AdapterCard

SERVED_BY = "x-manyhats-served-by"
"""The header that says what served a generation: ``name@version`` or ``baseline``."""

router = APIRouter(prefix="/v1", tags=["openai"])


async def _principal(request: Request) -> Principal:
    """Who is asking; asynchronous, so that it costs no hop to a worker thread."""
    return require_user(request)


Caller = Annotated[Principal, Depends(_principal)]


@router.get("/models")
async def list_models(request: Request, caller: Caller) -> Response:
    """The base model, then every adapter that can be named in ``model``."""
    state = api_state(request)
    data = [_base_card(state)]
    cards = sorted(state.adapters.list(caller.tenant), key=lambda c: c.ref.name)
    for name, versions in groupby(cards, key=lambda c: c.ref.name):
        # What the name itself means comes first, then the other versions, the newest first.
        ordered = sorted(versions, key=lambda c: (not c.stable, -c.ref.version))
        if not ordered[0].stable:
            data.append(_base_card(state, name))
        data += [_adapter_card(state, c, name if c.stable else str(c.ref)) for c in ordered]
    return _json({"object": "list", "data": data})


@router.get("/models/{model_id:path}")
async def retrieve_model(request: Request, caller: Caller, model_id: str) -> Response:
    """One model by the name that a request would give. 404 lists near names."""
    state = api_state(request)
    ref = state.adapters.resolve(model_id, caller.tenant)
    if ref is None:
        return _json(_base_card(state, model_id))
    for card in state.adapters.list(caller.tenant):
        if card.ref == ref:
            return _json(_adapter_card(state, card, model_id))
    raise ModelNotFoundError(f"model {model_id[:256]!r} was removed just now", param="model")


@router.post("/completions", openapi_extra=request_body(CompletionRequest))
async def create_completion(request: Request, caller: Caller) -> Response:
    """Continues each prompt; streams where ``stream`` is true."""
    body = await read_body(request, CompletionRequest)
    hint = route_hint(request, caller, body)
    terms = terms_of(request, caller, body)
    job = terms.put_on(await plan_completion(api_state(request), body, caller.tenant, hint))
    return await _answer(request, job, stream=bool(body.stream), chat=False)


@router.post("/chat/completions", openapi_extra=request_body(ChatRequest))
async def create_chat_completion(request: Request, caller: Caller) -> Response:
    """Answers a conversation; streams where ``stream`` is true."""
    body = await read_body(request, ChatRequest)
    hint = route_hint(request, caller, body)
    terms = terms_of(request, caller, body)
    job = terms.put_on(await plan_chat(api_state(request), body, caller.tenant, hint))
    return await _answer(request, job, stream=bool(body.stream), chat=True)


async def _answer(request: Request, job: Job, *, stream: bool, chat: bool) -> Response:
    state = api_state(request)
    deltas = watched(state, job)
    if state.shadows is not None:
        deltas = state.shadows.beside(job, deltas)
    labels: TokenLabels = request.app.state.manyhats_labels
    headers = {SERVED_BY: job.served_by}
    if stream:
        return EventStream(chunks(deltas, job, labels, chat=chat), headers)
    try:
        work = whole_answer(deltas, job, labels, chat=chat)
        return _json(await while_connected(request.receive, work), headers)
    except ClientGoneError:
        return Response(status_code=CLIENT_GONE)


def _base_card(state: ApiState, name: str | None = None) -> dict[str, Any]:
    """The base's card; ``name``: an adapter's, which the base answers for now."""
    model = state.engine.model
    name = name or model.id
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "manyhats",
        "root": model.id,
        "parent": None if name == model.id else model.id,
        "max_model_len": model.context_len,
    }


def _adapter_card(state: ApiState, card: AdapterCard, name: str) -> dict[str, Any]:
    """An adapter's card; ``root`` is the version that the name means, ``parent`` the base."""
    return {
        "id": name,
        "object": "model",
        "created": card.created,
        "owned_by": "manyhats",
        "root": str(card.ref),
        "parent": state.engine.model.id,
        "max_model_len": state.engine.model.context_len,
        "adapter": {
            "digest": card.ref.digest,
            "family": card.family,
            "max_rank": card.max_rank,
            "bytes": card.nbytes,
        },
    }


def _json(body: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), media_type="application/json", headers=headers)
