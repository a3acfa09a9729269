"""A web server on loopback that misbehaves as it is told."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Web:
    """``files`` by path; ``redirects`` from path to address. ``cut``: after how many bytes each of
    the next answers of a path breaks off; ``gate``: where set, an answer's second half waits for
    it. ``asked``: (path, Range header) of each request.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    statuses: dict[str, int] = field(default_factory=dict)
    cut: dict[str, list[int]] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    lengths: bool = True
    ranges: bool = True
    gate: threading.Event | None = None
    half: threading.Event = field(default_factory=threading.Event)
    commit: str = ""
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class _Handler(BaseHTTPRequestHandler):
    web: Web
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def end_headers(self) -> None:
        self.send_header("connection", "close")  # a client must not send on what is being closed
        super().end_headers()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        web, path = self.web, self.path.partition("?")[0]
        wanted = self.headers.get("range")
        web.asked.append((path, wanted))
        self.close_connection = True
        if path in web.redirects:
            self.send_response(302)
            self.send_header("location", web.redirects[path])
            self.send_header("content-length", "0")
            self.end_headers()
            return
        if path in web.statuses or path not in web.files:
            self.send_response(web.statuses.get(path, 404))
            self.send_header("content-length", "0")
            self.end_headers()
            return
        data = web.files[path]
        tag = f'"{hashlib.sha256(data).hexdigest()[:8]}"'
        start = 0
        match = re.fullmatch(r"bytes=(\d+)-", wanted or "")
        if web.ranges and match and self.headers.get("if-range", tag) == tag:
            start = int(match[1])
            self.send_response(206)
            self.send_header("content-range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("etag", tag)
        if web.commit:  # as a hub does
            self.send_header("x-repo-commit", web.commit)
            self.send_header("content-type", "application/json")
        if web.lengths:
            self.send_header("content-length", str(len(data) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        body = data[start:]
        if web.cut.get(path):
            self.wfile.write(body[: web.cut[path].pop(0)])
            return
        if web.gate is not None and len(body) > 400:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            web.half.set()
            web.gate.wait(30)
            body = body[len(body) // 2 :]
        self.wfile.write(body)


@contextmanager
def web_server() -> Iterator[Web]:
    """Serves on a free loopback port until the block ends."""
    web = Web()
    handler = type("Handler", (_Handler,), {"web": web})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    web.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield web
    finally:
        if web.gate is not None:
            web.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()
