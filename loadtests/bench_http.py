"""A small HTTP/1.1 client on bare asyncio, for streaming load.

The client usually shares its cores with the server under test, so its own cost per streamed chunk
matters: this one spends about 20 us an event. One connection carries one request at a time
(keep-alive).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_LIMIT = 1 << 20


class ProtocolError(Exception):
    """The peer broke HTTP/1.1 or closed the connection in the middle of an answer."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens. ``prefix`` is put before every path, without a trailing slash."""

    host: str
    port: int
    tls: bool = False
    prefix: str = ""

    @classmethod
    def parse(cls, url: str) -> Address:
        """An address from ``http://host:port/prefix``. Raises ValueError for anything else."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"base URL must look like http://host:port, got {url!r}")
        tls = parts.scheme == "https"
        return cls(parts.hostname, parts.port or (443 if tls else 80), tls, parts.path.rstrip("/"))


@dataclass(slots=True)
class Response:
    """An answer's head; its body is read through the connection that made it.

    Header names are lower-case.
    """

    status: int
    headers: Mapping[str, str]


@dataclass(slots=True)
class Connection:
    """A keep-alive connection to one address; connects by itself when needed."""

    address: Address
    headers: Mapping[str, str] = field(default_factory=dict)
    _reader: asyncio.StreamReader | None = None
    _writer: asyncio.StreamWriter | None = None
    _response: Response | None = None

    async def request(self, method: str, path: str, body: bytes | None = None) -> Response:
        """Sends a request and reads the answer's head. Raises OSError or ProtocolError.

        A kept connection that the server has closed meanwhile is opened anew, once.
        """
        reused = self._writer is not None
        try:
            return await self._exchange(method, path, body)
        except (OSError, ProtocolError, asyncio.IncompleteReadError):
            await self.close()
            if not reused:
                raise
        return await self._exchange(method, path, body)

    async def _exchange(self, method: str, path: str, body: bytes | None) -> Response:
        if self._reader is None or self._writer is None:
            context = ssl.create_default_context() if self.address.tls else None
            self._reader, self._writer = await asyncio.open_connection(
                self.address.host, self.address.port, ssl=context, limit=_LIMIT
            )
        lines = [
            f"{method} {self.address.prefix}{path} HTTP/1.1",
            f"host: {self.address.host}:{self.address.port}",
            "accept: */*",
            *(f"{name}: {value}" for name, value in self.headers.items()),
        ]
        if body is not None:
            lines += ["content-type: application/json", f"content-length: {len(body)}"]
        self._writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b""))
        await self._writer.drain()
        self._response = await self._read_head(self._reader)
        return self._response

    @staticmethod
    async def _read_head(reader: asyncio.StreamReader) -> Response:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except asyncio.IncompleteReadError as error:
            raise ProtocolError("connection closed before the answer's head") from error
        except asyncio.LimitOverrunError as error:
            raise ProtocolError(f"the answer's head is over {_LIMIT} bytes") from error
        first, *rest = head[:-4].split("\r\n")
        words = first.split(" ", 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdigit():
            raise ProtocolError(f"not an HTTP/1.1 answer: {first!r}")
        pairs = (line.partition(":") for line in rest)
        return Response(int(words[1]), {n.strip().lower(): v.strip() for n, _, v in pairs})

    async def body(self) -> AsyncIterator[bytes]:
        """The answer's body in the pieces in which it arrives.

        Raises ProtocolError when it is cut short.
        """
        if self._response is None or self._reader is None:
            raise ProtocolError("no answer to read")
        response, self._response = self._response, None
        headers = response.headers
        try:
            if "chunked" in headers.get("transfer-encoding", "").lower():
                async for piece in self._chunks(self._reader):
                    yield piece
            elif "content-length" in headers:
                yield await self._reader.readexactly(int(headers["content-length"]))
            else:
                while piece := await self._reader.read(65536):
                    yield piece
                await self.close()
        except asyncio.IncompleteReadError as error:
            raise ProtocolError("connection closed in the middle of a body") from error
        if headers.get("connection", "").lower() == "close":
            await self.close()

    @staticmethod
    async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
        while True:
            line = await reader.readuntil(b"\r\n")
            size = int(line.partition(b";")[0], 16)
            piece = await reader.readexactly(size + 2)
            if size == 0:
                return
            yield piece[:-2]

    async def read_all(self) -> bytes:
        """The whole body."""
        return b"".join([piece async for piece in self.body()])

    async def close(self) -> None:
        """Closes the connection; the next request opens another."""
        writer, self._reader, self._writer, self._response = self._writer, None, None, None
        if writer is not None:
            writer.close()


async def sse_data(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The ``data:`` payloads of a server-sent event stream, each once its event is complete."""
    rest = b""
    async for piece in pieces:
        rest += piece
        if b"\r" in rest:
            rest = rest.replace(b"\r\n", b"\n")
        *events, rest = rest.split(b"\n\n")
        for event in events:
            lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines:
                yield b"\n".join(lines)
