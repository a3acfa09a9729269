"""``manyhats adapters promote`` and its like: the routes of a running server's adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from manyhats.commands.client import Client, fail, remote
from manyhats.lifecycle.records import split_version

app = typer.Typer(rich_markup_mode=None)

Name = Annotated[str, typer.Argument(metavar="NAME")]
Versioned = Annotated[str, typer.Argument(metavar="NAME[@VERSION]")]
MaybeVersion = Annotated[int | None, typer.Argument(min=1, metavar="[VERSION]")]
Reason = Annotated[str, typer.Option(metavar="<text>", help="Why; kept in the audit log.")]


def named(model: str, version: int | None) -> tuple[str, int | None]:
    """(name, version) of ``NAME``, ``NAME VERSION`` or ``NAME@VERSION``.

    Ends the command where two versions are given that are not the same.
    """
    name, own = split_version(model)
    if own is not None and version not in (None, own):
        fail(f"{model} and {version}: name one version")
    return name, own if own is not None else version


@app.command("promote")
@remote
def promote(
    client: Client,
    name: Versioned,
    version: MaybeVersion = None,
    *,
    force: Annotated[
        bool, typer.Option("--force", help="Against its evaluation; needs a reason.")
    ] = False,
    reason: Reason = "",
) -> None:
    """Make VERSION (default: the canary) the stable one. A canary ends."""
    name, version = named(name, version)
    body = {"version": version, "force": force or None, "reason": reason}
    _changed(client, client.change(name, "promote", body))


@app.command("canary")
@remote
def canary(
    client: Client,
    name: Versioned,
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
    name, version = named(name, version)
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
    name: Versioned,
    to: Annotated[
        str, typer.Argument(metavar="[TO]", help="previous (if not given), baseline or a version.")
    ] = "",
    reason: Reason = "",
) -> None:
    """Go back: end the canary, or bring back what was stable before; or go to a version.

    With 'baseline' the base itself answers the requests for NAME.
    """
    number = int(to) if to.isascii() and to.isdigit() else None
    plain, version = named(name, number)
    if version is not None and to and number is None:
        fail(f"{name} and {to}: name one")
    wanted = version if version is not None else to or "previous"
    name, body = plain, {"to": wanted, "reason": reason}
    _changed(client, client.change(name, "rollback", body))


@app.command("shadow")
@remote
def shadow(
    client: Client,
    name: Versioned,
    version: MaybeVersion = None,
    *,
    percent: Annotated[
        float, typer.Option(min=0, max=100, help="Share of the requests; 0 ends the shadow.")
    ],
    reason: Reason = "",
) -> None:
    """Run VERSION (default: the shadow there is) unseen beside what answers.

    What it would have answered is measured (/metrics), not returned.
    """
    name, version = named(name, version)
    body = {"version": version, "percent": percent, "reason": reason}
    _changed(client, client.change(name, "shadow", body))


@app.command("pin")
@remote
def pin(client: Client, name: Versioned, version: MaybeVersion = None, reason: Reason = "") -> None:
    """Keep VERSION (default: the stable one) on the device, now and after a restart."""
    name, version = named(name, version)
    _changed(client, client.change(name, "pin", {"version": version, "reason": reason}))


@app.command("unpin")
@remote
def unpin(
    client: Client, name: Versioned, version: MaybeVersion = None, reason: Reason = ""
) -> None:
    """Let VERSION (default: the stable one) leave the device again."""
    name, version = named(name, version)
    _changed(client, client.change(name, "unpin", {"version": version, "reason": reason}))


@app.command("retire")
@remote
def retire(
    client: Client,
    name: Versioned,
    version: MaybeVersion = None,
    *,
    undo: Annotated[bool, typer.Option("--undo", help="Bring it back.")] = False,
    reason: Reason = "",
) -> None:
    """Take a version that nothing is routed to out of use."""
    name, version = named(name, version)
    if version is None:
        fail(f"which version of {name}? NAME VERSION, or NAME@VERSION")
    body = {"version": version, "retired": not undo, "reason": reason}
    answer = client.change(name, "retire", body)
    states = {found["version"]: found["state"] for found in answer["versions"]}
    client.show(answer, lambda: f"{name}@{version} is {states[version]}")


def _changed(client: Client, answer: Mapping[str, Any]) -> None:
    client.show(answer, lambda: f"{answer['name']}: {route_words(answer['route'])}")


def route_words(route: Mapping[str, Any]) -> str:
    """A route as the server shows it, in words."""
    words = f"stable {route['stable']}"
    canary, shadow = route["canary"], route.get("shadow")
    if canary is not None:
        words += f", canary {canary['version']} ({canary['percent']:g} %){_step(canary)}"
    if shadow is not None:
        words += f", shadow {shadow['version']} ({shadow['percent']:g} %)"
    if pinned := route.get("pinned"):
        words += f", pinned {', '.join(map(str, pinned))}"
    return words


def _step(canary: Mapping[str, Any]) -> str:
    schedule = canary["schedule"]
    if schedule is None:
        return ""
    if schedule["held"]:
        return f", held: {schedule['held']}"
    return f", step {schedule['step'] + 1} of {len(schedule['steps'])}"
