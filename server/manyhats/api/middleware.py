"""Around every request: its id, its line in the metrics, and the last resort for an unexpected
exception.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from manyhats.api.handlers import error_response, internal_error

REQUEST_ID_HEADER = "x-request-id"
CLIENT_GONE = 499
"""Status counted where the client went away before an answer began."""
_SANE_ID = re.compile(rb"[A-Za-z0-9._:\-]{1,128}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_log = logging.getLogger(__name__)


class RequestContextMiddleware:
    """Gives each request an id, counts its answer, and turns an unexpected exception into a 500 in
    our shape.

    A caller's ``x-request-id`` is kept when it has 1 to 128 characters out of letters, digits and
    ``._:-``; otherwise one is made. It names the request in logs and answers only; the engine has
    ids of its own. ``count(route, method, status)`` gets the route's template, never the path.
    """

    def __init__(self, app: ASGIApp, *, count: Callable[[str, str, int], None]) -> None:
        self._app = app
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, tagged)
        except Exception:
            _log.exception("request %s failed", request_id)
            if status:
                raise  # the answer has begun: only a broken connection can say that it is not whole
            await error_response(internal_error())(scope, receive, tagged)
        finally:
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._count(_route(scope), method, status or CLIENT_GONE)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SANE_ID.fullmatch(value):
            return str(value, "ascii")
    return uuid.uuid4().hex


def _route(scope: Scope) -> str:
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else "unmatched"
