"""Rows of the registry's tables, written in the caller's transaction, and read."""

from __future__ import annotations

import json
import sqlite3

from manyhats.lifecycle import routes
from manyhats.lifecycle.audit import canonical
from manyhats.lifecycle.compositions import from_json, to_json
from manyhats.lifecycle.records import AdapterRecord, Entry, State
from manyhats.lifecycle.routes import Route
from manyhats.types import AdapterRef, Digest, TenantId


def next_version(db: sqlite3.Connection, name: str) -> int:
    """Counts the name's versions up; the number never comes again."""
    [version] = db.execute(
        "INSERT INTO names VALUES (?, 1) ON CONFLICT (name) DO UPDATE "
        "SET last_version = last_version + 1 RETURNING last_version",
        (name,),
    ).fetchone()
    return int(version)


def insert_version(db: sqlite3.Connection, record: AdapterRecord) -> None:
    """One version more."""
    ref = record.ref
    db.execute(
        "INSERT INTO adapters (name, version, digest, virtual_tokens, tenant, family, max_rank, "
        "nbytes, created, source, state, actor, revision, metadata, composition) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            ref.name,
            ref.version,
            ref.digest,
            ref.virtual_tokens,
            record.tenant,
            record.family,
            record.max_rank,
            record.nbytes,
            record.created,
            record.source,
            record.state.value,
            record.actor,
            record.revision,
            canonical(dict(record.metadata)),
            None if ref.composition is None else to_json(ref.composition),
        ),
    )


def delete_version(db: sqlite3.Connection, record: AdapterRecord) -> None:
    """One version less."""
    db.execute(
        "DELETE FROM adapters WHERE name = ? AND version = ?",
        (record.ref.name, record.ref.version),
    )


def set_state(db: sqlite3.Connection, record: AdapterRecord, state: State) -> None:
    """A version's state."""
    db.execute(
        "UPDATE adapters SET state = ? WHERE name = ? AND version = ?",
        (state.value, record.ref.name, record.ref.version),
    )


def set_route(db: sqlite3.Connection, name: str, route: Route | None) -> None:
    """The name's route; None removes it."""
    if route is None:
        db.execute("DELETE FROM routes WHERE name = ?", (name,))
        return
    db.execute(
        "INSERT INTO routes VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET route = excluded.route",
        (name, canonical(route.shown())),
    )


def read_entries(db: sqlite3.Connection) -> dict[str, Entry]:
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
            State(state),
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
