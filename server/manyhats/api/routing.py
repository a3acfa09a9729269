"""Which side of a canary a request gets: what it chooses, or what it sticks to."""

from __future__ import annotations

from typing import Final

from fastapi import Request

from manyhats.api.auth import Principal
from manyhats.api.schemas import SamplingFields
from manyhats.api.state import api_state
from manyhats.errors import RequestError
from manyhats.lifecycle.routes import RouteHint, Side

ROUTE_HEADER: Final = "x-manyhats-route"
"""The header by which a caller chooses: ``canary`` (where there is one) or ``stable``."""


def route_hint(request: Request, caller: Principal, body: SamplingFields) -> RouteHint:
    """What the request says: the header, or else its ``user`` (``safety_identifier``), or else the
    caller's API key. Without any of them each request is drawn anew.

    Raises RequestError (the header).
    """
    sticky = ""
    if user := body.user or body.safety_identifier:
        sticky = f"user {caller.tenant} {user}"
    elif caller.key:
        sticky = f"key {caller.tenant} {caller.key}"
    else:
        settings = api_state(request).settings
        if settings.api_keys or settings.admin_api_keys:
            sticky = f"key {caller.tenant} {request.headers.get('authorization', '')}"
    return RouteHint(sticky, _side(request))


def _side(request: Request) -> Side | None:
    values = request.headers.getlist(ROUTE_HEADER)
    if not values:
        return None
    try:
        [value] = values
        return Side(value.strip().lower())
    except ValueError:
        raise RequestError(
            f"{ROUTE_HEADER} is {', '.join(values)[:100]!r}: 'canary' or 'stable', once",
            param=ROUTE_HEADER,
        ) from None
