"""The registry's documents: all that is kept of one name, as JSON with a format number.

To add a field to ``AdapterRecord``, ``Route`` or what they hold: give it a default, and put it at
the end. Documents written before have the default when they are read; there is nothing to migrate,
and nothing to do here. ``FORMAT`` is raised only where an older server must not read (and write
back, without the field) what a newer one has written; then ``decode`` brings older texts up.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

from pydantic import TypeAdapter, ValidationError

from manyhats.errors import ServiceError
from manyhats.lifecycle.records import AdapterRecord, Entry
from manyhats.lifecycle.routes import Route
from manyhats.lifecycle.states import Demands, State

FORMAT: Final = 2
"""Of the documents that this server writes, and the newest that it reads."""

UNKNOWN: Final = 2**62
"""After every entry of the log: nothing of it is shown to the name's owner."""


@dataclass(frozen=True, slots=True)
class NameDocument:
    """One name. ``last_version`` outlives its versions, so that ``name@3`` never comes to mean
    something else; ``route`` is None where no version is left, and ``demands`` are the defaults.
    """

    format: int = FORMAT
    last_version: int = 0
    versions: tuple[AdapterRecord, ...] = ()
    route: Route | None = None
    demands: Demands = field(default_factory=Demands)
    began: int = 0

    @property
    def entry(self) -> Entry | None:
        """The name as requests know it; None where no version is left."""
        if self.route is None or not self.versions:
            return None
        return Entry(self.versions, self.route, self.demands, self.began)

    def holding(self, entry: Entry | None) -> NameDocument:
        """The document with these versions and this route."""
        if entry is None:
            return NameDocument(last_version=self.last_version)
        last = max(self.last_version, entry.versions[-1].ref.version)
        return NameDocument(FORMAT, last, entry.versions, entry.route, entry.demands, entry.began)


_DOCUMENT: Final = TypeAdapter(NameDocument)


def encode(document: NameDocument) -> str:
    """The JSON text of a document."""
    return _DOCUMENT.dump_json(document).decode()


def decode(name: str, text: str) -> NameDocument:
    """What ``encode`` was given. Raises ServiceError for a text that is no such document, or one of
    a newer format.
    """
    try:
        document = _DOCUMENT.validate_json(text)
    except ValidationError as exc:
        raise ServiceError(f"the registry's document of {name!r} cannot be read: {exc}") from exc
    if document.format > FORMAT:
        raise ServiceError(
            f"the registry's document of {name!r} has format {document.format}, this server knows "
            f"{FORMAT}"
        )
    return _as_written_now(document) if document.format < FORMAT else document


def _as_written_now(document: NameDocument) -> NameDocument:
    """Format 1 called every version in use ready, and did not say since when a name is whose."""
    versions = tuple(
        replace(record, state=State.CHECKED) if record.state is State.READY else record
        for record in document.versions
    )
    return replace(document, format=FORMAT, versions=versions, began=UNKNOWN)
