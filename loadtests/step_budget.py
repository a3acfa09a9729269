"""Where the time of a decode step goes: the model's forward, and everything around it.

    python loadtests/step_budget.py --concurrency 32 --adapters 32 --rank 16

The server's own application is built in this process, without HTTP; so many requests of as many
adapters decode side by side, greedy, and the step loop's parts are timed by wrapping its methods
(two clock readings each, well under a microsecond). Only steps of decodes alone count. ``forward``
is the model: from the packed batch to the logits; ``pack`` what the runner does before it (ids,
positions, plans of attention and adapters); ``sample`` the tokens' choice, ``text`` detokenizing,
stopping and deltas; ``deliver`` their way to the event loop. ``outside`` is all but the forward,
whose share of a step should stay under a tenth.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from make_adapters import make_adapters

from manyhats.app import Application, build
from manyhats.config import Settings
from manyhats.engine import runner
from manyhats.engine.model.default import ensure_default_model
from manyhats.types import DEFAULT_TENANT, AdapterRef, GenerationRequest, SamplingParams

PARTS = ("schedule", "pack", "forward", "sample", "text", "deliver", "rest")


class Clock:
    """Seconds by part of the running step; a part within another is taken from it."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._within: list[float] = []

    def timed(self, owner: Any, name: str, part: str) -> None:
        """Counts the calls of ``owner.name`` as ``part``."""
        inner: Callable[..., Any] = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self._within.append(0.0)
            begun = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                took = time.perf_counter() - begun
                self.spent[part] = self.spent.get(part, 0.0) + took - self._within.pop()
                if self._within:
                    self._within[-1] += took

        setattr(owner, name, call)


def watch(app: Application, concurrency: int) -> list[dict[str, float]]:
    """The parts of each step of ``concurrency`` decodes from now on, in seconds."""
    loop, clock, steps = app.engine.loop, Clock(), list[dict[str, float]]()
    clock.timed(loop._scheduler, "schedule", "schedule")
    clock.timed(loop._runner, "run", "pack")
    if loop._runner._fast is not None:
        clock.timed(loop._runner._fast, "run", "forward")
    clock.timed(runner, "forward", "forward")
    clock.timed(loop._post, "process", "text")
    clock.timed(loop._post, "_sample", "sample")
    clock.timed(loop, "_publish", "deliver")
    step, process = loop.step, loop._process
    seen: list[int] = []

    def counted(schedule: Any) -> Any:
        alone = all(item.count == 1 and item.samples for item in schedule.items)
        seen.append(len(schedule.items) if alone else 0)
        return process(schedule)

    def timed_step() -> bool:
        clock.spent.clear()
        seen.clear()
        begun = time.perf_counter()
        ran = step()
        whole = time.perf_counter() - begun
        if seen == [concurrency]:
            steps.append({**clock.spent, "rest": whole - sum(clock.spent.values())})
        return ran

    vars(loop).update(_process=counted, step=timed_step)
    return steps


async def load(app: Application, refs: Sequence[AdapterRef | None], args: Any) -> None:
    """Requests side by side, each with its adapter, all of one length."""
    vocab = app.engine.client.model.vocab_size

    async def one(number: int) -> None:
        prompt = tuple((7 * number + 31 * i) % (vocab - 100) + 50 for i in range(args.input_tokens))
        params = SamplingParams(args.output_tokens, 0, temperature=0.0, ignore_eos=True)
        ref = refs[number % len(refs)]
        request = GenerationRequest(
            f"r{number}", DEFAULT_TENANT, prompt, (params,), ref, time.monotonic()
        )
        async for delta in app.engine.client.generate(request):
            if delta.error is not None:
                raise delta.error

    await asyncio.gather(*(one(i) for i in range(args.concurrency)))


def report(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Medians over the steps, in ms, and the share of all outside the forward."""
    middle = {p: 1e3 * statistics.median(s.get(p, 0.0) for s in steps) for p in PARTS}
    whole = 1e3 * statistics.median(sum(s.values()) for s in steps)
    outside = [1 - s.get("forward", 0.0) / sum(s.values()) for s in steps]
    found = {"steps": float(len(steps)), "step_ms": whole}
    found |= {f"{part}_ms": value for part, value in middle.items()}
    return found | {"outside_share": statistics.median(outside)}


def run(args: argparse.Namespace, scratch: Path) -> dict[str, float]:
    """One load, its steps' parts."""
    usual = Settings().home
    model = ensure_default_model(usual)
    for kept in ("quantized", "kernels"):  # made at a first start: not again
        if (usual / kept).is_dir():
            (scratch / kept).symlink_to(usual / kept)
    made = scratch / "adapters"
    folders = make_adapters(
        model / "config.json", made, count=args.adapters, rank=args.rank, progress=False
    )
    app = build(Settings(home=scratch, model=str(model), adapter_root=(made,), parity_probe=False))
    try:
        refs: list[AdapterRef | None] = [
            app.adapters.register_folder(f.name, str(f), tenant=DEFAULT_TENANT).ref for f in folders
        ]
        steps = watch(app, args.concurrency)
        app.engine.loop.start()
        try:
            asyncio.run(load(app, refs or [None], args))
        finally:
            app.engine.loop.stop()
    finally:
        for close in app.closing:
            close()
    return report(steps)


def main() -> None:
    """Prints the budget, and adds a row to ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=32, help="0: the bare base")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--input-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, help="CSV that a row is added to")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = run(args, Path(scratch))
    row = {"concurrency": args.concurrency, "adapters": args.adapters, "rank": args.rank}
    row |= {name: round(value, 3) for name, value in found.items()}
    for name, value in row.items():
        print(f"{name}: {value}")
    if args.out is not None:
        new = not args.out.exists()
        with args.out.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()
