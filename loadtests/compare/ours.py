"""Manyhats' own settings in the comparison."""

from __future__ import annotations

import sys
from pathlib import Path

from compare.target import COLD, MATRIX, PREFIX, SLORA, SLOTS, Launch, Place, Target

MAIN, MANY_SLOTS, NO_LAYERS, COLD_START = (
    "manyhats", "manyhats-128-slots", "manyhats-no-adapter-layers", "manyhats-cold",
)  # fmt: skip
SLOT_COUNT = 32


def launch(place: Place, home: Path, port: int, *flags: str) -> Launch:
    """``manyhats serve`` with the comparison's model and KV cache."""
    argv = [sys.executable, "-m", "manyhats", "serve", "--host", "127.0.0.1", "--port", str(port)]
    argv += ["--model", str(place.model), "--home", str(home)]
    argv += ["--kv-cache-mb", str(1024 * place.kv_gib), *place.flags, *flags]
    return Launch(tuple(argv))


def targets(place: Place) -> list[Target]:
    """As it is used; with all adapters resident; started cold; without adapter layers."""
    roots = ":".join(sorted({str(f.parent) for f in (*place.all_r16, *place.qv_r8)}))
    wearing = ("--adapter-root", roots, "--no-parity-probe")

    def made(name: str, setting: str, scenarios: set[str], *flags: str, wears: int) -> Target:
        return Target(
            name=name, peer="", setting=setting, scenarios=frozenset(scenarios), ready="/readyz",
            launch=lambda port: launch(place, place.work / "homes" / name, port, *flags),
            wears=wears, base=name in (MAIN, NO_LAYERS), qv=name == MAIN, runtime=wears > 0,
        )  # fmt: skip

    many = len(place.all_r16)
    slots = ("--slots", str(SLOT_COUNT))
    resident = ("--slots", str(many), "--host-cache-mb", "4096")
    return [
        made(
            MAIN, f"{SLOT_COUNT} slots", {MATRIX, SLORA, SLOTS, PREFIX}, *wearing, *slots,
            wears=many,
        ),
        made(MANY_SLOTS, "a slot an adapter", {SLOTS}, *wearing, *resident, wears=many),
        made(COLD_START, "no prefetch", {COLD}, *wearing, "--prefetch-hot", "0", wears=many),
        made(NO_LAYERS, "no adapter layers", {MATRIX}, "--no-adapter-layers", wears=0),
    ]  # fmt: skip
