"""What keeps an adapter from being deleted beside its route: pins, and requests that run."""

from __future__ import annotations

from fastapi import Request

from manyhats.api.state import api_state
from manyhats.errors import ConflictError
from manyhats.lifecycle.records import Entry, split_version


def refuse_held(request: Request, entry: Entry, model: str) -> None:
    """Raises ConflictError, naming what holds it, where a version of ``model`` (a name, or
    ``name@version``) is pinned, or running requests have a lease on it as of the latest snapshot.
    """
    version = split_version(model)[1]
    gone = {r.ref.digest: r.ref for r in entry.versions if version in (None, r.ref.version)}
    pinned = [str(r) for r in gone.values() if r.version in entry.route.pinned]
    if pinned:
        raise ConflictError(f"{', '.join(pinned)} is pinned: unpin it first, or use force")
    for resident in api_state(request).engine.stats().resident:
        ref = gone.get(resident.ref.digest)
        if ref is not None and resident.leases:
            raise ConflictError(
                f"{ref} is held by {resident.leases} running sequences: try again, or use force, "
                "which lets them end"
            )
