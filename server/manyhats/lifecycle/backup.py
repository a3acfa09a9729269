"""Backups: a folder (or a .tar of it) with all of one base's registry, and every adapter's bytes.

::

    manifest.json      the format, the base, and the SHA-256 of the four files below
    registry.json      the key, a document a name, evaluations, and the whole audit log
    tenants.json       tenants, keys (their digests) and grants
    usage.json         usage by day, tenant and adapter
    drift.json         of drift detection what is the names': policies and what these go by
    adapters/          the bytes, laid out as in an adapter store

It is of no kind of store: what was backed up from SQLite can be restored into Redis, and back.
Each version is copied through its digest, both ways, and the audit log must be whole. A backup
without drift.json is of a server that did not write it: it has no policies.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from manyhats.adapters.names import CONFIG_NAME, WEIGHTS_NAME
from manyhats.adapters.store import AdapterStore
from manyhats.errors import AdapterLoadError, ConfigError, ServiceError
from manyhats.lifecycle.audit import AuditEntry, broken_link
from manyhats.lifecycle.documents import decode
from manyhats.lifecycle.store import Dump, Head, RegistryStore
from manyhats.tenancy.store import Change, Kind, TenantStore
from manyhats.tenancy.usage import Counts, UsageKey, UsageStore
from manyhats.types import Digest

FORMAT: Final = 1
"""Of a backup."""

_TRIES: Final = 5
_MANIFEST: Final = "manifest.json"
_PARTS: Final = ("registry.json", "tenants.json", "usage.json", "drift.json")
_OPTIONAL: Final = "drift.json"
_TAR: Final = ".tar"

Progress = Callable[[Iterable[Digest], int], Iterable[Digest]]
"""Shows how far one is: given the digests and their number, gives them one after the other."""


class Records(Protocol):
    """What others keep of the names of a registry: texts by key. Every call may block, and raises
    ServiceError.
    """

    def read(self) -> Mapping[str, str]:
        """All of them."""

    def replace(self, texts: Mapping[str, str]) -> None:
        """Put ``texts`` in the place of all that are there."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Everything of one base that outlives a server."""

    registry: RegistryStore
    adapters: AdapterStore
    tenants: TenantStore
    usage: UsageStore
    drift: Records


