"""What may be fetched: addresses of adapters, and the list of what the operator of the server
allows. Nothing is allowed by default.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from manyhats.errors import AdapterRejectedError, ConfigError, ServiceError

SETTING: Final = "--source-allow (MANYHATS_SOURCE_ALLOW)"
"""What to change where a source is refused."""

MAX_ADDRESS: Final = 1024
"""Bound of an address, characters."""

HUB_SCHEME: Final = "hf"
WEB_SCHEMES: Final = ("https", "http")
STORE_SCHEMES: Final = ("s3", "gs", "gcs")

_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PRINTABLE = re.compile(r"[!-~]+")
# Nothing encoded: what is compared is what is sent.
_PLAIN_PATH = re.compile(r"[A-Za-z0-9._~/+=@,-]*")
_PORTS: Final = {"https": 443, "http": 80}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository of the hub at a commit (40 hex digits): what it holds cannot change."""

    repo: str
    revision: str

    def check(self) -> None:
        """Raises AdapterRejectedError ``bad_source``."""
        if not _REPO.fullmatch(self.repo):
            raise _bad(f"hub is {self.repo[:140]!r}: an id like 'org/name' is expected", "hub")
        if not _COMMIT.fullmatch(self.revision):
            raise _bad(
                f"revision is {self.revision[:80]!r}: the 40 hex digits of a commit, as a branch "
                "or a tag may come to mean something else",
                "revision",
            )

    @property
    def url(self) -> str:
        """As the list of what is allowed has it."""
        return f"{HUB_SCHEME}://{self.repo}"

    def __str__(self) -> str:
        return f"{self.url}@{self.revision}"


@dataclass(frozen=True, slots=True)
class UrlSource:
    """A folder that holds an adapter's two files. ``sha256`` (hex): what the weights must be."""

    url: str
    sha256: str | None = None

    def check(self) -> None:
        """Raises AdapterRejectedError ``bad_source``."""
        split_url(self.url)
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise _bad("sha256: 64 lower-case hex digits", "sha256")

    def __str__(self) -> str:
        return self.url


Source = HubSource | UrlSource


@dataclass(frozen=True, slots=True)
class Url:
    """An address in parts; ``port`` 0 where the scheme has none."""

    scheme: str
    host: str
    port: int
    path: str


def split_url(url: str, *, query: bool = False) -> Url:
    """An address in parts. ``query``: it may have one (where a redirect leads).

    Raises AdapterRejectedError ``bad_source`` for one with a user, a fragment, an encoded or a
    relative path, or another scheme than those named above.
    """
    schemes = (*WEB_SCHEMES, *STORE_SCHEMES)
    if not _PRINTABLE.fullmatch(url):  # the parser would take line ends and tabs out in silence
        raise _bad(f"url {url[:140]!r}: printable ASCII, no spaces")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise _bad(f"url {url[:140]!r}: {error}") from None
    scheme, host = parts.scheme.lower(), (parts.hostname or "").lower()
    if len(url) > MAX_ADDRESS and not query:
        raise _bad(f"url: at most {MAX_ADDRESS} characters")
    if scheme not in schemes or not host:
        raise _bad(f"url {url[:140]!r}: one of {', '.join(schemes)}, and a host or a bucket")
    if "@" in parts.netloc or parts.fragment or (parts.query and not query):
        raise _bad(f"url {url[:140]!r}: no user, query or fragment")
    if not _PLAIN_PATH.fullmatch(parts.path) or {".", ".."} & set(parts.path.split("/")):
        raise _bad(f"url {url[:140]!r}: a path of A-Z a-z 0-9 . _ ~ / + = @ , - without . and ..")
    return Url(scheme, host, port or _PORTS.get(scheme, 0), parts.path)


class AllowList:
    """Prefixes of addresses that may be fetched, and networks that a name among them may lead to.

    An entry is a prefix (``https://models.example/pub/``, ``s3://bucket/``, ``hf://org/``), which
    ends at a ``/`` whether it is written there or not, or a network (``10.0.0.0/8``). A name may
    lead to public addresses and to those networks; where an entry names an address itself, to that.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        """Raises ConfigError for an entry that is neither."""
        self._hub: list[str] = []
        self._urls: list[Url] = []
        self._networks: list[Network] = []
        for entry in entries:
            self._add(entry)

    def _add(self, entry: str) -> None:
        if "://" not in entry:
            try:
                self._networks.append(ipaddress.ip_network(entry))
            except ValueError:
                raise ConfigError(
                    f"source_allow: {entry!r} is neither a prefix like https://host/path/ nor a "
                    "network like 10.0.0.0/8",
                    param="source_allow",
                ) from None
        elif entry.startswith(f"{HUB_SCHEME}://"):
            self._hub.append(entry.removeprefix(f"{HUB_SCHEME}://").strip("/"))
        else:
            try:
                self._urls.append(split_url(entry))
            except AdapterRejectedError as error:
                raise ConfigError(f"source_allow: {error.message}", param="source_allow") from None

    def check(self, source: Source) -> None:
        """Raises AdapterRejectedError: ``bad_source``, ``source_not_allowed``."""
        source.check()
        if isinstance(source, UrlSource):
            self.check_url(source.url)
        elif not any(
            prefix in ("", source.repo, source.repo.split("/")[0]) for prefix in self._hub
        ):
            raise _not_allowed(source.url)

    def check_url(self, url: str, *, redirected: bool = False) -> Url:
        """The address in parts, if it may be fetched; else as ``check``."""
        parts = split_url(url, query=redirected)
        for allowed in self._urls:
            place = (allowed.scheme, allowed.host, allowed.port)
            prefix = allowed.path.rstrip("/") + "/"
            if place == (parts.scheme, parts.host, parts.port) and (
                (parts.path.rstrip("/") + "/").startswith(prefix)
            ):
                return parts
        at = urlsplit(url).netloc  # with the port: another one is another place
        raise _not_allowed(f"{parts.scheme}://{at}{parts.path}", redirected=redirected)

    def addresses(self, host: str, port: int) -> list[str]:
        """What ``host`` leads to now, as far as a connection may go there.

        Looked up once, and what is given here is connected to: a name that leads elsewhere a moment
        later changes nothing. Raises AdapterRejectedError ``source_not_allowed``, ServiceError (the
        name cannot be looked up).
        """
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise ServiceError(f"{host} cannot be looked up: {error}", param="source") from None
        texts = list(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found))
        usable = [t for t in texts if self._reachable(host, ipaddress.ip_address(t))]
        if not usable:
            raise _refused(
                f"{host} leads to {', '.join(texts[:3])}, which is no public address; name the "
                f"network itself in {SETTING} if it is meant"
            )
        return usable

    def _reachable(self, host: str, address: Address) -> bool:
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        address = mapped or address
        if address.is_global and not address.is_multicast:
            return True
        named = host == str(address)  # only what an entry names gets here
        return named or any(
            address in network for network in self._networks if network.version == address.version
        )


def _bad(message: str, param: str = "source") -> AdapterRejectedError:
    return AdapterRejectedError("bad_source", message, param=param)


def _refused(message: str) -> AdapterRejectedError:
    return AdapterRejectedError("source_not_allowed", message, param="source")


def _not_allowed(url: str, *, redirected: bool = False) -> AdapterRejectedError:
    how = "a redirect leads to " if redirected else ""
    return _refused(f"{how}{url[:200]!r}, which {SETTING} does not name")
