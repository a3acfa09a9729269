"""What a soak looks at from outside: the server's process and its gauges, and whether they grow."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

GAUGES = (
    "manyhats_running",
    "manyhats_waiting",
    "manyhats_leases",
    "manyhats_kv_blocks_used",
    "manyhats_slots_used",
    "manyhats_rows_used",
    "manyhats_host_bytes_used",
    "manyhats_failed_steps_total",
)
"""The server's series that a sample keeps; those of ``AT_REST`` must be zero without requests."""
AT_REST = (
    "manyhats_running",
    "manyhats_waiting",
    "manyhats_leases",
    "manyhats_kv_blocks_used",
    "manyhats_failed_steps_total",
)
_LINE = re.compile(r"^(\w+) (\S+)$", re.MULTILINE)


class RunningClock:
    """Seconds that the machine really gave: a pause of this process (SIGSTOP, a laptop that
    sleeps) does not count. ``tick`` must be called more often than once in ``longest_s``.
    """

    def __init__(self, longest_s: float = 2.0) -> None:
        self.paused_s = 0.0
        self._longest_s = longest_s
        self._started = self._seen = time.monotonic()

    def tick(self) -> float:
        """The seconds so far."""
        now = time.monotonic()
        if now - self._seen > self._longest_s:
            self.paused_s += now - self._seen
        self._seen = now
        return now - self._started - self.paused_s


@dataclass(frozen=True, slots=True)
class Sample:
    """The server at one moment. ``rss_mib``: resident; ``anon_mib``: of it, what no file backs."""

    at_s: float
    rss_mib: float
    anon_mib: float
    fds: int
    threads: int
    gauges: Mapping[str, float]

    def row(self) -> dict[str, float]:
        """One line of a table."""
        own = {"at_s": round(self.at_s, 1), "rss_mib": round(self.rss_mib, 1)}
        own |= {"anon_mib": round(self.anon_mib, 1), "fds": self.fds, "threads": self.threads}
        return own | {name.removeprefix("manyhats_"): self.gauges[name] for name in GAUGES}


def sample(at_s: float, pid: int, metrics: str) -> Sample:
    """The process ``pid`` (Linux) beside the text of its /metrics. Raises OSError, KeyError."""
    process = Path("/proc") / str(pid)
    status = dict(
        line.split(":", 1) for line in (process / "status").read_text().splitlines() if ":" in line
    )
    found = {name: float(value) for name, value in _LINE.findall(metrics)}
    return Sample(
        at_s,
        int(status["VmRSS"].split()[0]) / 1024,
        int(status["RssAnon"].split()[0]) / 1024,
        len(list((process / "fd").iterdir())),
        int(status["Threads"]),
        {name: found[name] for name in GAUGES},
    )


@dataclass(frozen=True, slots=True)
class Trend:
    """How a quantity went: least squares over time, and the medians of its second and last fifth,
    which a single peak does not move.
    """

    slope_per_h: float
    early: float
    late: float

    @property
    def growth(self) -> float:
        """Relative, from the early median to the late one."""
        return self.late / self.early - 1


def trend(samples: Sequence[Sample], name: str) -> Trend:
    """Of one field of the samples, after the first fifth, in which caches fill.

    Raises ValueError for fewer than ten samples.
    """
    fifth = len(samples) // 5
    if fifth < 2:
        raise ValueError(f"{len(samples)} samples are too few for a trend; ten are needed")
    values = [float(getattr(s, name)) for s in samples]
    hours = [s.at_s / 3600 for s in samples[fifth:]]
    slope, _ = statistics.linear_regression(hours, values[fifth:])
    early = statistics.median(values[fifth : 2 * fifth])
    return Trend(slope, early, statistics.median(values[-fifth:]))
