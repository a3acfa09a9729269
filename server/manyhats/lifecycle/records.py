"""What the registry keeps of a version, and of a name as a whole."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from manyhats.errors import ConflictError, ModelNotFoundError, RequestError
from manyhats.lifecycle.audit import Cause
from manyhats.lifecycle.directory import AdapterCard
from manyhats.lifecycle.routes import BASELINE, Route
from manyhats.lifecycle.states import Demands, State, Verdict
from manyhats.types import AdapterRef, TenantId

NAME_PATTERN: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
"""What an adapter may be called: no '/', no '@', nothing that could trip a path or a header."""

_NAME = re.compile(NAME_PATTERN)
_VERSIONED = re.compile(rf"({NAME_PATTERN})@([1-9][0-9]{{0,17}})")


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

    def noting(self, found: Mapping[str, str]) -> Registration:
        """The same, and in its metadata what compiling the adapter found."""
        return replace(self, metadata={**self.metadata, **found}) if found else self


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """One registered version.

    ``nbytes`` is the size of its parts, ``created`` in Unix seconds, ``source`` says where it came
    from (a folder, ``upload``), ``actor`` who registered it, ``since`` when it got its state (0:
    with its registration), ``verdict`` its last evaluation, ``base_digest`` that of the base's
    weights when it was registered. A field is added at the end, with a default; see
    ``documents.py``.
    """

    ref: AdapterRef
    tenant: TenantId
    family: str
    max_rank: int
    nbytes: int
    created: int
    source: str
    state: State = State.CHECKED
    actor: str = ""
    revision: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    since: int = 0
    verdict: Verdict | None = None
    base_digest: str = ""

    @property
    def retired(self) -> bool:
        """Whether it is out of use; every other version may be asked for."""
        return self.state is State.RETIRED

    def retiring(self, retired: bool, now: float) -> AdapterRecord:
        """The version out of use, or in the state again that it had before."""
        if retired == self.retired:
            return self
        back = self.verdict.state if self.verdict else State.CHECKED
        return replace(self, state=State.RETIRED if retired else back, since=int(now))

    def judged(self, verdict: Verdict) -> AdapterRecord:
        """The version after an evaluation; a retired one stays so."""
        state = self.state if self.retired else verdict.state
        since = self.since if state is self.state else verdict.at
        return replace(self, state=state, since=since, verdict=verdict)

    def audited(self) -> dict[str, Any]:
        """What the audit log keeps of it."""
        shown = {"version": self.ref.version, "digest": self.ref.digest, "state": self.state.value}
        failed = list(self.verdict.failed) if self.verdict else []
        return {**shown, "failed": failed} if failed else shown


@dataclass(frozen=True, slots=True)
class Entry:
    """One name: its versions, oldest first, at least one, its route, and what it demands.

    ``began``: the number of the audit log's entry that the name came with; before that it may have
    been another's.
    """

    versions: tuple[AdapterRecord, ...]
    route: Route
    demands: Demands = field(default_factory=Demands)
    began: int = 0

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

    def get(self, version: int, param: str = "version") -> AdapterRecord:
        """The version of that number. Raises ModelNotFoundError, saying which there are."""
        record = self.find(version)
        if record is None:
            have = ", ".join(str(r.ref.version) for r in self.versions[-10:])
            raise ModelNotFoundError(
                f"adapter {self.name!r} has no version {version}; it has {have}", param=param
            )
        return record

    def ready(self, version: int, param: str = "version") -> int:
        """``version`` itself, if requests may be routed to it (BASELINE always).

        Raises ModelNotFoundError (no such version), ConflictError (it is retired).
        """
        if version == BASELINE:
            return version
        record = self.get(version, param)
        if record.retired:
            raise ConflictError(f"{record.ref} is {record.state.value}", param=param)
        return version


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
