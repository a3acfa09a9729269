"""The admin API from the command line: one server, one key, and errors in one line."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Final, NoReturn
from urllib.parse import quote

import httpx
import orjson
import typer
from rich.console import Console, RenderableType
from rich.table import Table

_PAGE = 1000
_BROKEN: Final = (httpx.NetworkError, httpx.RemoteProtocolError)
"""What a connection that was refused or reset, or ended before the answer, comes as."""

UrlOption = Annotated[
    str,
    typer.Option("--url", envvar="MANYHATS_URL", metavar="<url>", help="Address of the server."),
]
KeyOption = Annotated[
    str | None,
    typer.Option(
        "--key",
        envvar="MANYHATS_KEY",
        metavar="<key>",
        show_envvar=True,
        help="API key. Better given as a variable: a flag can be read in the process list.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the server's answer as JSON.")]


def fail(message: str) -> NoReturn:
    """Ends the command with ``message`` on stderr and exit code 1."""
    typer.secho(f"manyhats: {message}", fg=typer.colors.RED, err=True)
    raise typer.Exit(1)


class Client:
    """Calls of one command. ``as_json``: its result is printed as JSON."""

    def __init__(self, http: httpx.Client, *, as_json: bool) -> None:
        self._http = http
        self.as_json = as_json

    def call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """The answer of one call; ends the command where it is refused or does not come."""
        try:
            answer = self._answer(method, path, **options)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            fail(f"no answer from {self._http.base_url}: {error}")
        try:
            body = answer.json()
            if answer.is_success and isinstance(body, dict):
                return body
            message = body["error"]["message"]
        except (ValueError, TypeError, KeyError):
            fail(f"{self._http.base_url} is no Manyhats server: {answer.status_code} to {path}")
        fail(str(message))

    def _answer(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One answer. A GET whose connection breaks is asked once more, on a new connection.

        A server may close an idle connection just as it is used again, and nobody can tell then
        whether it took the call: what only reads may be asked twice, nothing else is. (The
        transport's own ``retries`` are of connecting alone, whatever the method.)
        """
        try:
            return self._http.request(method, path, **options)
        except _BROKEN:
            if method != "GET":
                raise
        return self._http.request(method, path, **options)

    def change(self, name: str, action: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """``POST /admin/adapters/{name}/{action}``; what is None in ``body`` is left out."""
        given = {key: value for key, value in body.items() if value is not None}
        return self.call("POST", f"{adapter_path(name)}/{action}", json=given)

    def audit(
        self, name: str | None = None, *, path: str = "/admin/audit"
    ) -> Iterator[dict[str, Any]]:
        """Every entry of the audit log, or of the part of it at ``path``, oldest first."""
        after, more = 0, True
        while more:
            query: dict[str, Any] = {"after": after, "limit": _PAGE}
            page = self.call("GET", path, params={**query, "name": name} if name else query)
            yield from page["data"]
            more = page["has_more"]
            after = page["data"][-1]["seq"] if page["data"] else after

    def show(self, answer: Any, words: Callable[[], RenderableType]) -> None:
        """Print an answer: as JSON where that was asked for, otherwise as ``words`` has it."""
        if self.as_json:
            typer.echo(orjson.dumps(answer, option=orjson.OPT_INDENT_2))
        else:
            Console(soft_wrap=True, markup=False, emoji=False, highlight=False).print(words())


def printable(text: str) -> str:
    """``text`` without what could steer the terminal, whatever somebody has called something."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def add_row(table: Table, *cells: str) -> None:
    """A row of ``printable`` cells."""
    table.add_row(*map(printable, cells))


def adapter_path(name: str) -> str:
    """The path of a name, or of ``name@version``."""
    return f"/admin/adapters/{quote(name, safe='@')}"


def remote(command: Callable[..., None]) -> Callable[..., None]:
    """Makes a command of a function that takes a Client first: adds --url, --key and --json."""

    @functools.wraps(command)
    def run(*args: Any, url: str, key: str | None, as_json: bool, **options: Any) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        try:
            http = httpx.Client(
                base_url=url, headers=headers, timeout=httpx.Timeout(600, connect=10)
            )
        except (httpx.InvalidURL, ValueError) as error:
            fail(f"--url {url}: {error}")
        with http:
            command(Client(http, as_json=as_json), *args, **options)

    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, kind, default in (
            ("url", UrlOption, "http://127.0.0.1:8000"),
            ("key", KeyOption, None),
            ("as_json", JsonOption, False),
        )
    ]
    run.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in [*own, *added]}
    return run
