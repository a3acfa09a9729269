"""The tables of the registry's formats 1 to 4, read once to become documents."""

from __future__ import annotations

import json
import sqlite3

from manyhats.lifecycle import routes
from manyhats.lifecycle.documents import UNKNOWN, NameDocument, encode
from manyhats.lifecycle.records import AdapterRecord, Entry
from manyhats.lifecycle.states import State
from manyhats.types import AdapterRef, Composition, CompositionKind, Digest, TenantId


def to_documents(db: sqlite3.Connection) -> None:
    """Write a document for each name that the tables know, those without a version as well."""
    entries = _read_entries(db)
    for name, last in db.execute("SELECT name, last_version FROM names").fetchall():
        document = NameDocument(last_version=last).holding(entries.get(name))
        db.execute("INSERT INTO documents VALUES (?, ?)", (name, encode(document)))


def _read_entries(db: sqlite3.Connection) -> dict[str, Entry]:
    """Every name with its versions and its route."""
    versions: dict[str, list[AdapterRecord]] = {}
    for name, version, digest, virtual_tokens, tenant, state, metadata, *rest in db.execute(
        "SELECT name, version, digest, virtual_tokens, tenant, state, metadata, family, max_rank, "
        "nbytes, created, source, actor, revision, composition FROM adapters ORDER BY name, version"
    ):
        family, max_rank, nbytes, created, source, actor, revision, stored = rest
        composition = None if stored is None else composition_of(stored)
        record = AdapterRecord(
            AdapterRef(name, version, Digest(digest), virtual_tokens, composition),
            TenantId(tenant),
            family,
            max_rank,
            nbytes,
            created,
            source,
            State.RETIRED if state == "retired" else State.CHECKED,
            actor,
            revision,
            json.loads(metadata),
        )
        versions.setdefault(name, []).append(record)
    found = {
        name: routes.parse(json.loads(route))
        for name, route in db.execute("SELECT name, route FROM routes")
    }
    return {
        name: Entry(tuple(records), found[name], began=UNKNOWN)
        for name, records in versions.items()
    }


def composition_of(text: str) -> Composition:
    """The tables' form of it: members pinned to their versions, with what those consist of."""
    stored = json.loads(text)
    kind = CompositionKind(stored["kind"])
    members = tuple(
        AdapterRef(name, version, Digest(digest), virtual, *map(composition_of, rest))
        for name, version, digest, virtual, _, *rest in stored["members"]
    )
    weights = tuple(row[4] for row in stored["members"])
    return Composition(kind, members, () if None in weights else weights)
