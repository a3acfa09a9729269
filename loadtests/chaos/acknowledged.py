"""What a registry must hold after a kill: what was acknowledged, and a log that says the same; and
where it is kept meanwhile.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.redis_server import RedisServer

from manyhats.lifecycle.audit import broken_link

NAMES = "abcd"


def expect(true: bool, message: str) -> None:
    """Ends the program with ``message`` where something that must hold does not."""
    if not true:
        raise SystemExit(message)


@contextmanager
def place(store: str) -> Iterator[tuple[Path, str | None]]:
    """A home for a while, and the address of a Redis of its own where ``store`` is ``redis``."""
    with tempfile.TemporaryDirectory(prefix="manyhats-chaos-") as folder:
        home = Path(folder)
        if store != "redis":
            yield home, None
            return
        (home / "redis").mkdir()
        server = RedisServer(home / "redis", persistent=True)
        server.start()
        try:
            yield home, server.url
        finally:
            server.stop()


@dataclass
class Acknowledged:
    """What the names were when an operation was last answered, as JSON has them; the log's hashes;
    the newest number of each name's versions.
    """

    known: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(NAMES))
    hashes: list[str] = field(default_factory=list)
    newest: dict[str, int] = field(default_factory=lambda: dict.fromkeys(NAMES, 0))

    def check_names(self, now: Mapping[str, Any], open_names: str) -> None:
        """``now`` is what was known, but for names whose operation was on its way; it is known."""
        for name in NAMES:
            if name not in open_names:
                expect(
                    now[name] == self.known[name], f"{name}: {now[name]}, not {self.known[name]}"
                )
            numbers = [v[0] for v in now[name]["versions"]] if now[name] else []
            old = self.known[name]["versions"] if self.known[name] else []
            fresh = [n for n in numbers if n not in [v[0] for v in old]]
            expect(all(n > self.newest[name] for n in fresh), f"{name}: a number came again")
            self.newest[name] = max([self.newest[name], *numbers])
        self.known = dict(now)

    def check_log(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """The chain holds, goes on from what it was, and its last word on each route is true."""
        expect(broken_link(entries)[1] is None, f"the chain: {broken_link(entries)}")
        hashes = [e["hash"] for e in entries]
        expect(hashes[: len(self.hashes)] == self.hashes, "an entry is gone or another one")
        self.hashes = hashes
        for name in NAMES:
            told = [e["after"] for e in entries if e["name"] == name]
            routes = [t.get("route", t) for t in told if not t or "stable" in t or "route" in t]
            last = routes[-1] if routes else {}
            route = self.known[name]["route"] if self.known[name] else {}
            expect(route == last, f"{name}: {route}, the log: {last}")
