"""``manyhats adapters ...``: the adapters of a running server."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from manyhats.adapters.names import (
    ADAPTERHUB_WEIGHTS_NAME,
    CONFIG_NAME,
    HEAD_NAMES,
    WEIGHTS_NAME,
)
from manyhats.commands import evaluate, fetching, routing
from manyhats.commands.client import Client, adapter_path, add_row, fail, remote
from manyhats.commands.fetching import register_from, show_registered
from manyhats.commands.routing import Name, Reason, route_words
from manyhats.lifecycle.audit import broken_link

app = typer.Typer(
    help="Register, list, route and delete the adapters of a running server.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(routing.app)
app.add_typer(fetching.app)
evaluate.add_to(app)


@app.command("register")
@remote
def register(
    client: Client,
    name: Name,
    path: Annotated[str, typer.Argument(metavar="FOLDER_OR_ADDRESS", help="What was saved.")],
    *,
    upload: Annotated[
        bool, typer.Option("--upload", help="Send the files; FOLDER is on this machine.")
    ] = False,
    promote: Annotated[
        bool | None,
        typer.Option(
            "--promote/--no-promote",
            help="Whether the version becomes the stable one at once; default: unless the route "
            "has been moved away from the newest version.",
        ),
    ] = None,
    reason: Reason = "",
    source: Annotated[str | None, typer.Option(metavar="<text>", help="Where it is from.")] = None,
    revision: Annotated[
        str, typer.Option(metavar="<text>", help="Of that source; the commit of a hub's.")
    ] = "",
    sha256: Annotated[
        str | None, typer.Option(metavar="<hex>", help="What the weights at an address must be.")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="For what the server fetches to be there.")
    ] = True,
) -> None:
    """Register a version of NAME.

    Without --upload, a folder is one on the server, below one of its adapter roots. An address
    (hf://org/name with --revision, https://..., s3://..., gs://...) is fetched by the server, which
    must allow it (--source-allow).
    """
    said: dict[str, Any] = {
        "name": name, "promote": promote, "reason": reason, "source": source, "revision": revision,
    }  # fmt: skip
    said = {key: value for key, value in said.items() if value is not None}
    if "://" in path:
        register_from(client, said, path, sha256, wait=wait)
        return
    if not upload:
        card = client.call("POST", "/admin/adapters", json={**said, "path": path})
    else:
        parts = {key: str(v).lower() if v in (True, False) else v for key, v in said.items()}
        with ExitStack() as stack:
            try:
                files = {
                    part: stack.enter_context(file.open("rb"))
                    for part, file in _files(Path(path)).items()
                }
            except OSError as error:
                fail(f"{path} cannot be read: {error.strerror}: {error.filename}")
            card = client.call("POST", "/admin/adapters", data=parts, files=files)
    show_registered(client, card)


@app.command("list")
@remote
def list_adapters(client: Client) -> None:
    """List every version in use."""
    answer = client.call("GET", "/admin/adapters")

    def table() -> Table:
        made = Table("adapter", "stable", "family", "rank", "bytes", "registered", "on the device")
        for card in answer["data"]:
            resident = card["resident"]
            add_row(
                made,
                f"{card['name']}@{card['version']}",
                "yes" if card["stable"] else "",
                card["family"],
                str(card["max_rank"]),
                str(card["nbytes"]),
                _moment(card["created"]),
                _place(resident),
            )
        return made

    client.show(answer, table)


@app.command("show")
@remote
def show(client: Client, name: Name) -> None:
    """Show the route of NAME and all its versions."""
    answer = client.call("GET", adapter_path(name))

    def table() -> Table:
        made = Table("version", "state", "routed", "registered", "by", "source", "revision")
        for version in answer["versions"]:
            add_row(
                made,
                str(version["version"]),
                version["state"],
                _routed(answer["route"], version["version"]),
                _moment(version["created"]),
                version["by"],
                version["source"],
                version["revision"],
            )
        made.title = f"{answer['name']}: {route_words(answer['route'])}"
        return made

    client.show(answer, table)


@app.command("delete")
@remote
def delete(
    client: Client,
    name: Annotated[str, typer.Argument(metavar="NAME[@VERSION]")],
    *,
    force: Annotated[bool, typer.Option("--force", help="Even while it is routed.")] = False,
    reason: Reason = "",
) -> None:
    """Delete every version of NAME, or one."""
    query = {"force": str(force).lower(), "reason": reason}
    answer = client.call("DELETE", adapter_path(name), params=query)
    gone = ", ".join(map(str, answer["versions"]))
    client.show(answer, lambda: f"{name} is deleted (versions: {gone})")


@app.command("audit")
@remote
def audit(
    client: Client,
    *,
    name: Annotated[str | None, typer.Option(metavar="<name>", help="Of one adapter.")] = None,
    own: Annotated[
        str | None,
        typer.Option(metavar="<name>", help="Of one of your tenant's; any key of it will do."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the chain of hashes instead, on this machine.")
    ] = False,
) -> None:
    """Print the log of all changes."""
    if verify:
        count, problem, newest = broken_link(client.audit())
        answer = {"entries": count, "problem": problem, "newest": newest}
        client.show(
            answer, lambda: problem or f"{count} entries, the chain holds; newest: {newest}"
        )
        if problem:
            raise typer.Exit(1)
        return
    entries = list(client.audit(path=f"/v1/adapters/{own}/audit") if own else client.audit(name))

    def table() -> Table:
        made = Table("entry", "when", "who", "what", "adapter", "after", "why")
        for e in entries:
            after = route_words(e["after"]) if "stable" in e["after"] else ""
            add_row(
                made, str(e["seq"]), e["at"], e["actor"], e["action"], e["name"], after, e["reason"]
            )
        return made

    client.show(entries, table)


def _files(folder: Path) -> dict[str, Path]:
    """The parts of an upload: what PEFT saved, or AdapterHub's library. Ends the command where that
    saved a prediction head too, which the server would not see.
    """
    weights, hub = folder / WEIGHTS_NAME, folder / ADAPTERHUB_WEIGHTS_NAME
    if not weights.is_file() and hub.is_file():
        weights = hub
        if head := next((name for name in HEAD_NAMES if (folder / name).exists()), None):
            fail(f"{folder} has {head}: a prediction head is not served; save with_head=False")
    return {"config": folder / CONFIG_NAME, "weights": weights}


def _place(resident: Mapping[str, Any] | None) -> str:
    if resident is None:
        return ""
    return f"slot {resident['slot']}{', pinned' if resident['pinned'] else ''}"


def _routed(route: Mapping[str, Any], version: int) -> str:
    words = ["stable"] if route["stable"] == version else []
    for kind in ("canary", "shadow"):
        part = route.get(kind)
        if part and part["version"] == version:
            words.append(f"{kind}, {part['percent']:g} %")
    return "; ".join(words + ["pinned"] * (version in route.get("pinned", ())))


def _moment(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(sep=" ", timespec="seconds")[:19]
