"""Every failure as OpenAI's error shape: ``{"error": {"message", "type", "code", "param"}}``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from manyhats.errors import (
    AuthenticationError,
    ManyhatsError,
    PermissionDeniedError,
    RequestError,
    ServiceError,
)

MAX_MESSAGE = 2000
"""Characters of an error message that are shown; a longer one is cut."""
_MAX_PROBLEMS = 4
_BODY_LOCATIONS = frozenset({"body", "query", "path", "header", "cookie"})


def error_body(error: ManyhatsError) -> dict[str, Any]:
    """The error as the JSON object that clients expect."""
    return _body(error.message, error.type, error.code, error.param)


def error_response(error: ManyhatsError) -> Response:
    """The error as a response: its class's status, and ``Retry-After`` (whole seconds) where it
    names one.
    """
    headers = {}
    if isinstance(error, ServiceError) and error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, AuthenticationError):
        headers["www-authenticate"] = "Bearer"
    return _json(error_body(error), error.status, headers)


def internal_error() -> ManyhatsError:
    """What a caller is told of a defect of ours: nothing of its inside."""
    return ManyhatsError("internal error; the server's log has it under this x-request-id")


def describe_validation(problems: Sequence[Mapping[str, Any]]) -> RequestError:
    """Pydantic's problems as one error: the message names each field and its bound, ``param`` the
    first field.
    """
    described = [_describe(problem) for problem in problems[:_MAX_PROBLEMS]]
    message = "; ".join(f"{name}: {text}" if name else text for name, text in described)
    if len(problems) > _MAX_PROBLEMS:
        message += f"; and {len(problems) - _MAX_PROBLEMS} more"
    return RequestError(message, param=(described[0][0] or None) if described else None)


def install_handlers(app: FastAPI) -> None:
    """Registers the handlers of every error that a route may raise."""

    async def known(_: Request, exc: Exception) -> Response:
        return error_response(exc if isinstance(exc, ManyhatsError) else internal_error())

    async def invalid(_: Request, exc: Exception) -> Response:
        problems = exc.errors() if isinstance(exc, RequestValidationError | ValidationError) else []
        return error_response(describe_validation(problems))

    async def http(_: Request, exc: Exception) -> Response:
        return (
            _from_http(exc) if isinstance(exc, HTTPException) else error_response(internal_error())
        )

    app.add_exception_handler(ManyhatsError, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


def _from_http(exc: HTTPException) -> Response:
    """Starlette's own refusals (no such route, method not allowed) in our shape."""
    kind = {401: AuthenticationError.type, 403: PermissionDeniedError.type}.get(exc.status_code)
    if kind is None:
        kind = RequestError.type if exc.status_code < 500 else ManyhatsError.type
    code = HTTPStatus(exc.status_code).phrase.lower().replace(" ", "_").replace("-", "_")
    return _json(_body(str(exc.detail), kind, code, None), exc.status_code, dict(exc.headers or {}))


def _describe(problem: Mapping[str, Any]) -> tuple[str, str]:
    """One problem as (field, text): ``("messages[0].content", "field required")``."""
    location = list(problem.get("loc", ()))
    if len(location) > 1 and location[0] in _BODY_LOCATIONS:  # alone, it is a field of that name
        location = location[1:]
    name = ""
    for part in location:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    context = problem.get("ctx") or {}
    name += str(context.get("at", ""))
    if problem.get("type") == "extra_forbidden":
        return _cut(name, 200), "unknown field"
    text = str(problem.get("msg", "invalid")).removeprefix("Value error, ")
    return _cut(name, 200), text[:1].lower() + text[1:]


def _body(message: str, kind: str, code: str, param: str | None) -> dict[str, Any]:
    shown = {"message": _cut(message, MAX_MESSAGE), "type": kind, "code": code, "param": param}
    return {"error": shown}


def _cut(text: str, limit: int) -> str:
    """At most ``limit`` characters, and nothing that JSON cannot carry (lone surrogates)."""
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _json(body: Mapping[str, Any], status: int, headers: Mapping[str, str]) -> Response:
    return Response(
        orjson.dumps(body), status_code=status, headers=dict(headers), media_type="application/json"
    )
