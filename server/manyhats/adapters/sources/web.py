"""Files over HTTP: bounded while they come, gone on with where a connection broke, and never off
the list of what is allowed, whatever a redirect or a name server says.

httpcore is used rather than a client above it, since this needs a say in which address a connection
goes to; it reads no proxy and no credentials from the environment.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Final
from urllib.parse import urljoin

import httpcore

from manyhats.adapters.sources.address import AllowList
from manyhats.adapters.sources.partial import PartialFile
from manyhats.errors import AdapterRejectedError, ServiceError

logger = logging.getLogger(__name__)

_REDIRECTS: Final = (301, 302, 303, 307, 308)
_MAX_REDIRECTS: Final = 5
_MAX_TRIES: Final = 5
_TIMEOUT_S: Final = 30.0

_Headers = dict[str, str]


class WebFetcher:
    """Fetches files from where ``allow`` says. For one thread. ``wait`` sleeps between tries."""

    def __init__(
        self,
        allow: AllowList,
        timeout_s: float = _TIMEOUT_S,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self._wait = wait
        self._allow = allow
        self._pool = httpcore.ConnectionPool(network_backend=_Checked(allow), max_connections=2)
        self._timeouts = dict.fromkeys(("connect", "read", "write", "pool"), timeout_s)

    def close(self) -> None:
        """Close the connections."""
        self._pool.close()

    def fetch(self, url: str, file: PartialFile) -> bool:
        """Bring ``file`` to the whole of what ``url`` gives; False where there is no such thing.

        A broken connection is taken up where it broke, as long as each try brings something. Raises
        AdapterRejectedError (``source_not_allowed``, ``too_large``, ``source_refused``),
        ServiceError (it breaks again and again, or the other side fails).
        """
        idle = 0
        while True:
            before = file.size
            try:
                found = self._try(url, file)
            except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException) as e:
                idle = 0 if file.size > before else idle + 1
                logger.info("fetching %s broke off at %d bytes: %r", url, file.size, e)
                if idle >= _MAX_TRIES:
                    raise ServiceError(
                        f"{url} broke off at {file.size} bytes, {idle} times: {e!r}; register it "
                        "again to go on from there",
                        param="source",
                    ) from e
                self._wait(0.2 * 2**idle)
                continue
            if found and not file.complete:
                raise ServiceError(f"{url} ended at {file.size} bytes", param="source")
            return found

    def _try(self, url: str, file: PartialFile) -> bool:
        headers = {"accept-encoding": "identity", "user-agent": "manyhats"}
        if file.size and file.version:
            headers |= {"range": f"bytes={file.size}-", "if-range": file.version}
        for hop in range(_MAX_REDIRECTS + 1):
            self._allow.check_url(url, redirected=hop > 0)
            sent = [("host", _authority(url)), *headers.items()]
            with self._pool.stream(
                "GET", url, headers=sent, extensions={"timeout": self._timeouts}
            ) as answer:
                told = {k.decode().lower(): v.decode("latin-1") for k, v in answer.headers}
                if answer.status not in _REDIRECTS:
                    return _receive(answer, told, url, file)
            url = urljoin(url, told.get("location", ""))
        raise AdapterRejectedError(
            "source_refused", f"more than {_MAX_REDIRECTS} redirects", param="source"
        )


def _receive(answer: httpcore.Response, told: _Headers, url: str, file: PartialFile) -> bool:
    """An answer that is no redirect; False: 404."""
    if answer.status == 404:
        return False
    if answer.status == 416:  # what is there is no part of what there is now
        file.begin("", None, resumed=False)
        raise httpcore.RemoteProtocolError("the range is not there")
    if answer.status in (200, 206) and told.get("content-encoding", "identity") == "identity":
        resumed = answer.status == 206
        total = _total(told, file.size) if resumed else _number(told.get("content-length"))
        file.begin(_version(told), total, resumed=resumed)
        for chunk in answer.iter_stream():
            file.write(chunk)
        return True
    if answer.status >= 500 or answer.status in (408, 429):
        raise ServiceError(f"{url} answers {answer.status}; try again", param="source")
    raise AdapterRejectedError("source_refused", f"{url} answers {answer.status}", param="source")


def _version(told: _Headers) -> str:
    """What identifies the bytes: a strong entity tag, else the date of the last change."""
    tag = told.get("etag", "")
    return tag if tag and not tag.startswith("W/") else told.get("last-modified", "")


def _total(told: _Headers, size: int) -> int | None:
    """The whole file's bytes by ``Content-Range``; ServiceError where it is not the rest."""
    unit, _, told_range = told.get("content-range", "").partition(" ")
    span, _, whole = told_range.partition("/")
    if unit != "bytes" or span.partition("-")[0] != str(size):
        raise ServiceError(
            f"asked for the bytes from {size} on, the answer has {told_range[:80]!r}",
            param="source",
        )
    return _number(whole)


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else None


def _authority(url: str) -> str:
    return url.split("://", 1)[1].split("/", 1)[0]


class _Checked(httpcore.SyncBackend):
    """Connects to the addresses that are allowed, looked up once for each connection."""

    def __init__(self, allow: AllowList) -> None:
        self._allow = allow

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        failure: Exception = httpcore.ConnectError(f"{host} has no address")
        for address in self._allow.addresses(host, port):
            try:
                return super().connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure
