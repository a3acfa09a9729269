"""``manyhats backup``, ``restore`` and ``gc``: what is kept of a base beyond one server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from tqdm import tqdm

from manyhats.commands.client import Client, add_row, remote
from manyhats.config import Settings
from manyhats.errors import ConfigError
from manyhats.types import Digest

if TYPE_CHECKING:
    from manyhats.lifecycle.backup import Kept


@remote
def gc(
    client: Client,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")
    ] = False,
    reason: Annotated[str, typer.Option(help="Why, for the audit log.")] = "",
) -> None:
    """Remove, on a running server, what has had its time.

    Versions that were retired long enough ago, and bytes that no version refers to.
    """
    answer = client.call("POST", "/admin/gc", json={"dry_run": dry_run, "reason": reason})

    def words() -> Table:
        table = Table("versions", "digests", "bytes")
        counts = len(answer["versions"]), len(answer["digests"]), answer["bytes"]
        add_row(table, *map(str, counts))
        return table

    client.show(answer, words)


def back_up(settings: Settings, base: str | None, out: Path) -> str:
    """Write a backup of ``base`` (default: the only one there is); what was done, in words."""
    from manyhats.lifecycle.backup import backup

    name = _base(settings, base)
    with _kept(settings, name, exclusive=False) as kept:
        count = backup(kept, name, out, _progress)
    return f"{out}: {count} adapters of {name}"


def put_back(settings: Settings, base: str | None, source: Path, *, replace: bool) -> str:
    """Restore a backup; what was done, in words."""
    from manyhats.lifecycle.backup import base_of, restore

    name = base or base_of(source)
    with _kept(settings, name, exclusive=True) as kept:
        count = restore(source, kept, _progress, replace=replace)
    return f"{name}: {count} adapters from {source}"


@contextmanager
def _kept(settings: Settings, base: str, *, exclusive: bool) -> Iterator[Kept]:
    from manyhats.drift.opening import FILE_NAME
    from manyhats.drift.opening import open_store as open_drift_store
    from manyhats.drift.records import NameRecords
    from manyhats.lifecycle.backup import Kept
    from manyhats.lifecycle.build import open_adapters, open_store
    from manyhats.tenancy.build import open_stores

    with ExitStack() as stack:
        registry = stack.enter_context(closing(open_store(settings, base, exclusive=exclusive)))
        adapters = stack.enter_context(closing(open_adapters(settings, base)))
        tenants, usage = open_stores(settings, settings.registry_file(base))
        stack.callback(tenants.close)
        stack.callback(usage.close)
        drift = open_drift_store(settings, settings.base_folder(base) / FILE_NAME)
        stack.callback(drift.close)
        yield Kept(registry, adapters, tenants, usage, NameRecords(drift))


def _base(settings: Settings, base: str | None) -> str:
    folder = settings.home / "bases"
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if base is not None:
        return base
    if len(found) != 1:
        raise ConfigError(f"--base: which one? There are {', '.join(found) or 'none'} in {folder}")
    return found[0]


def _progress(digests: Iterable[Digest], total: int) -> Iterable[Digest]:
    return tqdm(digests, total=total, unit=" adapters", disable=None)  # type: ignore[no-any-return]
