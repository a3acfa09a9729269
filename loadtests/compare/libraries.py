"""The libraries' own batches: PEFT's mixed batch, transformers' continuous batching.

No servers: a batch of as many requests as are in flight elsewhere is given at once to a worker
(``peers_local.py``) in an environment of its own. They pay for no HTTP, and wait for none.
"""

from __future__ import annotations

from compare.environments import Recipe, Step, make_venv, pins
from compare.target import MATRIX, Place, Target

PEER = "libraries"
TORCH = "2.13.0"


def recipe() -> Recipe:
    """How they are installed."""
    steps = [
        Step("environment", make_venv),
        Step("torch", lambda shell: shell.pip("install", f"torch=={TORCH}")),
        Step("libraries", lambda shell: shell.pip("install", "-r", str(pins(PEER)))),
    ]
    return Recipe(PEER, f"torch {TORCH} {pinned()}", steps)


def pinned() -> str:
    """The versions, in one line."""
    return " ".join(pins(PEER).read_text(encoding="utf-8").split())


def targets(place: Place) -> list[Target]:
    """Both, over the base in bf16."""
    common = ("--model", str(place.model), "--quantization", "none", "--dtype", "bf16",
              "--threads", str(place.threads))  # fmt: skip
    worn = place.all_r16[:32]
    adapters = ("--adapters", *map(str, worn))
    return [
        Target(
            name="peft", peer=PEER, setting="mixed batch, bf16", scenarios=frozenset({MATRIX}),
            batch=("--mode", "peft", *common, *adapters), wears=len(worn),
        ),
        Target(
            name="transformers", peer=PEER, setting="continuous batching, bf16", base=True,
            scenarios=frozenset({MATRIX}), batch=("--mode", "continuous", *common),
        ),
    ]  # fmt: skip
