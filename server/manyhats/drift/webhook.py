"""Telling somebody of an alarm: one signed POST each, off a bounded queue, tried again a few times.

The body is JSON; ``x-manyhats-signature`` is ``t=<Unix seconds>,v1=<hex>``, where the hex is the
HMAC-SHA256 of ``<t>.<body>`` under the secret, so that a receiver can refuse what is forged or
played again. ``x-manyhats-delivery`` is the same for every try of one alarm.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import queue
import random
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Final

import httpx
import orjson

logger = logging.getLogger(__name__)

SIGNATURE: Final = "x-manyhats-signature"
DELIVERY: Final = "x-manyhats-delivery"
_WAITING: Final = 256
_TRIES: Final = 6
_FIRST_WAIT_S: Final = 1.0
_LONGEST_WAIT_S: Final = 60.0
_TIMEOUT_S: Final = 10.0


def signature(secret: str, at: int, body: bytes) -> str:
    """The header's value for ``body`` sent at ``at``."""
    told = hmac.new(secret.encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={at},v1={told}"


def wait_before(attempt: int, draw: float) -> float:
    """Seconds before try ``attempt`` (1 is the second one): exponential, fully jittered by ``draw``
    in [0, 1), from 1 s to a minute.
    """
    return float(min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (attempt - 1)) * (0.5 + draw / 2))


class Webhook:
    """Sends to ``url`` on a thread of its own. ``dropped`` is told of what was given up."""

    def __init__(
        self,
        url: str,
        secret: str,
        dropped: Callable[[], None],
        *,
        clock: Callable[[], float] = time.time,
        wait: Callable[[int, float], float] = wait_before,
    ) -> None:
        self._url = url
        self._secret = secret
        self._dropped = dropped
        self._clock = clock
        self._wait = wait
        self._queue: queue.Queue[tuple[str, bytes] | None] = queue.Queue(_WAITING)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="drift-webhook", daemon=True)
        self._thread.start()

    def send(self, event: Mapping[str, Any]) -> bool:
        """Queue one event; False (and counted) where the queue is full."""
        try:
            self._queue.put_nowait((uuid.uuid4().hex, orjson.dumps(event)))
        except queue.Full:
            self._dropped()
            return False
        return True

    def close(self, timeout: float = 2.0) -> None:
        """Send what waits, for a while; then give up."""
        try:
            self._queue.put(None, timeout=timeout)
        except queue.Full:
            logger.error("alarms still wait for the webhook: they are given up")
        self._thread.join(timeout)
        self._stopping.set()
        self._thread.join(timeout)

    def _run(self) -> None:
        with httpx.Client(timeout=_TIMEOUT_S) as http:
            while (item := self._queue.get()) is not None:
                if not self._deliver(http, *item):
                    self._dropped()

    def _deliver(self, http: httpx.Client, ident: str, body: bytes) -> bool:
        for attempt in range(_TRIES):
            draw = random.random()  # noqa: S311 - spreads retries, keeps no secret
            if attempt and self._stopping.wait(self._wait(attempt, draw)):
                return False
            at = int(self._clock())
            headers = {
                "content-type": "application/json",
                SIGNATURE: signature(self._secret, at, body),
                DELIVERY: ident,
            }
            try:
                answer = http.post(self._url, content=body, headers=headers)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                logger.warning("the drift webhook did not answer: %s", error)
                continue
            if answer.is_success:
                return True
            logger.warning("the drift webhook answered %d", answer.status_code)
            if answer.status_code < 500 and answer.status_code not in (408, 425, 429):
                return False
        return False
