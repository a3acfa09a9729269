"""What the commands that speak to a running server share: address, key, and how they print."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

import typer

from manyhats.errors import ConfigError

_TIMEOUT_S: Final = 60.0

UrlOption = Annotated[
    str,
    typer.Option(
        "--url", envvar="MANYHATS_URL", metavar="<url>", help="Address of the running server."
    ),
]
KeyOption = Annotated[
    str,
    typer.Option(
        "--key",
        envvar="MANYHATS_KEY",
        metavar="<key>",
        help="API key; better given as a variable: a flag can be read in the process list.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the server's answer as JSON.")]
DEFAULT_URL: Final = "http://127.0.0.1:8000"


class RefusedError(Exception):
    """The server refused, or did not answer; the message is for the user."""


@dataclass(frozen=True, slots=True)
class AdminClient:
    """Calls the admin API at ``url``. Raises ConfigError for another address than http(s)."""

    url: str
    key: str

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise ConfigError(f"--url {self.url}: an http or https address is needed", param="url")

    def call(self, method: str, *path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON of the answer. Raises RefusedError with the server's own message."""
        address = "/".join([self.url.rstrip("/"), *(quote(part, safe="") for part in path)])
        headers = {"content-type": "application/json"}
        if self.key:
            headers["authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        request = Request(address, data, headers, method=method)  # noqa: S310 - checked above
        try:
            with urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310 - checked above
                return json.load(answer)
        except HTTPError as error:
            with error:
                raise RefusedError(_message(error)) from None
        except (URLError, OSError) as error:
            raise RefusedError(f"{self.url} does not answer: {error}") from None


def show(answer: Any, columns: Sequence[str], *, as_json: bool) -> None:
    """Print an answer: as JSON, or its rows (``data``, or the answer itself) as a table."""
    if as_json:
        typer.echo(json.dumps(answer, indent=2))
        return
    rows = answer.get("data", [answer])
    cells = [list(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        typer.echo("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return " ".join(f"{k}={v}" for k, v in value.items() if v is not None) or "-"
    return str(value)


def _message(error: HTTPError) -> str:
    try:
        return f"{error.code}: {json.load(error)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{error.code}: {error.reason}"
