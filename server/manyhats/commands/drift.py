"""``manyhats drift ...``: what a running server sees of an adapter's drift, and its policy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.table import Table

from manyhats.commands.client import Client, adapter_path, add_row, fail, printable, remote
from manyhats.commands.plot import svg_plot, text_plot
from manyhats.drift.policy import COOL_DOWN_S, WARN_S, Action

app = typer.Typer(
    help="Watch the adapters of a running server for drift.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(metavar="NAME")]


@app.command("show")
@remote
def show(
    client: Client,
    name: Name,
    *,
    plot: Annotated[
        Path | None, typer.Option(metavar="<file.svg>", help="Draw the signals to an SVG file.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="First look at all that has ended by now.")
    ] = False,
) -> None:
    """Show each signal of NAME now against its reference."""
    path = f"{adapter_path(name)}/drift"
    answer = client.call("POST", f"{path}/check") if check else client.call("GET", path)
    if plot is not None:
        _draw(plot, answer)
    client.show(answer, lambda: Group(*_tables(answer), *_lines(answer)))


@app.command("policy")
@remote
def policy(
    client: Client,
    name: Name,
    action: Annotated[Action, typer.Argument(help="What is done about an alarm.")],
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, change no route.")
    ] = False,
    signal: Annotated[
        list[str] | None,
        typer.Option(metavar="<signal>", help="Act on this signal alone. May be repeated."),
    ] = None,
    cool_down_s: Annotated[
        float, typer.Option(metavar="<s>", help="Least time between two automatic changes.")
    ] = COOL_DOWN_S,
    revalidate_s: Annotated[
        float, typer.Option(metavar="<s>", help="A validation's age from which it is stale.")
    ] = 0.0,
    retire_at: Annotated[
        float, typer.Option(metavar="<unix>", help="When the version is to be replaced.")
    ] = 0.0,
    warn_s: Annotated[
        float, typer.Option(metavar="<s>", help="How long before that the log warns of it.")
    ] = WARN_S,
) -> None:
    """Set what is done about an alarm of NAME."""
    body = {
        "action": action.value,
        "dry_run": dry_run,
        "signals": signal or [],
        "cool_down_s": cool_down_s,
        "revalidate_s": revalidate_s,
        "retire_at": retire_at,
        "warn_s": warn_s,
    }
    answer = client.call("PUT", f"{adapter_path(name)}/drift/policy", json=body)
    client.show(answer, lambda: f"{name}: {_policy(answer['policy'])}")


@app.command("reset")
@remote
def reset(client: Client, name: Name) -> None:
    """Collect the reference of NAME's stable version anew, from the requests that come now."""
    answer = client.call("POST", f"{adapter_path(name)}/drift/reference")
    client.show(answer, lambda: f"{name}@{answer['version']}: the reference is collected anew")


def _draw(path: Path, answer: Mapping[str, Any]) -> None:
    if path.suffix != ".svg":
        fail(f"--plot {path}: the file's name must end in .svg")
    stable = next((v for v in answer["versions"] if v["role"] == "stable"), None)
    if stable is None:
        fail(f"the base answers for {answer['name']}: there is nothing to draw")
    title = f"{answer['name']}@{stable['version']}: reference (grey) and now"
    try:
        path.write_text(svg_plot(title, stable["signals"]), "utf-8")
    except OSError as error:
        fail(f"{path} cannot be written: {error.strerror}")


def _tables(answer: Mapping[str, Any]) -> list[Table]:
    return [
        _table(
            f"{answer['name']}@{version['version']} ({version['role']}, "
            f"{version['requests']} requests{_replicas(version)})",
            version,
        )
        for version in answer["versions"]
    ]


def _table(title: str, version: Mapping[str, Any]) -> Table:
    made = Table(
        "signal", "state", "reference", "now", "score", "psi", "reference|now", title=title
    )
    rows = {**version["signals"]}
    rows |= {f"{n} (to stable)": {**s, "state": ""} for n, s in version["against_stable"].items()}
    for name, signal in rows.items():
        state = signal["state"]
        if state == "collecting":
            state = f"{signal['reference']['count']} of {signal['needs']}"
        add_row(
            made,
            name,
            state,
            _value(signal["reference"]),
            _value(signal.get("window")),
            _number(signal.get("score")),
            _number(signal.get("psi")),
            text_plot(signal),
        )
    return made


def _replicas(version: Mapping[str, Any]) -> str:
    others = version["replicas"] - 1
    return f" here, beside {others} other replicas" if others else ""


def _lines(answer: Mapping[str, Any]) -> list[str]:
    lines = [f"policy: {_policy(answer['policy'])}"]
    latch = answer["latch"]
    if latch is not None and latch["holds"]:
        lines.append(f"latched since {latch['action']} ({latch['reason']}): promote to go on")
    validation = answer["validation"]
    if validation["stale"]:
        lines.append("stale: the stable version was not validated for its period")
    lines += validation["warnings"]
    lines += [f"alarm: {alarm['described']}" for alarm in answer["alarms"][-5:]]
    return [printable(line) for line in lines]


def _policy(shown: Mapping[str, Any]) -> str:
    dry = ", dry run" if shown["dry_run"] else ""
    signals = f", on {', '.join(shown['signals'])}" if shown["signals"] else ""
    return f"{shown['action']}{dry}{signals}"


def _value(sketch: Mapping[str, Any] | None) -> str:
    if not sketch or not sketch["count"]:
        return ""
    if sketch["mean"] is not None:
        return f"{sketch['mean']:.4g}"
    name, count = max(sketch["counts"].items(), key=lambda item: item[1])
    return f"{name} {count / sketch['count']:.0%}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
