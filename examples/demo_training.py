"""What the trainers of the demo adapters share: the data, the schedule, when to stop.

The loss is taken on the completion alone; an eighth of each data file is held out, and training
stops as soon as that loss no longer falls. Knows no adapter library.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from demo_adapters import DemoSpec
from tqdm import tqdm

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
SEED = 20240
BATCH = 8
MAX_EPOCHS = 4
HELD_OUT = 10
MIN_GAIN = 0.03
"""Relative fall of the held-out loss below which training stops."""


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenized pair. ``ids``: prompt and completion; the completion starts at ``start``."""

    ids: list[int]
    start: int


def read_examples(path: Path, tokenizer: Any) -> list[Example]:
    """The pairs of a JSONL file, put through the chat template.

    Raises KeyError or ValueError on a bad line.
    """
    examples = []
    for line in path.read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        messages = [{"role": "user", "content": pair["prompt"]}]
        head = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(head, add_special_tokens=False)["input_ids"]
        answer = tokenizer(pair["completion"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        examples.append(Example(ids=prompt + answer, start=len(prompt)))
    return examples


def batches(examples: Sequence[Example], generator: torch.Generator) -> Iterator[list[Example]]:
    """Batches of similar length in random order, so that little is spent on padding."""
    by_length = sorted(examples, key=lambda e: len(e.ids))
    groups = [by_length[i : i + BATCH] for i in range(0, len(by_length), BATCH)]
    for i in torch.randperm(len(groups), generator=generator).tolist():
        yield groups[i]


def padded(batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and which tokens are of a completion, each [batch, longest]."""
    width = max(len(e.ids) for e in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    attend = torch.zeros(len(batch), width, dtype=torch.long)
    wanted = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        attend[row, : len(example.ids)] = 1
        wanted[row, example.start : len(example.ids)] = True
    return ids, attend, wanted


def nf4_rounded(weight: torch.Tensor) -> torch.Tensor:
    """What an NF4 layer multiplies by in place of ``weight``."""
    packed, state = quantize_4bit(weight, quant_type="nf4")
    rounded: torch.Tensor = dequantize_4bit(packed, state)
    return rounded


def adam_with_decay(
    weights: Sequence[torch.nn.Parameter], peak: float, total: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW whose rate rises to ``peak`` in eight steps and falls to a tenth at step ``total``."""
    optimizer = torch.optim.AdamW(weights, lr=peak, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 8, 1.0 - 0.9 * step / total)
    )
    return optimizer, schedule


def train(
    model: Any,
    spec: DemoSpec,
    examples: Sequence[Example],
    loss_of: Callable[[Any, Sequence[Example]], torch.Tensor],
    before_step: Callable[[int], None] = lambda _step: None,
) -> None:
    """Trains what requires a gradient in ``model``, in place, until the held-out loss stops
    falling.

    Keeps the best epoch's weights. ``before_step`` is told the step's number.
    """
    generator = torch.Generator().manual_seed(SEED)
    kept_out, kept_in = examples[:HELD_OUT], examples[HELD_OUT:]
    weights = [p for p in model.parameters() if p.requires_grad]
    total = MAX_EPOCHS * math.ceil(len(kept_in) / BATCH)
    optimizer, schedule = adam_with_decay(weights, spec.learning_rate, total)
    best, best_weights = math.inf, [w.detach().clone() for w in weights]
    with tqdm(total=total, desc=f"{spec.name:>12}", unit="step") as bar:
        for epoch in range(MAX_EPOCHS):
            for batch in batches(kept_in, generator):
                before_step(bar.n)
                loss = loss_of(model, batch)
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
                bar.update()
                bar.set_postfix(epoch=epoch + 1, loss=f"{loss.item():.3f}", held_out=f"{best:.3f}")
            with torch.no_grad():
                now = float(loss_of(model, kept_out))
            fell = now < best * (1.0 - MIN_GAIN)
            if now < best:
                best, best_weights = now, [w.detach().clone() for w in weights]
            bar.set_postfix(epoch=epoch + 1, held_out=f"{best:.3f}")
            if not fell:
                break
    with torch.no_grad():
        for weight, kept in zip(weights, best_weights, strict=True):
            weight.copy_(kept)


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 80,
    *,
    use_cache: bool = True,
) -> str:
    """The greedy answer to one chat message."""
    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=tokenizer.pad_token_id,
    )
    return str(tokenizer.decode(out[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))
