"""Registrations that a server fetches from elsewhere: started, and watched to their end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from manyhats.commands.client import Client, add_row, fail, printable, remote

app = typer.Typer(rich_markup_mode=None)

_PERIOD_S: Final = 0.2
_ENDS: Final = ("succeeded", "failed", "cancelled")


def register_from(
    client: Client, said: Mapping[str, Any], address: str, sha256: str | None, *, wait: bool
) -> None:
    """Have the server fetch and register what is at ``address``; with ``wait``, watch it."""
    source: dict[str, Any] = {"url": address} | ({"sha256": sha256} if sha256 else {})
    if address.startswith("hf://"):
        source = {"hub": address.removeprefix("hf://"), "revision": said["revision"]}
    body = {key: value for key, value in said.items() if key != "source"}
    operation = client.call("POST", "/admin/adapters", json={**body, "source": source})
    if wait:
        operation = _watched(client, operation)
        if operation["error"] is not None:
            fail(operation["error"]["message"])
        show_registered(client, client.call("GET", f"/admin/adapters/{operation['adapter']}"))
    else:
        client.show(operation, lambda: f"{operation['id']}: {_state(operation)}")


def show_registered(client: Client, card: Mapping[str, Any]) -> None:
    """Print what a registration came to."""
    stable = "the stable version" if card["stable"] else "not the stable version"
    client.show(card, lambda: f"{card['name']}@{card['version']} is registered, {stable}")


@app.command("operations")
@remote
def operations(
    client: Client,
    ident: Annotated[str | None, typer.Argument(metavar="[ID]", help="Of one.")] = None,
    *,
    cancel: Annotated[bool, typer.Option("--cancel", help="End it.")] = False,
) -> None:
    """List what the server is fetching, and has fetched."""
    if ident is None:
        if cancel:
            fail("--cancel: of which one? Give its ID")
        answer = client.call("GET", "/admin/operations")
        found = answer["data"]
    else:
        answer = client.call("DELETE" if cancel else "GET", f"/admin/operations/{ident}")
        found = [answer]

    def table() -> Table:
        made = Table("operation", "adapter", "source", "state")
        for one in found:
            add_row(made, one["id"], one["adapter"] or one["name"], one["source"], _state(one))
        return made

    client.show(answer, table)


def _watched(client: Client, operation: dict[str, Any]) -> dict[str, Any]:
    """The operation once it has ended; a bar on stderr tells how far it is."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    console = Console(stderr=True, quiet=client.as_json)
    with Progress(*columns, TransferSpeedColumn(), console=console, transient=True) as bar:
        task = bar.add_task(printable(operation["name"]), total=None)
        while operation["state"] not in _ENDS:
            time.sleep(_PERIOD_S)
            operation = client.call("GET", f"/admin/operations/{operation['id']}")
            done, total = operation["bytes_done"], operation["bytes_total"]
            bar.update(task, completed=done, total=total)
    return operation


def _state(operation: Mapping[str, Any]) -> str:
    if operation["error"] is not None:
        return str(operation["error"]["message"])
    done, total = operation["bytes_done"], operation["bytes_total"]
    return f"{operation['state']}, {done} of {'?' if total is None else total} bytes"
