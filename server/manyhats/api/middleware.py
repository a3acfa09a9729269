"""Around every request: its id, its line in the metrics and in the log, its span, and the last
resort for an unexpected exception.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from manyhats.api.handlers import error_response, internal_error
from manyhats.telemetry import logs
from manyhats.telemetry.record import RequestRecord, Tracer, enter
from manyhats.telemetry.traceparent import HEADER, STATE_HEADER, TraceParent

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
    A caller's ``traceparent`` goes to the log and comes back in the answer; with a ``tracer`` it is
    the parent of a span of ours, whose ``traceparent`` the answer then has.
    """

    def __init__(
        self, app: ASGIApp, *, count: Callable[[str, str, int], None], tracer: Tracer | None = None
    ) -> None:
        self._app = app
        self._count = count
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = _record(scope)
        scope.setdefault("state", {})["request_id"] = record.id
        enter(record)
        if self._tracer is not None:
            self._tracer.begin(record)
        given = [(b"x-request-id", record.id.encode())]
        if record.trace is not None:
            given.append((HEADER.encode(), str(record.trace).encode()))
        status = 0

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), *given]}
            await send(message)

        try:
            await self._app(scope, receive, tagged)
        except Exception:
            _log.exception("request %s failed", record.id)
            if status:
                raise  # the answer has begun: only a broken connection can say that it is not whole
            await error_response(internal_error())(scope, receive, tagged)
        finally:
            record.route, record.status = _route(scope), status or CLIENT_GONE
            record.ended = time.monotonic()
            self._count(record.route, record.method, record.status)
            logs.access(record)
            if self._tracer is not None:
                self._tracer.end(record)


def _record(scope: Scope) -> RequestRecord:
    record = RequestRecord(
        _request_id(scope), scope["method"] if scope["method"] in _METHODS else "other"
    )
    parents = [value for name, value in scope["headers"] if name == HEADER.encode()]
    if len(parents) == 1:
        record.parent = record.trace = TraceParent.parse(parents[0].decode("latin-1"))
    if record.parent is not None:
        states = [v.decode("latin-1") for n, v in scope["headers"] if n == STATE_HEADER.encode()]
        record.trace_state = ",".join(states)
    return record


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SANE_ID.fullmatch(value):
            return str(value, "ascii")
    return uuid.uuid4().hex


def _route(scope: Scope) -> str:
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else "unmatched"
