"""The bound on request bodies, and the check of their content type, before any byte is parsed.

Pure ASGI. A body is refused by its Content-Length before it is read; one that names none (chunked),
or that is longer than it said, as soon as the bytes received pass the bound. Memory held is never
more than the bound.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from manyhats.api.handlers import error_response
from manyhats.errors import BodyTooLargeError, ContentTypeError, ManyhatsError, RequestError

UPLOAD_PATH = "/admin/adapters"
"""The one path that takes a multipart upload."""
UPLOAD_SLACK = 1 << 20
"""Bytes that an upload may hold beside the adapter itself: its configuration and the multipart
framing.
"""

_JSON = "application/json"
_MULTIPART = "multipart/form-data"
_LINGER_S = 1.0
_LINGER_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class _Body:
    """What the headers say: ``length`` in bytes (None: not said), the media type in lower case."""

    length: int | None
    present: bool
    media_type: str


class BodyLimitMiddleware:
    """Refuses a body over the bound (413) or of another content type (415).

    ``json_bytes`` bounds every route; ``upload_bytes`` a multipart body on ``UPLOAD_PATH`` (POST).
    """

    def __init__(self, app: ASGIApp, *, json_bytes: int, upload_bytes: int) -> None:
        self._app = app
        self._json_bytes = json_bytes
        self._upload_bytes = upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = _read_headers(scope)
            limit = self._limit(scope, body)
            if body.length is not None and body.length > limit:
                raise _too_large(limit, f"of {body.length} bytes ")
        except ManyhatsError as error:
            await _refuse(error, scope, receive, send)
            return
        await _Guard(limit, scope, receive, send).run(self._app)

    def _limit(self, scope: Scope, body: _Body) -> int:
        """The bound in bytes for this request. Raises ContentTypeError."""
        upload = scope["method"] == "POST" and scope["path"].rstrip("/") == UPLOAD_PATH
        if upload and body.media_type == _MULTIPART:
            return self._upload_bytes
        if body.present and body.media_type != _JSON and scope["method"] not in ("GET", "HEAD"):
            takes = f"{_JSON} or {_MULTIPART}" if upload else _JSON
            raise ContentTypeError(
                f"content type must be {takes}, not {body.media_type[:100] or 'missing'}",
                param="content-type",
            )
        return self._json_bytes


class _Guard:
    """Counts one request's body as it comes; past the bound it answers 413 in the route's place."""

    def __init__(self, limit: int, scope: Scope, receive: Receive, send: Send) -> None:
        self._limit = limit
        self._scope = scope
        self._receive = receive
        self._send = send
        self._seen = 0
        self._started = False
        self._refused = False

    async def run(self, app: ASGIApp) -> None:
        """Runs the application behind the guard."""
        try:
            await app(self._scope, self._bounded_receive, self._guarded_send)
        except BodyTooLargeError:
            if not self._refused:
                raise

    async def _bounded_receive(self) -> Message:
        message = await self._receive()
        self._seen += len(message.get("body", b""))
        if self._seen <= self._limit:
            return message
        error = _too_large(self._limit)
        if not self._started and not self._refused:
            # answered here and now: a form parser in between would turn the error into a bare 400
            self._refused = True
            await _refuse(error, self._scope, self._receive, self._send)
        raise error

    async def _guarded_send(self, message: Message) -> None:
        if not self._refused:
            self._started = True
            await self._send(message)


def _read_headers(scope: Scope) -> _Body:
    length: int | None = None
    present = False
    media_type = ""
    for name, value in scope["headers"]:
        if name == b"content-length":
            if not value.isdigit() or len(value) > 18:
                raise RequestError(
                    "content-length must be a number of bytes", param="content-length"
                )
            length = int(value)
            present = present or length > 0
        elif name == b"transfer-encoding":
            present = True
        elif name == b"content-type":
            media_type = value.decode("latin-1").partition(";")[0].strip().lower()
    return _Body(length, present, media_type)


def _too_large(limit: int, size: str = "") -> BodyTooLargeError:
    return BodyTooLargeError(f"the request body {size}is over the bound of {limit} bytes")


async def _refuse(error: ManyhatsError, scope: Scope, receive: Receive, send: Send) -> None:
    """Sends the error and closes the connection.

    Closing at once, with bytes of the body unread, would reset the connection and could take the
    answer with it; so what is on its way is read and thrown away for a moment, within a bound of
    bytes and time.
    """
    response = error_response(error)
    response.headers["connection"] = "close"
    start: Message = {
        "type": "http.response.start",
        "status": response.status_code,
        "headers": response.raw_headers,
    }
    await send(start)
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    try:
        async with asyncio.timeout(_LINGER_S):
            await _discard(receive)
    except TimeoutError:
        pass  # a client that goes on sending meets the closed connection
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _discard(receive: Receive) -> None:
    left = _LINGER_BYTES
    while left > 0:
        message = await receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            return
        left -= len(message.get("body", b""))
