"""Half an hour at 70 % of what the server can do, with adapters that come and go, a route that
moves and callers who hang up.

    python loadtests/soak.py                              # 30 minutes over the default model
    python loadtests/soak.py --minutes 2 --report-s 20    # a first look

The capacity is measured before (requests of the same mix in a closed loop) and again every
``--measure-s`` seconds, since a shared machine changes its speed; the load is open (a Poisson
process at 70 % of it). What must hold, and makes the exit code 1 otherwise: no error that is not a
429 with its Retry-After; each answer by a version of the name that was asked for; memory that does
not grow by more than ``--growth`` from the second fifth of the run to its last; at the end, without
requests, no lease, no KV block and no file descriptor more than before.

Samples go to a CSV file, a table to stderr, JSON to stdout; SIGTERM ends the run early, with both.
Time in which this process was stopped is not counted. The server and this process are one process
group.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import random
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench_http import ProtocolError
from bench_stats import percentile
from make_adapters import make_adapters
from server_process import ServerProcess
from soak_load import ROLLED, Mix, Traffic
from soak_watch import AT_REST, RunningClock, Sample, sample, trend

from manyhats.config import Settings
from manyhats.engine.model.default import ensure_default_model

HERE = Path(__file__).resolve().parent
ADMIN_KEY = "admin-of-the-soak"
CHURNED_FOLDERS = 6


class Soak:
    """One run against one server."""

    def __init__(self, args: argparse.Namespace, server: ServerProcess, traffic: Traffic) -> None:
        self._args = args
        self._server = server
        self._traffic = traffic
        self._random = random.Random(args.seed)
        self._callers: set[asyncio.Task[None]] = set()
        self.clock = RunningClock()
        self.capacities: list[float] = []
        self.samples: list[Sample] = []
        self.offered = 0
        self.ended = False

    async def look(self) -> Sample:
        """The server now."""
        text = (await self._traffic.admin("GET", "/metrics")).decode()
        return sample(self.clock.tick(), self._server.pid, text)

    async def at_rest(self) -> Sample:
        """The server once nothing runs any more, or after a minute."""
        for _ in range(240):
            now = await self.look()
            if not any(now.gauges[name] for name in ("manyhats_running", "manyhats_waiting")):
                break
            await asyncio.sleep(0.25)
        await asyncio.sleep(1.0)  # closed connections are seen by the server's event loop
        return await self.look()

    async def keep_time(self) -> None:
        """Lets the clock see pauses, until cancelled."""
        while True:
            self.clock.tick()
            await asyncio.sleep(0.25)

    async def measure(self) -> None:
        """What the server can do now."""
        args = self._args
        rate = await self._traffic.closed_loop(args.clients, args.measure_for_s)
        self.capacities.append(rate)
        print(f"{self.clock.tick():6.0f} s: {rate:.1f} tokens/s at most", file=sys.stderr)

    async def arrive(self) -> None:
        """Callers at their own times, whether or not earlier ones are answered, until cancelled."""
        due = self.clock.tick() + self._args.measure_s
        while True:
            rate = self._args.share * self.capacities[-1] / self._traffic.mix.mean_tokens
            await asyncio.sleep(self._random.expovariate(rate))
            task = asyncio.create_task(self._traffic.caller())
            self._callers.add(task)
            task.add_done_callback(self._callers.discard)
            self.offered += 1
            if self.clock.tick() > due:
                await asyncio.gather(*self._callers)
                await self.measure()
                due = self.clock.tick() + self._args.measure_s

    async def watch(self) -> None:
        """Takes the samples; returns once the time is up."""
        args, due = self._args, 0.0
        began = self.clock.tick()
        while (now := self.clock.tick() - began) < 60 * args.minutes and not self.ended:
            if now >= due:
                self.samples.append(await self.look())
                due = now + args.report_s
                self._tell()
            await asyncio.sleep(0.25)

    def end(self) -> None:
        """The time is up now."""
        self.ended = True

    def _tell(self) -> None:
        last, tally = self.samples[-1], self._traffic.tally
        print(
            f"{last.at_s:6.0f} s: {tally.answered} answered, {tally.refused} refused, "
            f"{tally.hung_up} hung up, {tally.changes} changes, {tally.lives} lives, "
            f"{len(tally.problems)} problems; {last.rss_mib:.0f} MiB, {last.fds} fds, "
            f"{last.gauges['manyhats_leases']:.0f} leases",
            *tally.problems[-1:],
            file=sys.stderr,
            flush=True,
        )

    async def run(self, churned: Sequence[Path]) -> None:
        """The load, until the time is up; what runs then ends whole."""
        timing = asyncio.create_task(self.keep_time())
        await self.measure()
        background = [
            asyncio.create_task(work)
            for work in (
                self.arrive(),
                self._traffic.roll(self._args.roll_s),
                self._traffic.churn(churned, self._args.churn_s),
            )
        ]
        watching = asyncio.create_task(self.watch())
        # A task that ends by itself has failed: its error ends the run.
        done, _ = await asyncio.wait([watching, *background], return_when=asyncio.FIRST_COMPLETED)
        for task in (watching, *background):
            if task not in done:
                task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*background, watching)
        for task in done:
            task.result()
        await asyncio.gather(*self._callers)
        timing.cancel()


def result(soak: Soak, traffic: Traffic, before: Sample, after: Sample, growth: float) -> Any:
    """The figures, and ``wrong``: what did not hold."""
    tally = traffic.tally
    rss, anon = trend(soak.samples, "rss_mib"), trend(soak.samples, "anon_mib")
    wrong = [f"a request: {problem}" for problem in tally.problems[:10]]
    if rss.growth > growth:
        wrong.append(f"memory grew by {100 * rss.growth:.1f} %")
    wrong += [f"{n} is {after.gauges[n]:g} at the end" for n in AT_REST if after.gauges[n]]
    if after.fds > before.fds:
        wrong.append(f"{after.fds - before.fds} file descriptors more than before")
    seconds = soak.samples[-1].at_s - soak.samples[0].at_s
    return {
        "minutes": round(seconds / 60, 1), "paused_s": round(soak.clock.paused_s),
        "capacity_tok_s": [round(rate, 1) for rate in soak.capacities],
        "offered": soak.offered, "offered_req_s": round(soak.offered / seconds, 2),
        "answered": tally.answered, "tokens": tally.tokens, "refused_429": tally.refused,
        "hung_up": tally.hung_up, "route_changes": tally.changes, "adapter_lives": tally.lives,
        "problems": len(tally.problems),
        "ttft_p50_ms": round(1000 * percentile(tally.ttfts, 50)),
        "ttft_p99_ms": round(1000 * percentile(tally.ttfts, 99)),
        "rss_mib_early": round(rss.early, 1), "rss_mib_late": round(rss.late, 1),
        "rss_mib_peak": round(max(s.rss_mib for s in soak.samples), 1),
        "rss_slope_mib_h": round(rss.slope_per_h, 1),
        "anon_slope_mib_h": round(anon.slope_per_h, 1),
        "fds_before_after": [before.fds, after.fds],
        "fds_peak": max(s.fds for s in soak.samples),
        "threads_before_after": [before.threads, after.threads],
        "at_rest": {name: after.gauges[name] for name in AT_REST},
        "wrong": wrong,
    }  # fmt: skip


async def prepare(args: argparse.Namespace, traffic: Traffic, folders: Sequence[Path]) -> None:
    """Every name registered and asked once, the rolled one with two versions."""
    for folder in (folders[0], folders[1]):
        await traffic.register(ROLLED, folder)
    await traffic.admin("POST", f"/admin/adapters/{ROLLED}/promote", {"version": 1})
    for name, folder in zip(traffic.mix.names[1:], folders[2:], strict=True):
        await traffic.register(name, folder)
    rng = random.Random(args.seed)
    for name in traffic.mix.names:
        await traffic.ask(traffic.mix.body(rng, name))
    if traffic.tally.problems:
        raise SystemExit("\n".join(traffic.tally.problems))


async def measure(args: argparse.Namespace, work: Path) -> tuple[Any, list[Sample]]:
    """The whole soak in the folder ``work``."""
    config = args.model / "config.json"
    count = args.adapters + 1 + CHURNED_FOLDERS
    made = make_adapters(config, work / "adapters", count=count, rank=8, progress=False)
    os.environ["MANYHATS_ADMIN_API_KEYS"] = ADMIN_KEY  # a flag can be read in the process list
    flags = ["--model", str(args.model), "--home", str(work / "home"), "--kv-cache-mb", "256"]
    flags += ["--adapter-root", str(work / "adapters"), "--slots", str(args.slots)]
    flags += ["--max-queue", "64", *args.server_flag]
    server = ServerProcess(flags, args.log or work / "server.log")
    try:
        await server.wait_ready()
        names = [ROLLED, *(f"soak-{i:02d}" for i in range(1, args.adapters))]
        mix = Mix(
            args.model.name, names, 1.0, (16, 128), (16, 64),
            json.loads(config.read_text())["vocab_size"], 0.1,
        )  # fmt: skip
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        traffic = Traffic(server.base_url, headers, mix, args.seed)
        listed = json.loads(await traffic.admin("GET", "/v1/models"))
        traffic.mix = Mix(**{**_fields(mix), "base": listed["data"][0]["id"]})
        soak = Soak(args, server, traffic)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, soak.end)
        await prepare(args, traffic, made[:-CHURNED_FOLDERS])
        await traffic.close()
        before = await soak.at_rest()
        await soak.run(made[-CHURNED_FOLDERS:])
        await traffic.close()
        after = await soak.at_rest()
    except (OSError, ProtocolError) as error:
        raise SystemExit(f"the server went away: {error}") from error
    finally:
        server.stop()
    return result(soak, traffic, before, after, args.growth), soak.samples


def _fields(mix: Mix) -> dict[str, Any]:
    return {name: getattr(mix, name) for name in Mix.__dataclass_fields__}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--share", type=float, default=0.7, help="of the measured capacity")
    parser.add_argument("--measure-s", type=float, default=90, help="between two measurements")
    parser.add_argument("--measure-for-s", type=float, default=20, help="length of one")
    parser.add_argument("--clients", type=int, default=32, help="in flight while measuring")
    parser.add_argument("--adapters", type=int, default=12, help="names that are asked")
    parser.add_argument("--slots", type=int, default=8, help="of them resident at once")
    parser.add_argument("--roll-s", type=float, default=5, help="between changes of a route")
    parser.add_argument("--churn-s", type=float, default=8, help="between lives of an adapter")
    parser.add_argument("--report-s", type=float, default=10, help="between samples")
    parser.add_argument("--growth", type=float, default=0.02, help="of memory, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="a folder; default: the server's own base")
    parser.add_argument("--server-flag", action="append", default=[], help="passed on")
    parser.add_argument("--log", type=Path, help="the server's output is kept there")
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "soak.csv")
    args = parser.parse_args(argv)
    args.model = (args.model or ensure_default_model(Settings().home)).resolve()
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it; 1 where something did not hold."""
    args = parse(argv)
    with tempfile.TemporaryDirectory() as work:
        found, samples = asyncio.run(measure(args, Path(work)))
    with args.csv.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, samples[0].row())
        writer.writeheader()
        writer.writerows(s.row() for s in samples)
    for name, value in found.items():
        print(f"{name:24} {value}", file=sys.stderr)
    print(json.dumps(found))
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
