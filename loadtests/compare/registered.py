"""What 2,000 registered adapters cost at start and in memory, beside 10: Manyhats alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compare.cells import Options
from compare.measured import Measured
from compare.ours import MAIN, launch
from compare.server import PeerServer
from compare.target import REGISTERED, Place
from make_adapters import make_adapters
from server_process import free_port, register

KIND = "qv-r1"


def folders(place: Place, count: int) -> list[Path]:
    """``count`` adapters of rank 1 on q and v: their number matters here, not their size."""
    return make_adapters(
        place.model / "config.json", place.work / "registered", count=count, rank=1, targets="qv"
    )


def _start(place: Place, count: int) -> PeerServer:
    home = place.work / "homes" / f"registered-{count}"
    port = free_port()
    flags = ("--adapter-root", str(place.work / "registered"), "--no-parity-probe")
    log = place.work / "logs" / f"registered-{count}.log"
    return PeerServer(launch(place, home, port, *flags), port, log)


async def prepare(place: Place, options: Options) -> None:
    """Registers them, each number in a home of its own; what is registered already stays."""
    made = folders(place, max(options.registered))
    for count in options.registered:
        marker = place.work / "homes" / f"registered-{count}" / "registered"
        if marker.exists():
            continue
        server = _start(place, count)
        try:
            await server.wait_ready("/readyz", options.start_timeout_s)
            await register(server.base_url, made[:count])
        finally:
            server.stop()
        marker.write_text(f"{count}\n", encoding="utf-8")


async def measure(place: Place, options: Options, number: int) -> Sequence[Measured]:
    """One start of each: seconds until ready, and memory then."""
    found = []
    for count in options.registered:
        server = _start(place, count)
        try:
            start_s = await server.wait_ready("/readyz", options.start_timeout_s)
            values = {"start_s": start_s, "memory_mib": server.memory_mib()}
        finally:
            server.stop()
        found.append(Measured(MAIN, REGISTERED, KIND, 0, count, number, values))
    return found