def backup(kept: Kept, base: str, out: Path, progress: Progress) -> int:
    """Write all of it to ``out``, which must not be there yet; how many versions' bytes there are.

    A server may go on meanwhile. Raises ConfigError (``out``), AdapterLoadError (bytes are missing
    or damaged), ServiceError (a store, the disk, a broken audit log).
    """
    if out.exists():
        raise ConfigError(f"{out} is there already", param="out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch) / "backup"
        folder.mkdir()
        with closing(AdapterStore(folder / "adapters")) as copies:
            dump = _copied(kept, copies, progress)
            count = len(copies.list())
        _, tenants = kept.tenants.read()
        usage = [[*key, *counts] for key, counts in kept.usage.read(0).items()]
        values = (_shown(dump), tenants, usage, dict(kept.drift.read()))
        parts = dict(zip(_PARTS, values, strict=True))
        hashes = {name: _write(folder / name, value) for name, value in parts.items()}
        _write(folder / _MANIFEST, {"format": FORMAT, "base": base, "sha256": hashes})
        if out.suffix == _TAR:
            with tarfile.open(whole := Path(scratch) / "tar", "w") as tar:
                tar.add(folder, arcname=".")
            whole.rename(out)
        else:
            folder.rename(out)
    return count


def restore(source: Path, kept: Kept, progress: Progress, *, replace: bool = False) -> int:
    """Put a backup into stores that hold nothing, or with ``replace`` in the place of what they
    hold; how many versions' bytes it brought. No server may run over them.

    Everything is checked before anything is written but bytes, which hurt nobody. Raises
    ConfigError (no backup, a damaged one, the stores are in use), AdapterLoadError, ServiceError.
    """
    with tempfile.TemporaryDirectory(prefix="manyhats-restore-") as scratch:
        folder = source
        if source.is_file():
            folder = Path(scratch)
            with tarfile.open(source) as tar:
                tar.extractall(folder, filter="data")
        registry, tenants, usage, drift = _read(folder)
        dump = _parsed(registry)
        if not replace and (kept.registry.head() != Head() or kept.registry.read()[1]):
            raise ConfigError("there is a registry already; --replace puts the backup in its place")
        with closing(AdapterStore(folder / "adapters")) as copies:
            wanted = sorted(_digests(dump))
            for digest in progress(wanted, len(wanted)):
                _copy(copies, kept.adapters, digest)
        kept.adapters.claim(hashlib.sha256(dump.key).hexdigest(), replace=True)
        _restore_tenants(kept.tenants, tenants)
        kept.drift.replace(drift)
        kept.registry.load(dump)
        tally = {UsageKey(*row[:3]): Counts(*row[3:]) for row in usage}
        kept.usage.replace(tally)
    return len(wanted)


def base_of(source: Path) -> str:
    """The base whose backup this is. Raises ConfigError."""
    try:
        if source.is_file():
            with tarfile.open(source) as tar, tar.extractfile(f"./{_MANIFEST}") as file:  # type: ignore[union-attr]
                return str(json.load(file)["base"])
        return str(json.loads((source / _MANIFEST).read_bytes())["base"])
    except (OSError, ValueError, KeyError, tarfile.TarError) as exc:
        raise ConfigError(f"{source} is no backup: {exc}") from exc


def _copied(kept: Kept, copies: AdapterStore, progress: Progress) -> Dump:
    """The registry, every version of which is in ``copies``: taken anew where one was deleted."""
    for _ in range(_TRIES):
        dump = kept.registry.dump()
        _check_log(dump.entries)
        wanted = sorted(_digests(dump))
        try:
            for digest in progress(wanted, len(wanted)):
                _copy(kept.adapters, copies, digest)
        except AdapterLoadError:
            if kept.registry.head() == _end(dump):
                raise
            continue
        for digest in set(copies.list()) - set(wanted):
            copies.delete(digest)
        return dump
    raise ServiceError("adapters are being deleted too fast to be backed up; try again")


def _copy(source: AdapterStore, target: AdapterStore, digest: Digest) -> None:
    if target.intact(digest):
        return
    folder = source.path(digest)
    with target.stage(source.size(digest)) as staging:
        staging.copy(folder / CONFIG_NAME, folder / WEIGHTS_NAME)
        if staging.seal() != digest:
            raise AdapterLoadError(f"adapter {digest} is damaged on the disk")
        target.commit(staging)


def _restore_tenants(store: TenantStore, texts: Mapping[str, Mapping[str, str]]) -> None:
    revision, there = store.read()
    gone = [
        Change(kind, ident, None)
        for kind, records in there.items()
        for ident in records
        if ident not in texts.get(kind.value, {})
    ]
    given = [Change(Kind(k), i, text) for k, found in texts.items() for i, text in found.items()]
    store.write(revision, [*gone, *given])


def _shown(dump: Dump) -> dict[str, Any]:
    entries = [entry.shown() for entry in dump.entries]
    return {
        "key": dump.key.hex(),
        "documents": dict(dump.documents),
        "texts": dict(dump.texts),
        "entries": entries,
    }


def _parsed(shown: Mapping[str, Any]) -> Dump:
    entries = tuple(AuditEntry(**entry) for entry in shown["entries"])
    _check_log(entries)
    return Dump(bytes.fromhex(shown["key"]), shown["documents"], entries, shown.get("texts", {}))


def _end(dump: Dump) -> Head:
    return Head.of(dump.entries[-1]) if dump.entries else Head()


def _check_log(entries: Iterable[AuditEntry]) -> None:
    _, wrong, _ = broken_link(entry.shown() for entry in entries)
    if wrong is not None:
        raise ServiceError(f"the audit log is not whole: {wrong}")


def _digests(dump: Dump) -> set[Digest]:
    """The content of every version that has bytes: compositions have none."""
    documents = (decode(name, text) for name, text in dump.documents.items())
    refs = (record.ref for document in documents for record in document.versions)
    return {ref.digest for ref in refs if ref.composition is None}


def _write(path: Path, value: Any) -> str:
    content = json.dumps(value, ensure_ascii=False, sort_keys=True).encode()
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def _read(folder: Path) -> list[Any]:
    """What ``_PARTS`` hold; one that is optional and was not written holds nothing."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        given = manifest.get("sha256", {})
        parts = [name for name in _PARTS if name in given or name != _OPTIONAL]
        contents = {name: (folder / name).read_bytes() for name in parts}
    except (OSError, ValueError) as exc:
        raise ConfigError(f"this is no backup: {exc}") from exc
    if manifest.get("format") != FORMAT:
        raise ConfigError(f"the backup has format {manifest.get('format')}, not {FORMAT}")
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != given.get(name):
            raise ConfigError(f"{name} of the backup is damaged")
    return [json.loads(contents[name]) if name in contents else {} for name in _PARTS]
