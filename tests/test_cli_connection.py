"""The command line against a server that closes a kept connection just as it is used again."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
import typer

from manyhats.commands.client import Client

RESET = struct.pack("ii", 1, 0)  # SO_LINGER of no time: closing sends RST


class Fickle:
    """Serves one connection after the other. It answers the first request; the next ``idle`` ones
    it only reads, and closes their connection (by RST where ``reset``): what a client sees where an
    idle connection is closed under it.
    """

    def __init__(self, *, idle: int, reset: bool) -> None:
        self._idle, self._reset = idle, reset
        self.asked: list[str] = []
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed: the test is over
            self.connections += 1
            with connection, connection.makefile("rb") as stream:
                self._serve(connection, stream)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self, connection: socket.socket, stream) -> None:
        while request := self._request(stream):
            self.asked.append(request)
            if self._idle and len(self.asked) > 1:
                self._idle -= 1
                if self._reset:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                return
            body = json.dumps({"n": len(self.asked)}).encode()
            head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n".encode()
            connection.sendall(head + body)

    @staticmethod
    def _request(stream) -> str:
        first, length = stream.readline(), 0
        while (line := stream.readline().strip()) != b"":
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        stream.read(length)
        return first.split(b" ")[0].decode()


@contextmanager
def fickle(*, idle: int, reset: bool) -> Iterator[tuple[Fickle, Client]]:
    server = Fickle(idle=idle, reset=reset)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        with httpx.Client(base_url=server.url, timeout=30, trust_env=False) as http:
            yield server, Client(http, as_json=False)
    finally:
        server.close()
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_poll_goes_on_over_a_new_connection(reset):
    with fickle(idle=1, reset=reset) as (server, client):
        assert client.call("GET", "/x") == {"n": 1}
        assert client.call("GET", "/x") == {"n": 3}
        assert client.call("GET", "/x") == {"n": 4}
        assert (server.asked, server.connections) == (["GET"] * 4, 2)


def test_a_poll_is_asked_twice_and_no_more(capsys):
    with fickle(idle=2, reset=True) as (server, client):
        client.call("GET", "/x")
        with pytest.raises(typer.Exit):
            client.call("GET", "/x")
        assert server.asked == ["GET"] * 3
        assert f"no answer from {server.url}" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_a_change_is_never_sent_twice(method, capsys):
    with fickle(idle=1, reset=True) as (server, client):
        client.call("GET", "/x")
        with pytest.raises(typer.Exit):
            client.call(method, "/x")
        assert server.asked == ["GET", method]
        assert "no answer from" in capsys.readouterr().err


def test_where_nobody_listens_is_told(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with httpx.Client(base_url=url, trust_env=False) as http, pytest.raises(typer.Exit):
        Client(http, as_json=False).call("GET", "/x")
    assert f"no answer from {url}" in capsys.readouterr().err
