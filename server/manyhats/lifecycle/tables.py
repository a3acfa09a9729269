"""The tables of the registry's formats 1 to 4, read once to become documents."""

from __future__ import annotations

import json
import sqlite3

from manyhats.lifecycle import routes
from manyhats.lifecycle.compositions import from_json
from manyhats.lifecycle.documents import NameDocument, encode
from manyhats.lifecycle.records import AdapterRecord, Entry
from manyhats.lifecycle.states import State
from manyhats.types import AdapterRef, Digest, TenantId


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
        composition = None if stored is None else from_json(stored)
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
    return {name: Entry(tuple(records), found[name]) for name, records in versions.items()}
