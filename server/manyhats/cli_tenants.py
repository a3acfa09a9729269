"""``manyhats tenants``: tenants, keys and usage of a running server, over its admin API."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final

import typer

from manyhats.cli_http import (
    DEFAULT_URL,
    AdminClient,
    JsonOption,
    KeyOption,
    RefusedError,
    UrlOption,
)
from manyhats.cli_http import show as show_answer
from manyhats.errors import ConfigError
from manyhats.tenancy.model import Quotas, Role

app = typer.Typer(
    name="tenants",
    help="Tenants, their keys and what they used, on a running server.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_TENANT: Final = ("id", "weight", "priority", "quotas")
_KEY: Final = ("id", "tenant", "role", "created", "expires", "revoked", "note")
_USAGE: Final = ("tenant", "adapter", "requests", "prompt_tokens", "output_tokens")

TenantArgument = Annotated[str, typer.Argument(metavar="TENANT", help="The tenant's id.")]
KeyArgument = Annotated[str, typer.Argument(metavar="ID", help="The key's id, not the key.")]
WeightOption = Annotated[
    float | None, typer.Option("--weight", help="Part of the engine beside the others'.")
]
PriorityOption = Annotated[
    int | None, typer.Option("--priority", help="The lower ones wait for all above.")
]
QuotaOption = Annotated[
    list[str] | None,
    typer.Option(
        "--quota",
        metavar="<name>=<number>",
        help=f"May be repeated; 'none' for no bound. Names: {', '.join(Quotas.model_fields)}.",
    ),
]


@app.command("list")
def list_tenants(
    url: UrlOption = DEFAULT_URL, key: KeyOption = "", json: JsonOption = False
) -> None:
    """List every tenant."""
    _run(lambda: AdminClient(url, key).call("GET", "admin", "tenants"), _TENANT, json)


@app.command("show")
def show(
    tenant: TenantArgument,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    json: JsonOption = False,
) -> None:
    """Show one tenant."""
    _run(lambda: AdminClient(url, key).call("GET", "admin", "tenants", tenant), _TENANT, json)


@app.command("create")
def create(
    tenant: TenantArgument,
    weight: WeightOption = None,
    priority: PriorityOption = None,
    quota: QuotaOption = None,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    json: JsonOption = False,
) -> None:
    """Create a tenant."""

    def call() -> Any:
        body = {"id": tenant, **_changed({}, weight, priority, quota)}
        return AdminClient(url, key).call("POST", "admin", "tenants", body=body)

    _run(call, _TENANT, json)


@app.command("set")
def set_tenant(
    tenant: TenantArgument,
    weight: WeightOption = None,
    priority: PriorityOption = None,
    quota: QuotaOption = None,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    json: JsonOption = False,
) -> None:
    """Change a tenant; what is not given stays as it is."""

    def call() -> Any:
        client = AdminClient(url, key)
        now = client.call("GET", "admin", "tenants", tenant)
        del now["id"]
        body = _changed(now, weight, priority, quota)
        return client.call("PUT", "admin", "tenants", tenant, body=body)

    _run(call, _TENANT, json)


@app.command("delete")
def delete(
    tenant: TenantArgument,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    json: JsonOption = False,
) -> None:
    """Delete a tenant and revoke its keys."""
    client = ("DELETE", "admin", "tenants", tenant)
    _run(lambda: AdminClient(url, key).call(*client), ("id", "deleted"), json)


@app.command("keys")
def keys(
    tenant: TenantArgument,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    json: JsonOption = False,
) -> None:
    """List the keys that were issued to a tenant."""
    path = ("admin", "tenants", tenant, "keys")
    _run(lambda: AdminClient(url, key).call("GET", *path), _KEY, json)


@app.command("issue")
def issue(
    tenant: TenantArgument,
    role: Annotated[Role, typer.Option("--role", help="What the key may do.")] = Role.TENANT,
    expires_s: Annotated[
        int | None, typer.Option("--expires-s", help="Seconds until it ends; default: never.")
    ] = None,
    note: Annotated[str, typer.Option("--note", help="What it is for.")] = "",
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    json: JsonOption = False,
) -> None:
    """Issue a key. It is printed this once."""
    body = {"role": role.value, "expires_s": expires_s, "note": note}
    path = ("admin", "tenants", tenant, "keys")
    _run(lambda: AdminClient(url, key).call("POST", *path, body=body), ("id", "key"), json)


@app.command("rotate")
def rotate(
    ident: KeyArgument,
    grace_s: Annotated[
        int, typer.Option("--grace-s", help="Seconds for which the old key still opens.")
    ] = 0,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    json: JsonOption = False,
) -> None:
    """Issue a key in the place of another. It is printed this once."""
    path, body = ("admin", "keys", ident, "rotate"), {"grace_s": grace_s}
    _run(lambda: AdminClient(url, key).call("POST", *path, body=body), ("id", "key"), json)


@app.command("revoke")
def revoke(
    ident: KeyArgument,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    json: JsonOption = False,
) -> None:
    """End a key at once."""
    _run(lambda: AdminClient(url, key).call("DELETE", "admin", "keys", ident), _KEY, json)


@app.command("usage")
def usage(url: UrlOption = DEFAULT_URL, key: KeyOption = "", json: JsonOption = False) -> None:
    """Show what each tenant has used of each adapter since the server started."""
    _run(lambda: AdminClient(url, key).call("GET", "admin", "usage"), _USAGE, json)


def _changed(
    body: dict[str, Any], weight: float | None, priority: int | None, quotas: Sequence[str] | None
) -> dict[str, Any]:
    """``body`` with what was given put in. Raises ConfigError for a quota that is none."""
    given = {"weight": weight, "priority": priority}
    bounds = dict(body.get("quotas", {}))
    for item in quotas or ():
        name, _, number = item.partition("=")
        if name not in Quotas.model_fields or not (number == "none" or number.isdecimal()):
            names = ", ".join(Quotas.model_fields)
            raise ConfigError(
                f"--quota {item}: <name>=<number> or <name>=none is expected; names: {names}"
            )
        bounds[name] = None if number == "none" else int(number)
    return {**body, **{k: v for k, v in given.items() if v is not None}, "quotas": bounds}


def _run(call: Callable[[], Any], columns: Sequence[str], as_json: bool) -> None:
    """Print what ``call`` gives; exit with 1 where the server refuses, 2 for a wrong flag."""
    try:
        show_answer(call(), columns, as_json=as_json)
    except (RefusedError, ConfigError) as error:
        typer.secho(f"manyhats: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None
