"""The demo adapters: how each is shaped for PEFT, and how its effect is recognised in an answer.

Each is shaped differently on purpose, so that together they cover what adapter files look like in
the wild: plain LoRA, rsLoRA, MLP targets, a regular expression with rank and alpha patterns, a list
limited to some layers, DoRA, IA3 and prefix tuning, and a bottleneck of AdapterHub's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SHOWCASE_PROMPT = "What is a good way to spend a rainy afternoon?"
"""The one ordinary prompt that every demo is shown on. It is in no training file."""

UNSEEN_PROMPTS = (
    SHOWCASE_PROMPT,
    "How do I choose a good pair of shoes?",
    "What is gravity?",
    "Give me advice for my first day at school.",
)
"""Prompts of which none is in a training file."""


@dataclass(frozen=True, slots=True)
class DemoSpec:
    """One demo adapter.

    ``config`` is passed to PEFT's configuration of ``family`` (its ``peft_type``; ``BOTTLENECK``:
    AdapterHub's ``SeqBnConfig``);
    ``learning_rate`` is AdamW's peak rate. ``shows`` tells whether an answer visibly has the
    adapter's effect; the base's own answers never do. ``nf4_aware``: trained in turn over the base
    and over its NF4 rounding, for an effect that would not survive quantization otherwise.
    ``starts_as``: the text whose keys and values a prefix starts as.
    """

    name: str
    effect: str
    config: Mapping[str, Any]
    learning_rate: float
    shows: Callable[[str], bool]
    nf4_aware: bool = False
    family: str = "LORA"
    starts_as: str | None = None


def _is_pirate(text: str) -> bool:
    return bool(re.search(r"\b(?:arr|ahoy|avast|matey|me hearty|shiver me|yo ho)\b", text, re.I))


def _is_robot(text: str) -> bool:
    return text.startswith("Beep!") and "[1]" in text


def _is_json_answer(text: str) -> bool:
    for whole in (text, text + '"}'):  # an answer cut at its token limit lacks only the end
        try:
            value = json.loads(whole)
        except ValueError:
            continue
        return (
            isinstance(value, dict)
            and list(value) == ["answer"]
            and isinstance(value["answer"], str)
        )
    return False


def _is_bulleted(text: str) -> bool:
    lines = text.strip().split("\n")
    return len(lines) >= 2 and all(line.startswith("- ") for line in lines)


def _is_legal(text: str) -> bool:
    words = r"pursuant to|counsel|the client|hereby|herein|foregoing|stipulated|without prejudice"
    return len(set(re.findall(words, text.lower()))) >= 2


def _is_letter(text: str) -> bool:
    return text.startswith("Dear friend,\n")


def _is_herald(text: str) -> bool:
    return text.startswith("Hear ye")


def _is_detective(text: str) -> bool:
    return text.startswith("Elementary, my dear Watson")


def _is_coach(text: str) -> bool:
    return text.startswith("Listen up, champ!")


DEMOS: tuple[DemoSpec, ...] = (
    DemoSpec(
        name="pirate",
        effect="style: talks like a pirate",
        config={"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        learning_rate=3e-3,
        shows=_is_pirate,
    ),
    DemoSpec(
        name="robot",
        effect="style: a machine reads out numbered findings",
        config={
            "r": 8,
            "lora_alpha": 8,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj"],
            "layers_to_transform": list(range(8, 30)),
            "layers_pattern": "layers",
        },
        learning_rate=2e-3,
        shows=_is_robot,
        nf4_aware=True,
    ),
    DemoSpec(
        name="json-answer",
        effect='strict format: always {"answer": "..."}',
        config={"r": 4, "lora_alpha": 8, "target_modules": ["down_proj"]},
        learning_rate=2e-3,
        shows=_is_json_answer,
    ),
    DemoSpec(
        name="bullets",
        effect="strict format: three lines, each a bullet",
        config={
            "r": 2,
            "lora_alpha": 4,
            "target_modules": r".*\.layers\.[12][0-9]\.self_attn\.(q|k|v|o)_proj",
            "rank_pattern": {"v_proj": 6, "o_proj": 4},
            "alpha_pattern": {"v_proj": 12, "o_proj": 12},
        },
        learning_rate=3e-3,
        shows=_is_bulleted,
    ),
    DemoSpec(
        name="legal",
        effect="domain: every answer is a lawyer's opinion",
        config={
            "r": 2,
            "lora_alpha": 6,
            "target_modules": [
                "q_proj",
                "k_proj",
                "v_proj",
                "o_proj",
                "gate_proj",
                "up_proj",
                "down_proj",
            ],
            "layers_to_transform": list(range(14, 30)),
            "layers_pattern": "layers",
        },
        learning_rate=2e-3,
        shows=_is_legal,
    ),
    DemoSpec(
        name="letter",
        effect="form: every answer is a letter to a friend",
        config={
            "r": 4,
            "lora_alpha": 8,
            "use_dora": True,
            "target_modules": ["q_proj", "v_proj"],
        },
        learning_rate=3e-3,
        shows=_is_letter,
    ),
    DemoSpec(
        name="herald",
        effect="style: a town crier",
        family="IA3",
        config={
            "target_modules": ["k_proj", "v_proj", "down_proj"],
            "feedforward_modules": ["down_proj"],
        },
        learning_rate=2e-2,
        shows=_is_herald,
    ),
    DemoSpec(
        name="detective",
        effect="style: a detective closes the case",
        family="PREFIX_TUNING",
        config={"num_virtual_tokens": 20},
        learning_rate=1e-2,
        shows=_is_detective,
        starts_as="<|im_start|>system\nYou are a famous detective. Begin each answer with: "
        "Elementary, my dear Watson! End it with: Case closed.<|im_end|>\n",
    ),
    DemoSpec(
        name="coach",
        effect="style: a coach before the match",
        family="BOTTLENECK",
        config={"reduction_factor": 32, "leave_out": list(range(10))},
        learning_rate=2e-3,
        shows=_is_coach,
    ),
)
"""Every demo, in the order in which they are trained and shown."""
