"""What is measured: a server, or a library's batch, in one of its settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MATRIX, SLORA, SLOTS, COLD, PREFIX, REGISTERED = (
    "matrix", "slora", "slots", "cold", "prefix", "registered",
)  # fmt: skip
SCENARIOS = (MATRIX, SLORA, SLOTS, COLD, PREFIX, REGISTERED)


@dataclass(frozen=True, slots=True)
class Place:
    """What all targets share.

    ``model``: a local folder as transformers reads it. ``all_r16``, ``qv_r8``: adapter folders in
    PEFT's format, rank 16 on all projections and rank 8 on q and v. ``peers``: the folder of the
    environments. ``work``: logs, homes, conversions. ``kv_gib``: the KV cache of every server.
    ``threads``: a peer's. ``flags``: for Manyhats' server besides.
    """

    model: Path
    all_r16: tuple[Path, ...]
    qv_r8: tuple[Path, ...]
    peers: Path
    work: Path
    kv_gib: int = 1
    threads: int = 2
    flags: tuple[str, ...] = ()

    def python(self, peer: str) -> str:
        """The interpreter of a peer's environment."""
        return str(self.peers / peer / "venv" / "bin" / "python")


@dataclass(frozen=True, slots=True)
class Launch:
    """A server's command line, and what its environment has besides."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Target:
    """``peer``: whose environment it needs; empty for our own. ``setting``: for the table.
    ``launch``: from a port to the command; None for a batch worker with ``batch`` as its flags.

    ``wears``: adapters that it can be asked for; ``base``: whether the bare base is asked as well.
    ``qv``: whether the rank 8 ones are. ``runtime``: they are registered over HTTP after the start.
    ``fields``: see ``bench_load.Load``.
    """

    name: str
    peer: str
    setting: str
    scenarios: frozenset[str]
    launch: Callable[[int], Launch] | None = None
    batch: tuple[str, ...] = ()
    ready: str = "/health"
    wears: int = 0
    base: bool = False
    qv: bool = False
    runtime: bool = False
    fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
