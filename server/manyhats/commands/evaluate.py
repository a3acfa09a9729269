"""``manyhats adapters evaluate`` and ``gate``: measure a version, say what it is judged by."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from manyhats.commands.client import Client, adapter_path, add_row, fail, remote
from manyhats.commands.routing import Reason
from manyhats.lifecycle.records import split_version

_POLL_S: Final = 0.5

Name = Annotated[str, typer.Argument(metavar="NAME[@VERSION]")]


def add_to(app: typer.Typer) -> None:
    """Puts the commands into ``manyhats adapters``."""
    app.command("evaluate")(evaluate)
    app.command("gate")(gate)


@remote
def evaluate(
    client: Client,
    name: Name,
    *,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for the report; exit code 2 where it failed.")
    ] = False,
    reason: Reason = "",
) -> None:
    """Evaluate a version of NAME (default: the newest) beside the live traffic."""
    own, version = split_version(name)
    body = {"version": version, "reason": reason}
    started = client.change(own, "evaluate", body)
    if not wait:
        client.show(started, lambda: f"{started['adapter']}: {_progress(started)}")
        return
    _, number = split_version(started["adapter"])
    found = _awaited(client, f"{adapter_path(own)}/versions/{number}/evaluation", started)
    if found.get("job"):
        fail(f"{started['adapter']}: {found['job']['error']}")
    if found["report"] is None:
        fail(f"{started['adapter']}: no report yet; it runs on another server of this registry")
    client.show(found, lambda: _table(started["adapter"], found["report"]))
    if not found["report"]["passed"]:
        raise typer.Exit(2)


@remote
def gate(
    client: Client,
    name: Annotated[str, typer.Argument(metavar="NAME")],
    *,
    data: Annotated[
        Path | None, typer.Option(metavar="<file>", help="Pairs of prompt and completion, JSONL.")
    ] = None,
    rules: Annotated[
        Path | None, typer.Option(metavar="<file>", help="Rules for generated answers, JSONL.")
    ] = None,
    thresholds: Annotated[
        str | None,
        typer.Option(metavar="<json>", help="Those that differ from the defaults, as an object."),
    ] = None,
    require: Annotated[
        str | None,
        typer.Option(metavar="none|evaluated|ready", help="What promotion needs."),
    ] = None,
    reason: Reason = "",
) -> None:
    """Show, or with an option change, what the versions of NAME are asked and judged by."""
    body: dict[str, Any] = {"require": require}
    try:
        body["data"] = data.read_text("utf-8") if data else None
        body["rules"] = rules.read_text("utf-8") if rules else None
        body["thresholds"] = json.loads(thresholds) if thresholds else None
    except (OSError, ValueError) as error:
        fail(str(error))
    given = {key: value for key, value in body.items() if value is not None}
    path = f"{adapter_path(name)}/evaluation"
    if given:
        answer = client.call("PUT", path, json={**given, "reason": reason})
    else:
        answer = client.call("GET", path)

    def table() -> Table:
        made = Table("measure", "bound", title=_asked(answer))
        for measure, bound in answer["thresholds"].items():
            add_row(made, measure, "not judged" if bound is None else f"{bound:g}")
        return made

    client.show(answer, table)


def _awaited(client: Client, path: str, started: Mapping[str, Any]) -> dict[str, Any]:
    """The version's evaluation once nothing of it is on its way, with a bar meanwhile."""
    console = Console(stderr=True)
    with Progress(console=console, disable=client.as_json or not console.is_terminal) as bar:
        task = bar.add_task(started["adapter"], total=started["total"])
        while True:
            found = client.call("GET", path)
            if found["state"] != "evaluating":
                return found
            bar.update(task, completed=found["job"]["done"])
            time.sleep(_POLL_S)


def _table(adapter: str, report: Mapping[str, Any]) -> Table:
    against = f", against {report['against']}" if report["against"] else ""
    made = Table("measure", "value", "bound", "", title=f"{adapter}{against}")
    for row in report["rows"]:
        value = "undefined" if row["value"] is None else f"{row['value']:.4g}"
        bound = "not judged" if row["bound"] is None else f"at {row['at']} {row['bound']:g}"
        add_row(made, row["measure"], value, bound, "passed" if row["passed"] else "FAILED")
    made.caption = f"{'passed' if report['passed'] else 'FAILED'} in {report['seconds']:.1f} s"
    return made


def _progress(job: Mapping[str, Any]) -> str:
    return f"{job['state']}, {job['done']} of {job['total']} probes"


def _asked(answer: Mapping[str, Any]) -> str:
    return (
        f"{answer['name']}: {answer['data']} pairs of its own, {answer['general']} general ones, "
        f"{answer['rules']} rules; promotion requires: {answer['require']}"
    )
