"""The webhook against a real HTTP receiver: signed, tried again, bounded."""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Queue

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.drift.webhook import DELIVERY, SIGNATURE, Webhook, wait_before

SECRET = "a secret"


@contextmanager
def receiver(statuses):
    """(url, queue of (headers, body)); answers with ``statuses`` in turn, then with 204."""
    came: Queue = Queue()
    left = list(statuses)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            self.send_response(left.pop(0) if left else 204)
            self.send_header("content-length", "0")
            self.end_headers()
            came.put((dict(self.headers.items()), body))

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/drift", came
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def hook(url, dropped, waits=None):
    def wait(attempt, draw):
        if waits is not None:
            waits.append(wait_before(attempt, draw))
        return 0.0

    made = Webhook(url, SECRET, lambda: dropped.append(1), clock=lambda: 1234.9, wait=wait)
    try:
        yield made
    finally:
        made.close()


def test_an_event_is_signed_and_can_be_checked():
    dropped = []
    with receiver([]) as (url, came), hook(url, dropped) as sender:
        assert sender.send({"event": "drift", "name": "pirate"})
        headers, body = came.get(timeout=30)
    assert json.loads(body) == {"event": "drift", "name": "pirate"}
    told = dict(part.split("=") for part in headers[SIGNATURE].split(","))
    assert told["t"] == "1234"
    good = hmac.new(SECRET.encode(), b"1234." + body, hashlib.sha256).hexdigest()
    assert hmac.compare_digest(told["v1"], good)
    assert dropped == []


def test_it_is_tried_again_and_the_delivery_says_that_it_is_the_same():
    dropped, waits = [], []
    with receiver([500, 503, 429]) as (url, came), hook(url, dropped, waits) as sender:
        sender.send({"n": 1})
        tries = [came.get(timeout=30) for _ in range(4)]
    assert len({headers[DELIVERY] for headers, _ in tries}) == 1
    assert len({body for _, body in tries}) == 1
    assert len(waits) == 3
    assert dropped == []


@pytest.mark.parametrize(("statuses", "tries"), [([400], 1), ([500] * 9, 6)])
def test_what_is_refused_or_fails_too_often_is_given_up_and_counted(statuses, tries):
    dropped = []
    with receiver(statuses) as (url, came), hook(url, dropped) as sender:
        sender.send({"n": 1})
        for _ in range(tries):
            came.get(timeout=30)
    assert came.empty()
    assert dropped == [1]


def test_a_receiver_that_is_gone_fills_the_queue_and_holds_up_nobody():
    dropped = []
    made = Webhook("http://127.0.0.1:1/", SECRET, lambda: dropped.append(1), wait=lambda *_: 3600.0)
    taken = [made.send({"n": n}) for n in range(300)]
    assert 256 <= sum(taken) <= 257
    assert len(dropped) == 300 - sum(taken)
    made._stopping.set()
    made.close()
    assert not made._thread.is_alive()


@given(st.integers(1, 50), st.floats(0, 1, exclude_max=True))
def test_waits_grow_to_a_bound_with_jitter(attempt, draw):
    wait = wait_before(attempt, draw)
    longest = min(60.0, 2.0 ** (attempt - 1))
    assert longest / 2 <= wait <= longest
