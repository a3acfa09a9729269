"""Who is asking: API keys, roles, and the rule that no key means loopback only.

The rule is deny by default. The application factory puts ``authorize`` on every route there is, so
that a new one cannot be forgotten: it needs a key unless it is one of ``OPEN_ROUTES``, and the role
that ``needed_role`` says. Routers may ask for more (``require_operator``, ``require_admin``).

Keys come from the settings (admins', and users' of the default tenant) and from the tenant
directory. With none of either, everybody who reaches the socket is an admin, so ``check_exposure``
lets the server start only on a loopback address, and requests that a browser sends from some web
page are refused.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from dataclasses import dataclass, replace
from typing import Annotated, Final
from urllib.parse import urlsplit

from fastapi import Depends, Request

from manyhats.config import Settings
from manyhats.errors import AuthenticationError, ConfigError, PermissionDeniedError
from manyhats.telemetry.record import current
from manyhats.tenancy.directory import TenantDirectory
from manyhats.tenancy.model import Role
from manyhats.types import DEFAULT_TENANT, TenantId

TENANT_HEADER: Final = "x-manyhats-tenant"
"""With which operators and admins say for whom they act; without it, for their key's tenant."""
OPEN_ROUTES: Final = frozenset({"/startupz", "/healthz", "/readyz", "/health"})
"""The routes that ask for no key, ever."""
METRICS_ROUTE: Final = "/metrics"
_OPERATORS: Final = frozenset({METRICS_ROUTE, "/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
_ADMINS: Final = ("/admin/tenants", "/admin/keys", "/admin/gc", "/admin/log-level")

_USABLE = re.compile(r"[!-~]+")


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is asking: ``tenant`` is the one that it acts for, ``home`` the one whose key it has.

    ``key`` is the id of an issued key, empty for one of the settings and where there is none.
    """

    role: Role
    tenant: TenantId
    home: TenantId
    key: str = ""

    @property
    def actor(self) -> str:
        """Who makes a change, as the audit log names them."""
        return "/".join(filter(None, (self.home, self.role.value, self.key)))


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
        return Role.TENANT if is_user else None


def check_exposure(settings: Settings) -> None:
    """Raises ConfigError where the server would listen beyond loopback with no key configured."""
    if KeyRing.of(settings).is_open and not _is_loopback(settings.host):
        raise ConfigError(
            f"--host {settings.host}: without API keys the server listens on loopback only; set "
            "--admin-api-keys (MANYHATS_ADMIN_API_KEYS) or --api-keys (MANYHATS_API_KEYS)",
            param="host",
        )


def needed_role(route: str) -> Role:
    """The least role that may use a route, by its template."""
    if any(route == area or route.startswith(area + "/") for area in _ADMINS):
        return Role.ADMIN
    if route == "/admin" or route.startswith("/admin/") or route in _OPERATORS:
        return Role.OPERATOR
    return Role.TENANT


async def authorize(request: Request) -> None:
    """Dependency of every route. Raises AuthenticationError, PermissionDeniedError, NotFoundError.

    Asynchronous, so that it costs no hop to a worker thread.
    """
    route = str(getattr(request.scope.get("route"), "path", ""))
    if route in OPEN_ROUTES:
        return
    if route == METRICS_ROUTE and request.app.state.manyhats.settings.metrics_open:
        return
    for path in (route, request.url.path):
        _demand(request, needed_role(path))


def require_user(request: Request) -> Principal:
    """Dependency: any known key, or anybody where there is none.

    Raises AuthenticationError (no key, an unknown or expired one), PermissionDeniedError (a web
    page's request, where there is no key; acting for another tenant), NotFoundError (that tenant).
    """
    known: Principal | None = getattr(request.state, "principal", None)
    if known is None:
        known = request.state.principal = _principal(request)
        if (record := current()) is not None:
            record.tenant = known.tenant
    return known


def require_operator(
    request: Request, principal: Annotated[Principal, Depends(require_user)]
) -> Principal:
    """Dependency: a key with the operator's role or more; otherwise as ``require_admin``."""
    return _demand(request, Role.OPERATOR)


def require_admin(
    request: Request, principal: Annotated[Principal, Depends(require_user)]
) -> Principal:
    """Dependency: a key with the admin role. Raises what require_user does, PermissionDeniedError.

    Where nobody has such a key it is refused for everybody.
    """
    return _demand(request, Role.ADMIN)


def acting_tenant(request: Request) -> TenantId:
    """The tenant that the request acts for; raises what ``require_user`` does."""
    return require_user(request).tenant


def _demand(request: Request, role: Role) -> Principal:
    principal = require_user(request)
    if principal.role.covers(role):
        return principal
    if not _keys(request).admins and not _tenants(request).has_role(role):
        raise PermissionDeniedError(
            "no admin key is configured, so this is refused for everybody: start the server with "
            "--admin-api-keys (MANYHATS_ADMIN_API_KEYS)"
        )
    raise PermissionDeniedError(f"this needs an API key with the {role.value} role")


def _principal(request: Request) -> Principal:
    if _keys(request).is_open and not _tenants(request).has_keys:
        _refuse_web_pages(request)
        return _acting(request, Principal(Role.ADMIN, DEFAULT_TENANT, DEFAULT_TENANT))
    headers = request.headers.getlist("authorization")
    scheme, _, token = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
    if scheme.lower() != "bearer" or not token.strip():
        raise AuthenticationError("an API key is needed: 'Authorization: Bearer <key>', once")
    return _acting(request, _holder(request, token.strip().encode("latin-1")))


def _holder(request: Request, token: bytes) -> Principal:
    """Whose key it is, in the settings or issued."""
    issued = _tenants(request).authenticate(token)
    role = _keys(request).role(token)
    if role is not None:
        return Principal(role, DEFAULT_TENANT, DEFAULT_TENANT)
    if issued is None:
        raise AuthenticationError("the API key is not known, or has ended")
    home = TenantId(issued.tenant)
    return Principal(issued.role, home, home, issued.id)


def _acting(request: Request, principal: Principal) -> Principal:
    """The principal for the tenant that the header names, if it does."""
    named = request.headers.getlist(TENANT_HEADER)
    if not named or named == [principal.tenant]:
        return principal
    if not principal.role.covers(Role.OPERATOR):
        raise PermissionDeniedError(f"{TENANT_HEADER}: this key acts for its own tenant alone")
    tenant = _tenants(request).tenant(", ".join(named))
    return replace(principal, tenant=TenantId(tenant.id))


def _tenants(request: Request) -> TenantDirectory:
    tenants: TenantDirectory = request.app.state.manyhats.tenants
    return tenants


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
