"""Server-sent events, and the watch on the client's connection.

A client that goes away cancels the work at once, streaming or not: the generators are closed, and
with them the engine's request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from manyhats.api.handlers import error_body, internal_error
from manyhats.errors import ManyhatsError

T = TypeVar("T")
_log = logging.getLogger(__name__)
_DONE = b"data: [DONE]\n\n"


class ClientGoneError(Exception):
    """The client closed the connection before the answer was done."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """``work``'s result. Cancels it, waits until it is unwound and raises ClientGoneError on a
    disconnect.

    The request's body must have been read.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            watch.result()
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class EventStream(Response):
    """Chunks as server-sent events, ``data: [DONE]`` at the end.

    The status line waits for the first chunk, so that a request that the engine refuses gets its
    own status (429, say). A failure later becomes one ``data: {"error": ...}`` event, after which
    the stream ends with no ``[DONE]``.
    """

    media_type = "text/event-stream"

    def __init__(
        self, chunks: AsyncGenerator[dict[str, Any]], headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(
            headers={"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})}
        )
        del self.headers["content-length"]
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry. Raises what the chunks raise before the first of them."""
        try:
            await while_connected(receive, self._run(send))
        except ClientGoneError:
            return

    async def _run(self, send: Send) -> None:
        async with aclosing(self._chunks) as chunks:
            first = await anext(chunks)
            start: Message = {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
            await _send(send, start)
            await _send_part(send, _data(first))
            last = await self._rest(chunks, send)
            await _send_part(send, last, more=False)

    async def _rest(self, chunks: AsyncGenerator[dict[str, Any]], send: Send) -> bytes:
        """Sends the further chunks; returns what the stream ends with."""
        while True:
            try:
                chunk = await anext(chunks)
            except StopAsyncIteration:
                return _DONE
            except ManyhatsError as error:
                return _data(error_body(error))
            except Exception:  # noqa: BLE001 - logged, and told to the client
                _log.exception("a stream failed")
                return _data(error_body(internal_error()))
            await _send_part(send, _data(chunk))


async def _send_part(send: Send, data: bytes, *, more: bool = True) -> None:
    await _send(send, {"type": "http.response.body", "body": data, "more_body": more})


async def _send(send: Send, message: Message) -> None:
    try:
        await send(message)
    except OSError:
        raise ClientGoneError from None  # ASGI's way to say that the connection is gone


def _data(value: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
