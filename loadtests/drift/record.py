"""Records what drift detection sees of requests, healthy and faulty, on the real model.

    python loadtests/drift/record.py --out values.json --requests 200 --only healthy,noise-1

Each condition is a number of requests to one adapter version, answered and scored again by the
engine as the server does (here every request, there a sampled share); what is written is each
request's signals. ``replay.py`` draws runs from them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from faults import noisy, scaled
from overtrain import overtrained

from manyhats.app import Application, build
from manyhats.config import Settings
from manyhats.drift.rescoring import rescored
from manyhats.drift.signals.finished import Ending, Finished
from manyhats.drift.signals.hidden import projected
from manyhats.drift.signals.output import output_signals
from manyhats.drift.signals.prompt import prompt_signals
from manyhats.drift.signals.rescored import rescored_signals
from manyhats.drift.signals.service import service_signals
from manyhats.engine.interface import CompareRequest
from manyhats.engine.model.default import ensure_default_model
from manyhats.types import (
    DEFAULT_TENANT,
    AdapterRef,
    FinishReason,
    GenerationRequest,
    SamplingParams,
)

ROOT = Path(__file__).resolve().parents[2]
ADAPTER, OTHER = "pirate", "legal"
TOKENS = 24
STEPS = 24
NOISE = (0.5, 1, 2, 4)
HEALTHY_SHARE = 4
AT_ONCE = 16

Signals = dict[str, Any]


def prompts() -> tuple[list[str], list[str]]:
    """(the adapter's own domain: questions in English, another one: shouted code and numbers)."""
    lines = (ROOT / f"examples/data/{ADAPTER}.jsonl").read_text("utf-8").splitlines()
    usual = [json.loads(line)["prompt"] for line in lines]
    rng = random.Random(7)
    words = ["SELECT", "def", "x_1", "0x3f", "->", "{", "}", "while", "NULL", "==", "return", "%d"]
    strange = [" ".join(rng.choices(words, k=rng.randint(20, 60))) for _ in range(400)]
    return usual, strange


def names() -> list[str]:
    """Every condition."""
    noise = [f"noise-{strength:g}" for strength in NOISE]
    return ["healthy", *noise, "trained-too-long", "b-x2", "other-weights", "other-domain"]


def adapter_of(name: str, model: Path, target: Path) -> Path:
    """A condition's adapter folder, made at ``target`` where it is a faulty one."""
    source = ROOT / "examples/adapters" / ADAPTER
    if target.is_dir():
        return target
    if name.startswith("noise-"):
        return noisy(source, target, float(name.removeprefix("noise-")))
    if name == "trained-too-long":
        data = ROOT / f"examples/data/{ADAPTER}.jsonl"
        return overtrained(model, source, data, target, STEPS)
    if name == "b-x2":
        return scaled(source, target, 2.0)
    return ROOT / "examples/adapters" / OTHER if name == "other-weights" else source


async def answer(app: Application, ref: AdapterRef, text: str, seed: int) -> Signals:
    """One request's signals; ``hidden``: the projected hidden state, for its distance."""
    client = app.engine.client
    chat = client.tokenizer.render_chat([{"role": "user", "content": text}])
    prompt = tuple(client.tokenizer.encode(chat, add_special_tokens=False))
    params = SamplingParams(max_tokens=TOKENS, seed=seed)
    begun = time.monotonic()
    request = GenerationRequest(f"r{seed}", DEFAULT_TENANT, prompt, (params,), ref, begun)
    tokens: list[int] = []
    parts, ending, first, last = [], Ending.LENGTH, begun, begun
    async for delta in client.generate(request):
        last = time.monotonic()
        first = first if tokens else last
        tokens += delta.token_ids
        parts.append(delta.text)
        if delta.finish_reason is FinishReason.STOP:
            ending = Ending.STOP
    pause = (last - first) / (len(tokens) - 1) if len(tokens) > 1 else None
    done = Finished(
        f"r{seed}", DEFAULT_TENANT, ref, prompt, tuple(tokens), "".join(parts), ending,
        ttft_s=first - begun, inter_token_s=pause,
    )  # fmt: skip
    lanes = await client.compare(
        CompareRequest(DEFAULT_TENANT, prompt + tuple(tokens), len(prompt), (ref, None), 1)
    )
    scored = rescored(lanes[0], lanes[1], len(prompt) - 1)
    return {
        **output_signals(done),
        **prompt_signals(done, client.tokenizer.decode(prompt)),
        **service_signals(done),
        **rescored_signals(scored),
        "hidden": [round(float(x), 6) for x in projected(scored.hidden)],
    }


async def record(
    app: Application, ref: AdapterRef, texts: list[str], count: int, seed: int
) -> list[Signals]:
    """Signals of ``count`` requests, sixteen at a time."""
    rng, room = random.Random(seed), asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> Signals:
        async with room:
            return await answer(app, ref, rng.choice(texts), seed * 100_000 + number)

    return await asyncio.gather(*(one(i) for i in range(count)))


async def run(app: Application, chosen: list[str], folder: Path, count: int, out: Path) -> None:
    """Every chosen condition in turn, each added to ``out`` as it ends."""
    usual, strange = prompts()
    app.engine.loop.start()
    try:
        for number, name in enumerate(names(), 1):
            if name not in chosen:
                continue
            source = adapter_of(name, Path(app.settings.model), folder / name)
            card = app.adapters.register_folder(name, str(source), tenant=DEFAULT_TENANT)
            size = HEALTHY_SHARE * count if name == "healthy" else count
            begun = time.perf_counter()
            texts = strange if name == "other-domain" else usual
            found = await record(app, card.ref, texts, size, number)
            print(f"{name}: {size} requests in {time.perf_counter() - begun:.0f} s", flush=True)
            before = json.loads(out.read_text()) if out.exists() else {}
            out.write_text(json.dumps({**before, name: found}))
    finally:
        app.engine.loop.stop()


def main() -> None:
    """Adds the chosen conditions to the file ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a folder; default the server's own model")
    parser.add_argument("--requests", type=int, default=200, help="of each; healthy: four times")
    parser.add_argument("--only", default=",".join(names()), help=", ".join(names()))
    parser.add_argument("--made", type=Path, help="keeps the faulty adapters between runs")
    parser.add_argument("--make", action="store_true", help="make them and end")
    given = parser.parse_args()
    usual = Settings().home
    model = given.model or ensure_default_model(usual)
    chosen = given.only.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        made = given.made or folder / "made"
        if given.make:
            for name in chosen:
                adapter_of(name, model, made / name)
            return
        home = folder / "home"
        home.mkdir()
        for kept in ("quantized", "kernels"):  # made at a first start: not again
            if (usual / kept).is_dir():
                (home / kept).symlink_to(usual / kept)
        roots = (made, ROOT / "examples/adapters")
        settings = Settings(home=home, model=str(model), adapter_root=roots, parity_probe=False)
        app = build(settings)
        try:
            asyncio.run(run(app, chosen, made, given.requests, given.out))
        finally:
            for close in app.closing:
                close()


if __name__ == "__main__":
    main()
