"""``manyhats adapters ...``: the adapters of a running server."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from manyhats.commands import evaluate
from manyhats.commands.client import Client, adapter_path, add_row, fail, remote
from manyhats.lifecycle.audit import broken_link

app = typer.Typer(
    help="Register, list, route and delete the adapters of a running server.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

evaluate.add_to(app)

Name = Annotated[str, typer.Argument(metavar="NAME")]
MaybeVersion = Annotated[int | None, typer.Argument(min=1, metavar="[VERSION]")]
Reason = Annotated[str, typer.Option(metavar="<text>", help="Why; kept in the audit log.")]

_FILES = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}


@app.command("register")
@remote
def register(
    client: Client,
    name: Name,
    path: Annotated[Path, typer.Argument(metavar="FOLDER", help="What PEFT saved.")],
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
    revision: Annotated[str, typer.Option(metavar="<text>", help="Of that source.")] = "",
) -> None:
    """Register a version of NAME.

    Without --upload, FOLDER is a folder on the server, below one of its adapter roots.
    """
    said: dict[str, Any] = {
        "name": name, "promote": promote, "reason": reason, "source": source, "revision": revision,
    }  # fmt: skip
    said = {key: value for key, value in said.items() if value is not None}
    if not upload:
        card = client.call("POST", "/admin/adapters", json={**said, "path": str(path)})
    else:
        parts = {key: str(v).lower() if v in (True, False) else v for key, v in said.items()}
        with ExitStack() as stack:
            try:
                files = {
                    part: stack.enter_context((path / file).open("rb"))
                    for part, file in _FILES.items()
                }
            except OSError as error:
                fail(f"{path} cannot be read: {error.strerror}: {error.filename}")
            card = client.call("POST", "/admin/adapters", data=parts, files=files)
    stable = "the stable version" if card["stable"] else "not the stable version"
    client.show(card, lambda: f"{card['name']}@{card['version']} is registered, {stable}")


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
                "" if resident is None else f"slot {resident['slot']}",
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
        made.title = f"{answer['name']}: {_route(answer['route'])}"
        return made

    client.show(answer, table)


@app.command("promote")
@remote
def promote(
    client: Client,
    name: Name,
    version: MaybeVersion = None,
    *,
    force: Annotated[
        bool, typer.Option("--force", help="Against its evaluation; needs a reason.")
    ] = False,
    reason: Reason = "",
) -> None:
    """Make VERSION (default: the canary) the stable one. A canary ends."""
    body = {"version": version, "force": force or None, "reason": reason}
    _changed(client, client.change(name, "promote", body))


@app.command("canary")
@remote
def canary(
    client: Client,
    name: Name,
    version: MaybeVersion = None,
    *,
    percent: Annotated[
        float | None, typer.Option(min=0, max=100, help="Share of the callers; 0 ends the canary.")
    ] = None,
    steps: Annotated[
        str, typer.Option(metavar="<list>", help="Shares of a schedule, in percent.")
    ] = "5,25,50,100",
    every: Annotated[
        float | None,
        typer.Option(metavar="<seconds>", help="Start a schedule; each step lasts so long."),
    ] = None,
    hold: Annotated[bool, typer.Option("--hold", help="Hold the schedule where it is.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Let it go on.")] = False,
    reason: Reason = "",
) -> None:
    """Give VERSION (default: the canary there is) a share of the callers.

    One of --percent, --every, --hold and --resume.
    """
    if sum([percent is not None, every is not None, hold, resume]) != 1:
        fail("give one of --percent, --every, --hold and --resume")
    if hold or resume:
        action = "canary/hold" if hold else "canary/resume"
        _changed(client, client.change(name, action, {"reason": reason}))
        return
    schedule = None
    if every is not None:
        try:
            schedule = {"steps": [float(step) for step in steps.split(",")], "step_s": every}
        except ValueError:
            fail(f"--steps {steps}: percentages with commas between them")
    body = {"version": version, "percent": percent, "schedule": schedule, "reason": reason}
    _changed(client, client.change(name, "canary", body))


@app.command("rollback")
@remote
def rollback(
    client: Client,
    name: Name,
    to: Annotated[
        str, typer.Argument(metavar="[TO]", help="previous, baseline or a version.")
    ] = "previous",
    reason: Reason = "",
) -> None:
    """Go back: end the canary, or bring back what was stable before; or go to a version.

    With 'baseline' the base itself answers the requests for NAME.
    """
    body = {"to": int(to) if to.isascii() and to.isdigit() else to, "reason": reason}
    _changed(client, client.change(name, "rollback", body))


@app.command("retire")
@remote
def retire(
    client: Client,
    name: Name,
    version: Annotated[int, typer.Argument(min=1, metavar="VERSION")],
    *,
    undo: Annotated[bool, typer.Option("--undo", help="Bring it back.")] = False,
    reason: Reason = "",
) -> None:
    """Take a version that nothing is routed to out of use."""
    body = {"version": version, "retired": not undo, "reason": reason}
    answer = client.change(name, "retire", body)
    client.show(answer, lambda: f"{name}@{version} is {'ready' if undo else 'retired'}")


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
    entries = list(client.audit(name))

    def table() -> Table:
        made = Table("entry", "when", "who", "what", "adapter", "after", "why")
        for e in entries:
            after = _route(e["after"]) if "stable" in e["after"] else ""
            add_row(
                made, str(e["seq"]), e["at"], e["actor"], e["action"], e["name"], after, e["reason"]
            )
        return made

    client.show(entries, table)


def _changed(client: Client, answer: Mapping[str, Any]) -> None:
    client.show(answer, lambda: f"{answer['name']}: {_route(answer['route'])}")


def _route(route: Mapping[str, Any]) -> str:
    canary = route["canary"]
    words = f"stable {route['stable']}"
    if canary is None:
        return words
    words += f", canary {canary['version']} ({canary['percent']:g} %)"
    schedule = canary["schedule"]
    if schedule is None:
        return words
    if schedule["held"]:
        return f"{words}, held: {schedule['held']}"
    return f"{words}, step {schedule['step'] + 1} of {len(schedule['steps'])}"


def _routed(route: Mapping[str, Any], version: int) -> str:
    if route["stable"] == version:
        return "stable"
    canary = route["canary"]
    return f"canary, {canary['percent']:g} %" if canary and canary["version"] == version else ""


def _moment(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(sep=" ", timespec="seconds")[:19]
