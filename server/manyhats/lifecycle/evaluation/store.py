"""Evaluations at rest: what an adapter is asked and judged by, and each version's last report.

::

    root/<tenant>/<name>/settings.json   thresholds, what promotion requires
    root/<tenant>/<name>/data.jsonl      pairs, as they were given
    root/<tenant>/<name>/rules.jsonl     rules, as they were given
    root/<tenant>/<name>/<version>.json  the last report of a version

A file appears whole: written beside its place, then renamed. Version numbers never come again, so a
report never comes to speak of another version; names do, so a name's folder goes with the name.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import orjson

from manyhats.errors import ServiceError
from manyhats.lifecycle.evaluation.gate import Require, Thresholds
from manyhats.lifecycle.evaluation.probes import Pair, Rule, read_pairs, read_rules
from manyhats.types import TenantId

_DATA: Final = "data.jsonl"
_RULES: Final = "rules.jsonl"
_SETTINGS: Final = "settings.json"


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """What one name is asked and judged by."""

    data: tuple[Pair, ...] = ()
    rules: tuple[Rule, ...] = ()
    thresholds: Thresholds = field(default_factory=Thresholds)
    require: Require = Require.NONE


class EvaluationStore:
    """The files under ``root``. Every call blocks on the disk and may raise ServiceError."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def settings(self, tenant: TenantId, name: str) -> EvaluationSettings:
        """Those of a name; the defaults where nothing was said."""
        folder = self._folder(tenant, name)
        kept = self._read(folder / _SETTINGS)
        said = orjson.loads(kept) if kept is not None else {}
        return EvaluationSettings(
            data=read_pairs((self._read(folder / _DATA) or b"").decode()),
            rules=read_rules((self._read(folder / _RULES) or b"").decode()),
            thresholds=Thresholds.model_validate(said.get("thresholds", {})),
            require=Require(said.get("require", Require.NONE)),
        )

    def require(self, tenant: TenantId, name: str) -> Require:
        """What promotion requires, without reading the probes."""
        kept = self._read(self._folder(tenant, name) / _SETTINGS)
        return Require(orjson.loads(kept)["require"]) if kept is not None else Require.NONE

    def write(
        self,
        tenant: TenantId,
        name: str,
        *,
        data: str | None,
        rules: str | None,
        thresholds: Thresholds | None,
        require: Require | None,
    ) -> None:
        """Replace what is given; None leaves what is there."""
        folder = self._folder(tenant, name)
        if thresholds is not None or require is not None:
            kept = self._read(folder / _SETTINGS)
            said = orjson.loads(kept) if kept is not None else {}
            said["thresholds"] = (
                thresholds.model_dump(exclude_unset=True)
                if thresholds is not None
                else said.get("thresholds", {})
            )
            said["require"] = (require or Require(said.get("require", Require.NONE))).value
            self._write(folder / _SETTINGS, orjson.dumps(said))
        if data is not None:
            self._write(folder / _DATA, data.encode())
        if rules is not None:
            self._write(folder / _RULES, rules.encode())

    def report(self, tenant: TenantId, name: str, version: int) -> dict[str, Any] | None:
        """A version's last report."""
        kept = self._read(self._folder(tenant, name) / f"{version}.json")
        return None if kept is None else dict(orjson.loads(kept))

    def keep_report(
        self, tenant: TenantId, name: str, version: int, report: Mapping[str, Any]
    ) -> None:
        """Make this the version's last report."""
        self._write(self._folder(tenant, name) / f"{version}.json", orjson.dumps(dict(report)))

    def forget(self, tenant: TenantId, name: str) -> None:
        """The name is gone."""
        try:
            shutil.rmtree(self._folder(tenant, name))
        except FileNotFoundError:
            return
        except OSError as exc:
            raise ServiceError(f"the evaluations of {name!r} cannot be removed: {exc}") from exc

    def _folder(self, tenant: TenantId, name: str) -> Path:
        return self._root / tenant / name

    def _read(self, path: Path) -> bytes | None:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise ServiceError(f"an evaluation cannot be read: {exc}") from exc

    def _write(self, path: Path, content: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(file.name).replace(path)
        except OSError as exc:
            raise ServiceError(f"an evaluation cannot be written: {exc}") from exc
