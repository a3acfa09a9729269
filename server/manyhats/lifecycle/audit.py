"""The audit log: who changed what, when and why, each entry holding the hash of the one before it.

An entry that is changed, removed or put in between breaks the chain. Entries cut off at the end do
not; whoever must be sure of that keeps the newest hash elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

GENESIS: Final = "0" * 64
"""What the first entry has for the hash of the one before it."""

MAX_REASON: Final = 1000
"""Bound of a reason, characters."""


@dataclass(frozen=True, slots=True)
class Cause:
    """Who makes a change, and why."""

    actor: str = "server"
    reason: str = ""


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One change. ``seq`` counts from 1; ``at`` is UTC in ISO 8601.

    ``before`` and ``after`` are JSON objects, empty where there was or is nothing; ``previous`` is
    the hash of the entry before this one; ``hash`` that of all other fields (``entry_hash``).
    """

    seq: int
    at: str
    actor: str
    action: str
    name: str
    reason: str
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    previous: str
    hash: str

    def shown(self) -> dict[str, Any]:
        """The entry as JSON."""
        return asdict(self)


def canonical(value: Any) -> str:
    """The one JSON text of a value: keys sorted, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def entry_hash(fields: Mapping[str, Any]) -> str:
    """Hex SHA-256 of the canonical JSON of an entry's fields, its own hash left out."""
    content = {key: value for key, value in fields.items() if key != "hash"}
    return hashlib.sha256(canonical(content).encode()).hexdigest()


def broken_link(entries: Iterable[Mapping[str, Any]]) -> tuple[int, str | None, str]:
    """(entries looked at, what is wrong with the last of them or None, the newest hash).

    ``entries`` are all of the log as JSON, oldest first.
    """
    count, previous = 0, GENESIS
    for count, entry in enumerate(entries, 1):
        if entry["seq"] != count:
            return count, f"entry {count} is missing: {entry['seq']} is in its place", previous
        if entry["previous"] != previous:
            return count, f"entry {count} does not follow from the one before it", previous
        if entry_hash(entry) != entry["hash"]:
            return count, f"entry {count} is not what its hash says", previous
        previous = str(entry["hash"])
    return count, None, previous


def newest(db: sqlite3.Connection) -> tuple[int, str]:
    """(number, hash) of the newest entry; (0, GENESIS) of an empty log."""
    row = db.execute("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1").fetchone()
    return (0, GENESIS) if row is None else (int(row[0]), str(row[1]))


def following(
    previous: tuple[int, str],
    *,
    at: str,
    cause: Cause,
    action: str,
    name: str,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
) -> AuditEntry:
    """The entry of a change that comes after ``previous``: (number, hash) of the newest one."""
    fields: dict[str, Any] = {
        "seq": previous[0] + 1,
        "at": at,
        "actor": cause.actor,
        "action": action,
        "name": name,
        "reason": cause.reason,
        "before": before,
        "after": after,
        "previous": previous[1],
    }
    return AuditEntry(**fields, hash=entry_hash(fields))


def insert(db: sqlite3.Connection, entry: AuditEntry) -> None:
    """Write an entry, in the transaction of the change that it tells of."""
    row = entry.shown()
    db.execute(
        "INSERT INTO audit VALUES (:seq, :at, :actor, :action, :name, :reason, :before, :after, "
        ":previous, :hash)",
        {**row, "before": canonical(row["before"]), "after": canonical(row["after"])},
    )


def read(
    db: sqlite3.Connection, *, name: str | None, after: int, limit: int
) -> tuple[AuditEntry, ...]:
    """At most ``limit`` entries beyond number ``after``, oldest first; of one name where given."""
    rows = db.execute(
        "SELECT seq, at, actor, action, name, reason, before, after, previous, hash FROM audit "
        "WHERE seq > :after AND (:name IS NULL OR name = :name) ORDER BY seq LIMIT :limit",
        {"after": after, "name": name, "limit": limit},
    )
    return tuple(
        AuditEntry(
            seq, at, actor, action, name, reason, json.loads(before), json.loads(after), *hashes
        )
        for seq, at, actor, action, name, reason, before, after, *hashes in rows
    )
