"""A small OpenAI-compatible server on a real socket, which streams or misbehaves as it is told."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any


class FakeServer:
    """Streams ``max_tokens`` events, or misbehaves as ``mood(nth request)`` says."""

    def __init__(self, mood: Callable[[int], str] = lambda n: "well") -> None:
        self.mood = mood
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.connections = 0
        self.in_flight = 0
        self.most_in_flight = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head[:-4].split("\r\n")
        headers = {n.lower(): v.strip() for n, _, v in (line.partition(":") for line in lines)}
        if first.startswith("GET /health "):
            self._plain(writer, 200, {})
            return True
        if first.startswith("GET /v1/models "):
            models = {"data": [{"id": m} for m in ("base", "b-two", "a-one")]}
            self._plain(writer, 200, models)
            return True
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        if first.startswith("POST /v1/load_lora_adapter "):
            self._plain(writer, 200, {})
            return True
        mood = self.mood(len(self.bodies))
        self.bodies.append(body)
        self.headers.append(headers | {"path": first.split(" ")[1]})
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if mood == "busy":
                self._plain(writer, 429, {"error": {"message": "queue is full"}})
                return True
            return await self._stream(writer, body, mood)
        finally:
            self.in_flight -= 1

    @staticmethod
    def _plain(writer: asyncio.StreamWriter, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)

    async def _stream(self, writer: asyncio.StreamWriter, body: dict[str, Any], mood: str) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")

        def send(event: Any) -> None:
            text = event if isinstance(event, str) else json.dumps(event)
            data = f"data: {text}\r\n\r\n".encode()
            # In two pieces, so that an event and a line end are cut in the middle.
            for piece in (data[:-3], data[-3:]):
                writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")

        for index in range(body["max_tokens"]):
            if mood == "dies" and index == 2:
                return False
            if mood == "errs" and index == 2:
                send({"error": {"message": "broken adapter"}})
                break
            last = index == body["max_tokens"] - 1
            choice = {
                "text": "" if index == 1 else "x",
                "finish_reason": "length" if last else None,
            }
            send({"choices": [choice], "usage": None})
            await writer.drain()
        if mood != "no usage":
            count = len(body["prompt"]) if isinstance(body["prompt"], list) else 7
            usage = {"prompt_tokens": count, "completion_tokens": body["max_tokens"]}
            send({"choices": [], "usage": usage})
        if mood != "never done":
            send("[DONE]")
        writer.write(b"0\r\n\r\n")
        return True


@asynccontextmanager
async def running(fake: FakeServer) -> AsyncIterator[str]:
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def main(port: int) -> None:
    """Serves on a port until the process is ended."""
    server = await asyncio.start_server(FakeServer().serve, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
