"""Registrations that are being fetched: to watch, and to end."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Depends, Request

from manyhats.api.administration import Operator
from manyhats.api.auth import require_operator
from manyhats.api.state import api_state
from manyhats.errors import ServiceError
from manyhats.lifecycle.directory import AdapterCard
from manyhats.lifecycle.operations import Operation, Operations

router = APIRouter(tags=["admin"], dependencies=[Depends(require_operator)])


@router.get("/admin/operations")
async def list_operations(request: Request, caller: Operator) -> dict[str, Any]:
    """The registrations from elsewhere that run, and the latest that have ended, oldest first."""
    found = running_operations(request).list(caller.tenant)
    return {"object": "list", "data": [operation.shown() for operation in found]}


@router.get("/admin/operations/{ident}")
async def show_operation(request: Request, caller: Operator, ident: str) -> dict[str, Any]:
    """How far a registration is: its ``state`` (queued, fetching, checking, succeeded, failed or
    cancelled), the bytes that are there and those expected, the version it came to, or its error.
    """
    return running_operations(request).get(ident, caller.tenant).shown()


@router.delete("/admin/operations/{ident}")
async def cancel_operation(request: Request, caller: Operator, ident: str) -> dict[str, Any]:
    """End a registration at its next bytes, which stay: the same one again goes on from there."""
    return running_operations(request).cancel(ident, caller.tenant).shown()


def running_operations(request: Request) -> Operations:
    """The operations of the application that serves ``request``. Raises ServiceError without."""
    operations = api_state(request).operations
    if operations is None:
        raise ServiceError("this server registers nothing from elsewhere", param="source")
    return operations


async def result(operation: Operation) -> AdapterCard:
    """The version that an operation comes to, once it has. Raises what ended it otherwise.

    A caller who goes away leaves it running.
    """
    await asyncio.shield(asyncio.wrap_future(operation.done))
    if operation.error is not None:
        raise operation.error
    if operation.card is None:
        raise RuntimeError(f"{operation.id} has neither come to a version nor failed")
    return operation.card
