"""The recipe of ``finetune.py``: one rank at a time over one 4-bit base, in two phases."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from finetune_data import SEED, Pair, collate
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

ATTENTION = re.compile(r"\b(self_attn|self_attention|attention|attn)\b")
NO_RANK_WORTH = 1.01
"""A smaller rank is taken as long as its loss is at most so many times the best one."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is tried and how long. ``epochs``: at most so many a phase; ``held_out``: share of the
    pairs that is not trained on; ``min_gain``: relative fall of the held-out loss below which a
    phase ends.
    """

    ranks: tuple[int, ...]
    epochs: int
    batch: int
    learning_rate: float
    held_out: float = 0.125
    min_gain: float = 0.005


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one rank came to: held-out losses of the bare base and of its best weights, and where
    these are.
    """

    rank: int
    before: float
    loss: float
    folder: Path


def load_base(source: str) -> Any:
    """The base in NF4, frozen; it computes in bf16 on a GPU and in fp32 on a CPU."""
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=dtype,
        device_map={"": 0 if gpu else "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        ),
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack the weights at the first evaluation; that layout has no
            # backward pass.
            module.support_avx512bf16_for_cpu = False
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=gpu)


class KeepBest(TrainerCallback):  # type: ignore[misc]
    """Keeps the adapter's weights of the lowest held-out loss, and ends a phase that no longer
    lowers it.

    Trainer's own (``load_best_model_at_end``, ``EarlyStoppingCallback``) know one phase alone, and
    would end the second above what the first had reached.
    """

    def __init__(self, model: Any, min_gain: float) -> None:
        self.loss = math.inf
        self.seen: list[float] = []
        self._min_gain = min_gain
        self._weights = {n: p for n, p in model.named_parameters() if "lora_" in n}
        self._best: dict[str, torch.Tensor] = {}

    def on_evaluate(
        self, _args: Any, _state: Any, control: Any, metrics: Mapping[str, float], **_: Any
    ) -> None:
        now = metrics["eval_loss"]
        self.seen.append(now)
        # "not below" so that a loss that is no number ends the phase, too
        control.should_training_stop = not now < self.loss * (1 - self._min_gain)
        if now < self.loss:
            self.loss = now
            self._best = {n: p.detach().clone() for n, p in self._weights.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the best weights back."""
        for name, weight in self._best.items():
            self._weights[name].copy_(weight)


def unfreeze(model: Any, phase: str) -> int:
    """Lets the adapters of a phase learn, ``attention`` or ``all``; gives how many numbers these
    are. Raises ValueError where the model has no module that is called like attention.
    """
    count = 0
    for name, parameter in model.named_parameters():
        learns = "lora_" in name and (phase == "all" or ATTENTION.search(name) is not None)
        parameter.requires_grad_(learns)
        count += parameter.numel() if learns else 0
    if not count:
        raise ValueError(f"no adapter belongs to the phase {phase!r}")
    return count


def arguments(recipe: Recipe, scratch: Path, learning_rate: float) -> TrainingArguments:
    """Trainer's settings of one phase."""
    gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(scratch),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch,
        per_device_eval_batch_size=recipe.batch,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,  # below 1: a share of all steps
        max_grad_norm=1.0,
        weight_decay=0.0,
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="no",
        report_to="none",
        seed=SEED,
        use_cpu=not gpu,
        bf16=gpu,
        dataloader_pin_memory=gpu,
        remove_unused_columns=False,
        label_names=["labels"],
    )


def train(
    base: Any, rank: int, recipe: Recipe, data: tuple[list[Pair], list[Pair]], pad: int, out: Path
) -> Outcome:
    """Trains one rank through both phases, writes its best weights to ``out``, and takes the
    adapter off ``base`` again. Raises ValueError where the loss is no number.
    """
    torch.manual_seed(SEED)
    shape = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear"
    )
    model = get_peft_model(base, shape)
    best = KeepBest(model, recipe.min_gain)
    for phase, share in (("attention", 1.0), ("all", 0.5)):
        count = unfreeze(model, phase)
        print(f"rank {rank}, phase {phase}: {count:,} numbers learn", flush=True)
        trainer = Trainer(
            model=model,
            args=arguments(recipe, out.parent / "trainer", recipe.learning_rate * share),
            train_dataset=data[0],
            eval_dataset=data[1],
            data_collator=partial(collate, pad=pad),
            callbacks=[best],
        )
        if not best.seen:
            trainer.evaluate()  # B is zero: the bare base
        trainer.train()
        best.restore()
    if not math.isfinite(best.loss):
        raise ValueError(f"rank {rank}: the held-out loss is {best.seen[0]}")
    model.save_pretrained(out)
    model.unload()
    return Outcome(rank, best.seen[0], best.loss, out)


def choose(outcomes: Sequence[Outcome]) -> Outcome:
    """The smallest rank whose held-out loss is about as low as the lowest."""
    bound = NO_RANK_WORTH * min(found.loss for found in outcomes)
    return min((o for o in outcomes if o.loss <= bound), key=lambda o: o.rank)
