"""Who is asking: API keys, roles, and the rule that no key means loopback only.

The rule is deny by default. The application factory puts ``require_user`` on every route but the
health and metrics ones; the admin routers put ``require_admin`` on theirs. With no key configured
everybody who reaches the socket is an admin, so ``check_exposure`` lets the server start only on a
loopback address, and requests that a browser sends from some web page are refused.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import ipaddress
import re
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request

from manyhats.config import Settings
from manyhats.errors import AuthenticationError, ConfigError, PermissionDeniedError
from manyhats.types import DEFAULT_TENANT, TenantId

_USABLE = re.compile(r"[!-~]+")


class Role(enum.Enum):
    """What a key may do. An admin may do all that a user may."""

    USER = "user"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is asking."""

    role: Role
    tenant: TenantId


@dataclass(frozen=True, slots=True)
class KeyRing:
    """The configured keys, kept as SHA-256 digests only."""

    admins: tuple[bytes, ...]
    users: tuple[bytes, ...]

    @classmethod
    def of(cls, settings: Settings) -> KeyRing:
        """The keys of the settings. Raises ConfigError for an empty or unusable one."""
        rings = []
        for field in ("admin_api_keys", "api_keys"):
            keys = [key.get_secret_value() for key in getattr(settings, field)]
            if not all(_USABLE.fullmatch(key) for key in keys):
                raise ConfigError(
                    f"{field}: a key is empty, or has a space or a character beyond ASCII",
                    param=field,
                )
            rings.append(tuple(_digest(key.encode()) for key in keys))
        return cls(admins=rings[0], users=rings[1])

    @property
    def is_open(self) -> bool:
        """Whether no key is configured at all."""
        return not self.admins and not self.users

    def role(self, token: bytes) -> Role | None:
        """The role of a key, None for an unknown one. Compares with every key, in constant time."""
        digest = _digest(token)
        is_admin = is_user = False
        for known in self.admins:
            is_admin |= hmac.compare_digest(known, digest)
        for known in self.users:
            is_user |= hmac.compare_digest(known, digest)
        if is_admin:
            return Role.ADMIN
        return Role.USER if is_user else None


def check_exposure(settings: Settings) -> None:
    """Raises ConfigError where the server would listen beyond loopback with no key configured."""
    if KeyRing.of(settings).is_open and not _is_loopback(settings.host):
        raise ConfigError(
            f"--host {settings.host}: without API keys the server listens on loopback only; set "
            "--admin-api-keys (MANYHATS_ADMIN_API_KEYS) or --api-keys (MANYHATS_API_KEYS)",
            param="host",
        )


def require_user(request: Request) -> Principal:
    """Dependency: any known key, or anybody where none is configured.

    Raises AuthenticationError (no key, an unknown one), PermissionDeniedError (a web page's
    request, where no key is configured).
    """
    keys = _keys(request)
    if keys.is_open:
        _refuse_web_pages(request)
        return Principal(Role.ADMIN, DEFAULT_TENANT)
    headers = request.headers.getlist("authorization")
    scheme, _, token = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
    if scheme.lower() != "bearer" or not token.strip():
        raise AuthenticationError("an API key is needed: 'Authorization: Bearer <key>', once")
    role = keys.role(token.strip().encode("latin-1"))
    if role is None:
        raise AuthenticationError("the API key is not known")
    return Principal(role, DEFAULT_TENANT)


def require_admin(
    request: Request, principal: Annotated[Principal, Depends(require_user)]
) -> Principal:
    """Dependency: a key with the admin role. Raises what require_user does, PermissionDeniedError.

    Where only user keys are configured nobody is an admin.
    """
    if principal.role is Role.ADMIN:
        return principal
    if not _keys(request).admins:
        raise PermissionDeniedError(
            "no admin key is configured, so this is refused for everybody: start the server with "
            "--admin-api-keys (MANYHATS_ADMIN_API_KEYS)"
        )
    raise PermissionDeniedError("this needs an API key with the admin role")


def _keys(request: Request) -> KeyRing:
    """The application's keys, made once."""
    state = request.app.state
    keys: KeyRing | None = getattr(state, "manyhats_keys", None)
    if keys is None:
        keys = state.manyhats_keys = KeyRing.of(state.manyhats.settings)
    return keys


def _refuse_web_pages(request: Request) -> None:
    """A browser says which page sent a request; one from elsewhere must not use the open door."""
    for origin in request.headers.getlist("origin"):
        if not _is_loopback(urlsplit(origin).hostname or ""):
            raise PermissionDeniedError(
                f"requests from the web page {origin[:100]!r} are refused while no API key is "
                "configured"
            )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
