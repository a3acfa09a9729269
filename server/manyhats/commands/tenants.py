"""``manyhats tenants``: tenants, keys and usage of a running server, over its admin API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final
from urllib.parse import quote as quoted

import typer

from manyhats.commands.client import Client, printable, remote
from manyhats.tenancy.model import Quotas, Role

app = typer.Typer(
    help="Tenants, their keys and what they used, on a running server.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_TENANT: Final = ("id", "weight", "priority", "quotas")
_KEY: Final = ("id", "tenant", "role", "created", "expires", "revoked", "note")
_ISSUED: Final = ("id", "key")
_USAGE: Final = (
    "tenant",
    "adapter",
    "requests",
    "prompt_tokens",
    "output_tokens",
    "resident_s",
    "nbytes",
)

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
@remote
def list_tenants(client: Client) -> None:
    """List every tenant."""
    _show(client, client.call("GET", "/admin/tenants"), _TENANT)


@app.command("show")
@remote
def show(client: Client, tenant: TenantArgument) -> None:
    """Show one tenant."""
    _show(client, client.call("GET", _tenant(tenant)), _TENANT)


@app.command("create")
@remote
def create(
    client: Client,
    tenant: TenantArgument,
    weight: WeightOption = None,
    priority: PriorityOption = None,
    quota: QuotaOption = None,
) -> None:
    """Create a tenant."""
    body = {"id": tenant, **_changed({}, weight, priority, quota)}
    _show(client, client.call("POST", "/admin/tenants", json=body), _TENANT)


@app.command("set")
@remote
def set_tenant(
    client: Client,
    tenant: TenantArgument,
    weight: WeightOption = None,
    priority: PriorityOption = None,
    quota: QuotaOption = None,
) -> None:
    """Change a tenant; what is not given stays as it is."""
    now = client.call("GET", _tenant(tenant))
    body = _changed({k: v for k, v in now.items() if k != "id"}, weight, priority, quota)
    _show(client, client.call("PUT", _tenant(tenant), json=body), _TENANT)


@app.command("delete")
@remote
def delete(client: Client, tenant: TenantArgument) -> None:
    """Delete a tenant and revoke its keys."""
    _show(client, client.call("DELETE", _tenant(tenant)), ("id", "deleted"))


@app.command("keys")
@remote
def keys(client: Client, tenant: TenantArgument) -> None:
    """List the keys that were issued to a tenant."""
    _show(client, client.call("GET", f"{_tenant(tenant)}/keys"), _KEY)


@app.command("issue")
@remote
def issue(
    client: Client,
    tenant: TenantArgument,
    role: Annotated[Role, typer.Option("--role", help="What the key may do.")] = Role.TENANT,
    expires_s: Annotated[
        int | None, typer.Option("--expires-s", help="Seconds until it ends; default: never.")
    ] = None,
    note: Annotated[str, typer.Option("--note", help="What it is for.")] = "",
) -> None:
    """Issue a key. It is printed this once."""
    body = {"role": role.value, "expires_s": expires_s, "note": note}
    _show(client, client.call("POST", f"{_tenant(tenant)}/keys", json=body), _ISSUED)


@app.command("rotate")
@remote
def rotate(
    client: Client,
    ident: KeyArgument,
    grace_s: Annotated[
        int, typer.Option("--grace-s", help="Seconds for which the old key still opens.")
    ] = 0,
) -> None:
    """Issue a key in the place of another. It is printed this once."""
    answer = client.call("POST", f"{_key(ident)}/rotate", json={"grace_s": grace_s})
    _show(client, answer, _ISSUED)


@app.command("revoke")
@remote
def revoke(client: Client, ident: KeyArgument) -> None:
    """End a key at once."""
    _show(client, client.call("DELETE", _key(ident)), _KEY)


@app.command("usage")
@remote
def usage(client: Client) -> None:
    """Show what each tenant has used of each adapter."""
    _show(client, client.call("GET", "/admin/usage"), _USAGE)


def _tenant(ident: str) -> str:
    return f"/admin/tenants/{quoted(ident, safe='')}"


def _key(ident: str) -> str:
    return f"/admin/keys/{quoted(ident, safe='')}"


def _changed(
    body: dict[str, Any], weight: float | None, priority: int | None, quotas: Sequence[str] | None
) -> dict[str, Any]:
    """``body`` with what was given put in. Raises BadParameter for a quota that is none."""
    given = {"weight": weight, "priority": priority}
    bounds = dict(body.get("quotas", {}))
    for item in quotas or ():
        name, _, number = item.partition("=")
        if name not in Quotas.model_fields or not (number == "none" or number.isdecimal()):
            names = ", ".join(Quotas.model_fields)
            raise typer.BadParameter(
                f"{item}: <name>=<number> or <name>=none is expected; names: {names}",
                param_hint="--quota",
            )
        bounds[name] = None if number == "none" else int(number)
    return {**body, **{k: v for k, v in given.items() if v is not None}, "quotas": bounds}


def _show(client: Client, answer: Mapping[str, Any], columns: Sequence[str]) -> None:
    """Print an answer: as JSON, or its rows (``data``, or the answer itself) as a table."""
    client.show(dict(answer), lambda: _table(answer.get("data", [answer]), columns))


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    cells = [list(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return " ".join(f"{k}={v}" for k, v in value.items() if v is not None) or "-"
    return printable(str(value))
