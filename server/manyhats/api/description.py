"""The OpenAPI document: what FastAPI makes of the routes, and the errors that each may answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from fastapi import FastAPI

from manyhats.api.auth import OPEN_ROUTES

ERROR_SCHEMA: Final = {
    "title": "Error",
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code", "param"],
            "properties": {
                "message": {"type": "string", "description": "Names the field and the bound."},
                "type": {"type": "string"},
                "code": {"type": "string", "description": "Stable; see manyhats/errors.py."},
                "param": {"type": ["string", "null"], "description": "The field, if it is one."},
            },
        }
    },
}
"""OpenAI's shape, which every error has."""

_EXAMPLES: Final = {
    400: ("invalid_request", "invalid_request_error", "percent: must be at most 100", "percent"),
    401: ("invalid_api_key", "authentication_error", "the API key is not known", None),
    403: (
        "permission_denied", "permission_error", "this needs the operator role", None,
    ),
    404: ("model_not_found", "not_found_error", "no model or adapter 'pirat'", "model"),
    409: ("conflict", "conflict_error", "adapter 'pirate' has no canary: stable 3", None),
    413: ("body_too_large", "invalid_request_error", "the body is over the bound", None),
    429: ("queue_full", "rate_limit_error", "the queue holds 1024 sequences", None),
    503: ("service_unavailable", "server_error", "the registry cannot be written", None),
    504: ("deadline_exceeded", "timeout_error", "the request's time was up after 5 s", "timeout"),
}  # fmt: skip

_MEANINGS: Final = {
    400: "The request is not valid; `param` names the field",
    401: "No API key, or one that is not known",
    403: "The key may not do this",
    404: "There is no such thing, or it is another tenant's",
    409: "The state of the named thing does not allow this now",
    413: "The body is over its bound",
    429: "The queue is full or a quota used up; Retry-After says when to come back",
    503: "The server cannot do this now; try again",
    504: "The request was not done in its time (x-manyhats-timeout)",
}


def describe(app: FastAPI) -> None:
    """Makes ``app.openapi`` add the errors of each route to what FastAPI knows."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = plain()
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            schemas["Error"] = ERROR_SCHEMA
            for path, methods in document["paths"].items():
                for method, operation in methods.items():
                    _add(operation, statuses(path, method))
        return app.openapi_schema or plain()

    app.openapi = described  # type: ignore[method-assign]


def statuses(path: str, method: str) -> list[int]:
    """The errors that a route may answer."""
    if path in OPEN_ROUTES:
        return [503]
    found = [400, 401, 403]
    if "{" in path or method != "get":
        found.append(404)
    if method != "get":
        found += [409, 413] if path.startswith(("/admin", "/v1/load", "/v1/unload")) else [413]
    if path.endswith("completions"):
        found += [429, 504]
    return sorted([*found, 503])


def _add(operation: dict[str, Any], wanted: Iterable[int]) -> None:
    answers = operation.setdefault("responses", {})
    answers.pop("422", None)  # FastAPI's own; here such a thing is a 400
    for status in wanted:
        code, kind, message, param = _EXAMPLES[status]
        error = {"message": message, "type": kind, "code": code, "param": param}
        answers[str(status)] = {
            "description": _MEANINGS[status],
            "content": {
                "application/json": {
                    "schema": {"$ref": "#/components/schemas/Error"},
                    "example": {"error": error},
                }
            },
        }
