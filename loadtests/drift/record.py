"""Records what drift detection sees of requests, healthy and faulty, on the real model.

    python loadtests/drift/record.py --out values.json --requests 160 --only healthy,noise-1

Each condition is a number of requests to one adapter version, answered and scored again by the
engine exactly as the server does; what is written is each request's signals. ``replay.py`` draws
runs from them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from pathlib import Path

from faults import noisy, scaled

from manyhats.app import Application, build
from manyhats.config import Settings
from manyhats.drift.rescoring import rescored
from manyhats.drift.signals.finished import Ending, Finished
from manyhats.drift.signals.output import output_signals
from manyhats.drift.signals.prompt import prompt_signals
from manyhats.drift.signals.rescored import rescored_signals
from manyhats.engine.interface import CompareRequest
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


def prompts() -> tuple[list[str], list[str]]:
    """(the adapter's own domain: questions in English, another one: shouted code and numbers)."""
    lines = (ROOT / f"examples/data/{ADAPTER}.jsonl").read_text("utf-8").splitlines()
    usual = [json.loads(line)["prompt"] for line in lines]
    rng = random.Random(7)
    words = ["SELECT", "def", "x_1", "0x3f", "->", "{", "}", "while", "NULL", "==", "return", "%d"]
    strange = [" ".join(rng.choices(words, k=rng.randint(20, 60))) for _ in range(400)]
    return usual, strange


def conditions(folder: Path) -> dict[str, tuple[Path, bool]]:
    """Each condition's adapter folder, and whether its prompts are of the other domain."""
    source = ROOT / "examples/adapters" / ADAPTER
    made = {
        f"noise-{s:g}": (noisy(source, folder / f"noise-{s:g}", s), False) for s in (0.5, 1, 2, 4)
    }
    return {
        "healthy": (source, False),
        **made,
        "b-x2": (scaled(source, folder / "b-x2", 2.0), False),
        "other-weights": (ROOT / "examples/adapters" / OTHER, False),
        "other-domain": (source, True),
    }


async def answer(app: Application, ref: AdapterRef, text: str, seed: int) -> dict[str, float | str]:
    """One request's signals."""
    client = app.engine.client
    chat = client.tokenizer.render_chat([{"role": "user", "content": text}])
    prompt = tuple(client.tokenizer.encode(chat, add_special_tokens=False))
    params = SamplingParams(max_tokens=TOKENS, seed=seed)
    request = GenerationRequest(
        f"r{seed}", DEFAULT_TENANT, prompt, (params,), ref, time.monotonic()
    )
    tokens: list[int] = []
    parts, ending = [], Ending.LENGTH
    async for delta in client.generate(request):
        tokens += delta.token_ids
        parts.append(delta.text)
        if delta.finish_reason is FinishReason.STOP:
            ending = Ending.STOP
    done = Finished(f"r{seed}", DEFAULT_TENANT, ref, prompt, tuple(tokens), "".join(parts), ending)
    lanes = await client.compare(
        CompareRequest(DEFAULT_TENANT, prompt + tuple(tokens), 1, (ref, None))
    )
    scored = rescored(lanes[0], lanes[1], len(prompt) - 1, whole=True)
    return {
        **output_signals(done),
        **prompt_signals(done, client.tokenizer.decode(prompt)),
        **rescored_signals(scored),
    }


async def record(app: Application, ref: AdapterRef, texts: list[str], count: int, seed: int):  # noqa: ANN201
    """Signals of ``count`` requests, eight at a time."""
    rng, room = random.Random(seed), asyncio.Semaphore(8)

    async def one(number: int) -> dict[str, float | str]:
        async with room:
            return await answer(app, ref, rng.choice(texts), seed * 100_000 + number)

    return await asyncio.gather(*(one(i) for i in range(count)))


async def run(app: Application, chosen: list[str], folder: Path, count: int) -> dict[str, list]:
    """Every chosen condition in turn."""
    found = {}
    usual, strange = prompts()
    app.engine.loop.start()
    try:
        for number, (name, (source, elsewhere)) in enumerate(conditions(folder).items(), 1):
            if name not in chosen:
                continue
            card = app.adapters.register_folder(name, str(source), tenant=DEFAULT_TENANT)
            size = 3 * count if name == "healthy" else count
            begun = time.perf_counter()
            texts = strange if elsewhere else usual
            found[name] = await record(app, card.ref, texts, size, number)
            print(f"{name}: {size} requests in {time.perf_counter() - begun:.0f} s", flush=True)
    finally:
        app.engine.loop.stop()
    return found


def main() -> None:
    """Adds the chosen conditions to the file ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="default")
    parser.add_argument("--requests", type=int, default=160)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        roots = (folder, ROOT / "examples/adapters")
        settings = Settings(home=folder / "home", model=given.model, adapter_root=roots)
        chosen = given.only.split(",") if given.only else list(conditions(folder / "names"))
        app = build(settings)
        try:
            found = asyncio.run(run(app, chosen, folder / "faults", given.requests))
        finally:
            for close in app.closing:
                close()
    kept = json.loads(given.out.read_text()) if given.out.exists() else {}
    given.out.write_text(json.dumps({**kept, **found}))


if __name__ == "__main__":
    main()
