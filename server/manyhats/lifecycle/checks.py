"""What stands against a change of the registry: routes, and compositions that hold a version."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from manyhats.errors import ConflictError
from manyhats.lifecycle.compositions import BASE_DIGEST
from manyhats.lifecycle.records import AdapterRecord, Entry
from manyhats.types import Composition


def check_members(composition: Composition | None, find: Callable[[str], Entry | None]) -> None:
    """Raises ConflictError where a member is no version any more."""
    for member in composition.members if composition else ():
        if member.digest == BASE_DIGEST:
            continue
        entry = find(member.name)
        record = entry.find(member.version) if entry else None
        if record is None or record.ref.digest != member.digest:
            raise ConflictError(f"{member} has changed meanwhile", param="composition")


def check_no_member(entries: Iterable[Entry], name: str, version: int | None) -> None:
    """Raises ConflictError where a version of ``name`` (None: any) is a member of a registered
    composition.
    """
    holders = [
        str(record.ref)
        for entry in entries
        for record in entry.versions
        if record.ref.composition
        and any(
            member.name == name and version in (None, member.version)
            for member in record.ref.composition.members
        )
    ]
    if holders:
        raise ConflictError(
            f"adapter {name!r} is a member of {len(holders)} registered compositions: "
            f"{', '.join(holders[:5])}; delete those first",
            param="name",
        )


def check_removable(
    entry: Entry,
    gone: Sequence[AdapterRecord],
    kept: Sequence[AdapterRecord],
    version: int | None,
    *,
    force: bool,
) -> None:
    """Raises ConflictError, see ``Registry.delete``."""
    if kept and version is not None:
        routed = entry.route.holds(version)
        if routed and (not force or version == entry.route.stable):
            raise held(entry, str(gone[0].ref), "deleted")
    elif len(gone) > 1 and not force:
        raise held(entry, f"{entry.name!r} with its {len(gone)} versions", "deleted without force")


def held(entry: Entry, what: str, verb: str) -> ConflictError:
    """Why something of ``entry`` cannot go: requests are routed to it."""
    return ConflictError(
        f"{what} is not {verb}: requests for {entry.name!r} are routed to {entry.route.described()}"
    )
