"""What the registry keeps of a version, and of a name as a whole."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from manyhats.errors import ConflictError, ModelNotFoundError, RequestError
from manyhats.lifecycle.audit import Cause
from manyhats.lifecycle.directory import AdapterCard
from manyhats.lifecycle.routes import BASELINE, Route
from manyhats.types import AdapterRef, TenantId

NAME_PATTERN: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
"""What an adapter may be called: no '/', no '@', nothing that could trip a path or a header."""

_NAME = re.compile(NAME_PATTERN)
_VERSIONED = re.compile(rf"({NAME_PATTERN})@([1-9][0-9]{{0,17}})")


class State(enum.StrEnum):
    """What may be done with a version. Only a ready one is served; a retired one is kept."""

    READY = "ready"
    RETIRED = "retired"


@dataclass(frozen=True, slots=True)
class Registration:
    """What whoever registers a version says of it.

    ``revision`` of the source it comes from; ``metadata``: what its trainer tells; ``promote``: see
    ``routes.registered``; ``cause``: who registers it, and why.
    """

    revision: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    promote: bool | None = None
    cause: Cause = field(default_factory=Cause)


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """One registered version.

    ``nbytes`` is the size of its parts, ``created`` in Unix seconds, ``source`` says where it came
    from (a folder, ``upload``), ``actor`` who registered it, ``since`` when it got its state (0:
    with its registration). A field is added at the end, with a default; see ``documents.py``.
    """

    ref: AdapterRef
    tenant: TenantId
    family: str
    max_rank: int
    nbytes: int
    created: int
    source: str
    state: State = State.READY
    actor: str = ""
    revision: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    since: int = 0

    def audited(self) -> dict[str, Any]:
        """What the audit log keeps of it."""
        return {"version": self.ref.version, "digest": self.ref.digest, "state": self.state.value}


@dataclass(frozen=True, slots=True)
class Entry:
    """One name: its versions, oldest first, at least one, and its route."""

    versions: tuple[AdapterRecord, ...]
    route: Route

    @property
    def name(self) -> str:
        """The name."""
        return self.versions[0].ref.name

    @property
    def owner(self) -> TenantId:
        """The tenant that has the name, with all its versions."""
        return self.versions[-1].tenant

    def find(self, version: int) -> AdapterRecord | None:
        """The version of that number, if it is kept."""
        return next((r for r in self.versions if r.ref.version == version), None)

    def ready(self, version: int, param: str = "version") -> int:
        """``version`` itself, if requests may be routed to it (BASELINE always).

        Raises ModelNotFoundError (no such version), ConflictError (it is retired).
        """
        if version == BASELINE:
            return version
        record = self.find(version)
        if record is None:
            have = ", ".join(str(r.ref.version) for r in self.versions[-10:])
            raise ModelNotFoundError(
                f"adapter {self.name!r} has no version {version}; it has {have}", param=param
            )
        if record.state is not State.READY:
            raise ConflictError(f"{record.ref} is {record.state.value}", param=param)
        return version


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


def check_name(name: str) -> None:
    """Raises RequestError unless ``name`` may name an adapter."""
    if not _NAME.fullmatch(name):
        raise RequestError(
            f"name {name[:140]!r} is not allowed: 1 to 128 characters out of A-Z a-z 0-9 . _ -, "
            "the first a letter or a digit",
            param="name",
        )


def split_version(model: str) -> tuple[str, int | None]:
    """``name@version`` as (name, version); anything else as it is, with None."""
    exact = _VERSIONED.fullmatch(model)
    return (exact[1], int(exact[2])) if exact else (model, None)


def held(entry: Entry, what: str, verb: str) -> ConflictError:
    """Why something of ``entry`` cannot go: requests are routed to it."""
    return ConflictError(
        f"{what} is not {verb}: requests for {entry.name!r} are routed to {entry.route.described()}"
    )


def route_json(route: Route | None) -> Mapping[str, Any]:
    """A name's route as the audit log keeps it; empty where there is none."""
    return {} if route is None else {"route": route.shown()}


def card_of(entry: Entry, record: AdapterRecord) -> AdapterCard:
    """The version as it is listed."""
    return AdapterCard(
        ref=record.ref,
        family=record.family,
        max_rank=record.max_rank,
        nbytes=record.nbytes,
        created=record.created,
        stable=record.ref.version == entry.route.stable,
    )
